"""Attention in causal blocks against the plain reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjax.kernels.attention import reference, xla


def packed_inputs(seed: int, *, T: int, N: int, K: int, H: int) -> tuple[dict[str, jax.Array], jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 4)
    arrays = {name: jax.random.normal(key, (2, T, heads, H)) for name, key, heads in
              zip(("q_BTNH", "k_BSKH", "v_BSKH"), keys[:3], (N, K, K), strict=True)}  # fmt: skip
    ends = jax.random.bernoulli(keys[3], 3 / T, (2, T))
    return arrays, jnp.cumsum(ends, axis=1).astype(jnp.int32)


@settings(max_examples=12, deadline=None)
@given(T=st.sampled_from([1, 5, 128, 256, 384]), heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]),
       seed=st.integers(0, 99))
def test_values_and_gradients_equal_the_reference(T: int, heads: tuple[int, int], seed: int) -> None:
    arrays, segments_BT = packed_inputs(seed, T=T, N=heads[0], K=heads[1], H=8)
    weight = jax.random.normal(jax.random.key(seed + 1), arrays["q_BTNH"].shape)

    def scalar(module: object, arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out = module.attention(**arrays, q_segment_ids_BT=segments_BT, kv_segment_ids_BS=segments_BT)
        return jnp.sum(out * weight), out

    (_, ours), grads = jax.value_and_grad(lambda a: scalar(xla, a), has_aux=True)(arrays)
    (_, plain), plain_grads = jax.value_and_grad(lambda a: scalar(reference, a), has_aux=True)(arrays)
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, plain_grads[name], rtol=1e-3, atol=2e-5, err_msg=name)


def test_blocks_cover_the_sequence_and_stay_few() -> None:
    for T in (1, 127, 128, 512, 1000, 1024, 8192):
        blocks = list(xla._blocks(T))
        assert blocks[0].start == 0 and blocks[-1].stop == T and len(blocks) <= xla.MAX_BLOCKS
        assert all(a.stop == b.start for a, b in zip(blocks, blocks[1:], strict=False))


def test_a_cache_is_left_to_others() -> None:
    arrays, segments_BT = packed_inputs(0, T=8, N=2, K=2, H=8)
    with pytest.raises(NotImplementedError):
        xla.attention(**arrays, q_segment_ids_BT=segments_BT, kv_segment_ids_BS=segments_BT, q_offset=jnp.int32(0))
