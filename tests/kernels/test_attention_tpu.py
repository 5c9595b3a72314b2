"""The TPU attention kernel, interpreted on the CPU, against the plain reference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from llmjax.kernels.attention import pallas_tpu, reference
from llmjax.kernels.attention.options import Options, Terms


def inputs(*, T: int, N: int, K: int, H: int) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = {name: jax.random.normal(key, (2, T, heads, H)) for name, key, heads in
              zip(("q_BTNH", "k_BSKH", "v_BSKW"), keys, (N, K, K), strict=True)}  # fmt: skip
    segments = jnp.asarray([[1] * 100 + [2] * (T - 130) + [0] * 30, [1] * T])
    return arrays, {"q_segment_ids_BT": segments, "kv_segment_ids_BS": segments}


CASES = {
    "one head each": ((2, 2), Options()),
    "groups": ((4, 2), Options()),
    "window": ((2, 2), Options(window=60)),
    "softcap and scale": ((2, 2), Options(softcap=1.5, scale=0.2)),
    "bidirectional": ((2, 2), Options(kind="bidirectional")),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_reference(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, options = CASES[case]
    interpreted = functools.partial(splash.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash, "make_splash_mha_single_device", interpreted)
    arrays, segments = inputs(T=256, N=heads[0], K=heads[1], H=128)
    weight = jax.random.normal(jax.random.key(1), arrays["q_BTNH"].shape)

    def scalar(module: object, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out_BTNH = module.attention(**arrays, **segments, options=options)
        return jnp.sum(out_BTNH * weight), out_BTNH

    (_, ours), grads = jax.value_and_grad(lambda a: scalar(pallas_tpu, a), has_aux=True)(arrays)
    (_, plain), plain_grads = jax.value_and_grad(lambda a: scalar(reference, a), has_aux=True)(arrays)
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        scale = float(jnp.abs(plain_grads[name]).max())
        np.testing.assert_allclose(grad, plain_grads[name], atol=1e-4 * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize("sizes", [{"T": 200, "H": 128}, {"T": 256, "H": 64}])
def test_shapes_it_does_not_take_are_left_to_others(sizes: dict[str, int]) -> None:
    arrays, segments = inputs(N=2, K=2, **sizes)
    with pytest.raises(NotImplementedError):
        pallas_tpu.attention(**arrays, **segments)


def test_a_cache_is_left_to_others() -> None:
    arrays, segments = inputs(T=256, N=2, K=2, H=128)
    with pytest.raises(NotImplementedError):
        pallas_tpu.attention(**arrays, **segments, q_offset=jnp.int32(3))


@pytest.mark.parametrize("terms", [Terms(slopes_N=jnp.ones(2)), Terms(sinks_N=jnp.ones(2))])
def test_terms_it_does_not_have_are_left_to_others(terms: Terms) -> None:
    arrays, segments = inputs(T=256, N=2, K=2, H=128)
    with pytest.raises(NotImplementedError):
        pallas_tpu.attention(**arrays, **segments, terms=terms)
