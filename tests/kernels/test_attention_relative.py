"""Biases by distance, and queries of one sequence on the keys of another: definition, blocks against the reference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.kernels.attention import reference, xla
from llmjax.kernels.attention.options import Options, Terms
from llmjax.kernels.attention.relative import distances, spread

CASES = {
    "causal": (Options(), 256, 256),
    "bidirectional, a scale": (Options(kind="bidirectional", scale=1.0), 256, 256),
    "more keys than queries": (Options(kind="bidirectional"), 128, 300),
    "more queries than keys, a softcap": (Options(kind="bidirectional", softcap=2.0), 384, 100),
}


@pytest.mark.parametrize(("queries", "keys"), [(slice(0, 5), slice(0, 7)), (slice(3, 5), slice(2, 7)),
                                               (slice(0, 1), slice(0, 7)), (slice(2, 5), slice(0, 1))])  # fmt: skip
def test_a_bias_stands_where_its_distance_is(queries: slice, keys: slice) -> None:
    T, S = 5, 7
    place = {int(distance): place for place, distance in enumerate(distances(T, S))}
    bias_NR = jnp.arange(2 * (T + S), dtype=jnp.float32).reshape(2, T + S)
    expected = [[[bias_NR[n, place[s - t]] for s in range(keys.start, keys.stop)]
                 for t in range(queries.start, queries.stop)] for n in range(2)]
    assert np.array_equal(spread(bias_NR, queries=queries, keys=keys), expected)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_reference(case: str) -> None:
    options, T, S = CASES[case]
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = [jax.random.normal(key, shape) for key, shape in
              zip(keys[:4], ((2, T, 4, 8), (2, S, 2, 8), (2, S, 2, 6), (4, T + S)), strict=True)]
    q_segments_BT, kv_segments_BS = (jnp.arange(size)[None] * 3 // size + jnp.ones((2, 1), jnp.int32)
                                     for size in (T, S))  # fmt: skip

    @functools.partial(jax.jit, static_argnums=0)
    def run(module: object, arrays: list[jax.Array]) -> tuple:
        def scalar(arrays: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
            q, k, v, bias = arrays
            out = module.attention(q, k, v, q_segment_ids_BT=q_segments_BT, kv_segment_ids_BS=kv_segments_BS,
                                   options=options, terms=Terms(bias_NR=bias))
            return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

        return jax.value_and_grad(scalar, has_aux=True)(arrays)

    ((_, ours), grads), ((_, plain), plain_grads) = (run(module, arrays) for module in (xla, reference))
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)
    for grad, expected in zip(grads, plain_grads, strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=3e-5)
    assert np.abs(plain_grads[3]).max() > 0.1


def test_the_reference_adds_the_bias_to_the_scores() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 6, 1, 4)) for i in range(3))
    bias_NR = jax.random.normal(jax.random.key(3), (1, 12))
    ones_BT = jnp.ones((1, 6), jnp.int32)
    out = reference.attention(q, k, v, q_segment_ids_BT=ones_BT, kv_segment_ids_BS=ones_BT,
                              options=Options(scale=1.0), terms=Terms(bias_NR=bias_NR))
    for t in range(6):
        scores = jnp.stack([q[0, t, 0] @ k[0, s, 0] + bias_NR[0, s - t] for s in range(t + 1)])
        np.testing.assert_allclose(out[0, t, 0], jax.nn.softmax(scores) @ v[0, : t + 1, 0], rtol=1e-4, atol=1e-5)
