"""Attention in blocks of queries against the plain reference, and the reference against sums written out."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.kernels.attention import reference, xla
from llmjax.kernels.attention.options import Options, Terms

SLOPES, SINKS = jnp.asarray([0.5, 0.25, 0.1, 0.0]), jnp.asarray([0.3, -1.0, 2.0, 0.0])
VARIANTS = {
    "causal": (Options(), Terms()),
    "window": (Options(window=40), Terms()),
    "window over several blocks": (Options(window=200), Terms(sinks_N=SINKS)),
    "softcap and scale": (Options(softcap=1.5, scale=0.5), Terms()),
    "ALiBi": (Options(), Terms(slopes_N=SLOPES)),
    "sinks": (Options(), Terms(sinks_N=SINKS)),
    "bidirectional": (Options(kind="bidirectional"), Terms(slopes_N=SLOPES)),
    "prefix": (Options(kind="prefix"), Terms(prefix_BS=jnp.arange(512)[None] % 97 < 20)),
}


def packed_inputs(seed: int, *, T: int, N: int, K: int, W: int = 8) -> tuple[dict[str, jax.Array], jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = {"q_BTNH": (N, 8), "k_BSKH": (K, 8), "v_BSKW": (K, W)}
    arrays = {name: jax.random.normal(key, (2, T, *shape)) for (name, shape), key in
              zip(shapes.items(), keys[:3], strict=True)}  # fmt: skip
    ends = jax.random.bernoulli(keys[3], 3 / T, (2, T))
    return arrays, jnp.cumsum(ends, axis=1).astype(jnp.int32)


def assert_like_the_reference(arrays: dict[str, jax.Array], segments_BT: jax.Array, options: Options,
                              terms: Terms) -> None:
    """Values and gradients, of the sinks as well."""
    if terms.prefix_BS is not None:
        terms = Terms(prefix_BS=jnp.broadcast_to(terms.prefix_BS[:, :segments_BT.shape[1]], segments_BT.shape))

    @functools.partial(jax.jit, static_argnums=0)
    def run(module: object, arrays: dict[str, jax.Array], sinks_N: jax.Array | None) -> tuple:
        def scalar(arrays: dict[str, jax.Array], sinks_N: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            out = module.attention(**arrays, q_segment_ids_BT=segments_BT, kv_segment_ids_BS=segments_BT,
                                   options=options, terms=Terms(terms.slopes_N, sinks_N, terms.prefix_BS))
            return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

        return jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(arrays, sinks_N)

    ((_, ours), grads), ((_, plain), plain_grads) = (run(module, arrays, terms.sinks_N) for module in (xla, reference))
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)
    for grad, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=3e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_equal_the_reference(variant: str) -> None:
    arrays, segments_BT = packed_inputs(0, T=256, N=4, K=2)
    assert_like_the_reference(arrays, segments_BT, *VARIANTS[variant])


@pytest.mark.parametrize("sizes", [{"T": 1, "N": 1, "K": 1}, {"T": 128, "N": 3, "K": 1, "W": 4}])
def test_other_sizes(sizes: dict[str, int]) -> None:
    assert_like_the_reference(*packed_inputs(1, **sizes), Options(), Terms())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_is_its_definition(variant: str) -> None:
    """One query at a time: softmax over the slots that it sees, in plain Python."""
    options, terms = VARIANTS[variant]
    arrays, segments_BT = packed_inputs(2, T=60, N=4, K=2)
    prefix_BS = np.asarray(jnp.broadcast_to(VARIANTS["prefix"][1].prefix_BS[:, :60], (2, 60)))
    if terms.prefix_BS is not None:
        terms = Terms(prefix_BS=jnp.asarray(prefix_BS))
    out = reference.attention(**arrays, q_segment_ids_BT=segments_BT, kv_segment_ids_BS=segments_BT, options=options,
                              terms=terms)
    q, k, v = (np.asarray(arrays[name], np.float64) for name in ("q_BTNH", "k_BSKH", "v_BSKW"))
    segments = np.asarray(segments_BT)
    for b, t, n in ((0, 59, 0), (1, 45, 3), (0, 7, 1), (1, 0, 2)):
        exps, values = [], []
        for s in range(60):
            behind = 0 <= t - s < (options.window or 60)
            reached = {"causal": behind, "bidirectional": True, "prefix": behind or prefix_BS[b, s]}[options.kind]
            if segments[b, s] != segments[b, t] or not reached:
                continue
            score = float(q[b, t, n] @ k[b, s, n // 2]) * (options.scale or 8**-0.5)
            score = options.softcap * math.tanh(score / options.softcap) if options.softcap else score
            score -= float(SLOPES[n]) * abs(t - s) if terms.slopes_N is not None else 0.0
            exps.append(math.exp(score))
            values.append(v[b, s, n // 2])
        total = sum(exps) + (math.exp(float(SINKS[n])) if terms.sinks_N is not None else 0.0)
        np.testing.assert_allclose(out[b, t, n], np.asarray(exps) @ np.asarray(values) / total, rtol=1e-4, atol=1e-5)


def test_blocks_cover_the_sequence_and_stay_few() -> None:
    for T in (1, 127, 128, 512, 1000, 1024, 8192):
        blocks = list(xla._blocks(T, T, Options()))
        queries = [block.queries for block in blocks]
        assert queries[0].start == 0 and queries[-1].stop == T and len(blocks) <= xla.MAX_BLOCKS
        assert all(a.stop == b.start for a, b in zip(queries, queries[1:], strict=False))
        assert all(block.keys == slice(0, block.queries.stop) for block in blocks)


def test_keys_before_the_window_are_never_read() -> None:
    last = list(xla._blocks(8192, 8192, Options(window=512)))[-1]
    assert last.keys == slice(7 * 1024 - 511, 8192)


def test_a_cache_is_left_to_others() -> None:
    arrays, segments_BT = packed_inputs(0, T=8, N=2, K=2)
    with pytest.raises(NotImplementedError):
        xla.attention(**arrays, q_segment_ids_BT=segments_BT, kv_segment_ids_BS=segments_BT, q_offset=jnp.int32(0))
