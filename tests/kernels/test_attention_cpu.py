"""Attention by our C on the CPU against the plain reference, and what decides that it is taken."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core.mesh import single_device_mesh
from llmjax.kernels.attention import api, cpu, reference
from llmjax.kernels.attention.options import Options, Terms
from llmjax.kernels.cpu import library

pytestmark = pytest.mark.skipif(not library.available(), reason="no C compiler, or a processor it is not written for")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one call; `documents` in each of two rows."""

    T: int = 128
    N: int = 2
    K: int = 2
    H: int = 32
    W: int = 32
    window: int = 0
    documents: int = 3


# Whole and broken blocks of queries, keys and columns; groups; windows within, across and beyond blocks of keys.
SIZES = [Sizes(), Sizes(T=64, N=1, K=1, H=8, W=8), Sizes(T=200, N=4, H=8, W=16), Sizes(T=600, N=3, K=1, window=40),
         Sizes(T=1100, documents=1), Sizes(T=1100, N=4, H=33, W=65, window=700, documents=1),
         Sizes(T=513, N=2, K=1, H=128, W=128, window=1, documents=9)]  # fmt: skip


def inputs(sizes: Sizes, *, seed: int = 0) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Queries, keys and values, the documents, a cotangent."""
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = {"q_BTNH": (sizes.N, sizes.H), "k_BSKH": (sizes.K, sizes.H), "v_BSKW": (sizes.K, sizes.W)}
    arrays = {name: jax.random.normal(key, (2, sizes.T, *shape))
              for key, (name, shape) in zip(keys[:3], shapes.items(), strict=True)}
    starts_BT = jax.random.bernoulli(keys[3], sizes.documents / sizes.T, (2, sizes.T))
    return arrays, jnp.cumsum(starts_BT, axis=1), jax.random.normal(keys[4], (2, sizes.T, sizes.N, sizes.W))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients_equal_the_reference(sizes: Sizes) -> None:
    arrays, ids_BT, cotangent = inputs(sizes)

    def run(module: object, arrays: dict, ids_BT: jax.Array, cotangent: jax.Array) -> tuple:
        def attention(arrays: dict) -> jax.Array:
            return module.attention(**arrays, q_segment_ids_BT=ids_BT, kv_segment_ids_BS=ids_BT,  # type: ignore[attr-defined]
                                    options=Options(window=sizes.window, scale=0.3))

        out, pull = jax.vjp(attention, arrays)
        return out, *pull(cotangent)

    with jax.set_mesh(single_device_mesh()):
        made, plain = (jax.jit(run, static_argnums=0)(module, arrays, ids_BT, cotangent) for module in (cpu, reference))
    for ours, expected in zip(jax.tree.leaves(made), jax.tree.leaves(plain), strict=True):
        # Of a window of one slot all derivatives of queries and keys cancel.
        np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-6 * max(3.0, np.abs(expected).max()))


def attend(arrays: dict, ids_BT: jax.Array) -> np.ndarray:
    with jax.set_mesh(single_device_mesh()):
        return np.asarray(cpu.attention(**arrays, q_segment_ids_BT=ids_BT, kv_segment_ids_BS=ids_BT))


def test_documents_do_not_see_each_other() -> None:
    """To the bit; nor what comes after a query, in its own document."""
    arrays, ids_BT, _ = inputs(Sizes(T=700))
    before, first = attend(arrays, ids_BT), ids_BT[:, :, None, None] == 0
    others = attend({name: jnp.where(first, x, 7 * x + 1) for name, x in arrays.items()}, ids_BT)
    later = attend({name: x.at[:, 650:].multiply(-3) for name, x in arrays.items()}, ids_BT)
    assert first.any() and not first.all()
    assert np.array_equal(np.where(first, before, 0), np.where(first, others, 0))
    assert np.array_equal(before[:, :650], later[:, :650]) and not np.array_equal(before, later)


def test_a_query_whose_document_has_no_keys_gets_zeros() -> None:
    arrays, ids_BT, _ = inputs(Sizes())
    with jax.set_mesh(single_device_mesh()):
        out = cpu.attention(**arrays, q_segment_ids_BT=ids_BT + 100, kv_segment_ids_BS=ids_BT)
    assert not np.asarray(out).any()


@pytest.mark.parametrize("name", ["q_BTNH", "k_BSKH", "v_BSKW"])
def test_what_is_not_a_number_is_not_hidden(name: str) -> None:
    """Neither in the values nor in what follows from them: the guard of a run goes by it."""
    arrays, ids_BT, cotangent = inputs(Sizes(T=600, documents=1))
    arrays |= {name: arrays[name].at[0, 10].set(jnp.nan)}
    with jax.set_mesh(single_device_mesh()):
        out, pull = jax.vjp(lambda arrays: cpu.attention(**arrays, q_segment_ids_BT=jnp.zeros_like(ids_BT),
                                                         kv_segment_ids_BS=jnp.zeros_like(ids_BT)), arrays)
        derivatives = pull(cotangent)[0]
    assert np.isnan(out[0, 10]).all() and not np.isnan(out[1]).any()
    assert not any(np.isnan(leaf[1]).any() for leaf in derivatives.values())
    hit = {made for made, leaf in derivatives.items() if np.isnan(leaf[0]).any()}
    assert hit == set(arrays) - ({"v_BSKW"} if name == "v_BSKW" else set())  # on itself it does not depend


def test_large_scores_stay_finite() -> None:
    arrays, ids_BT, cotangent = inputs(Sizes(T=600))
    arrays |= {"q_BTNH": 1e4 * arrays["q_BTNH"]}
    with jax.set_mesh(single_device_mesh()):
        out, pull = jax.vjp(lambda arrays: cpu.attention(**arrays, q_segment_ids_BT=ids_BT, kv_segment_ids_BS=ids_BT),
                            arrays)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, pull(cotangent))))


def calls(arrays: dict, ids_BT: jax.Array, **kwargs: object) -> int:
    """How often the dispatch calls our kernel."""
    def function(arrays: dict) -> jax.Array:
        return api.attention(**arrays, q_segment_ids_BT=ids_BT, kv_segment_ids_BS=ids_BT, **kwargs)  # type: ignore[arg-type]

    with jax.set_mesh(single_device_mesh()):
        return jax.jit(function).lower(arrays).as_text().count("@llmjax_attention_forward")


def test_what_it_does_not_know_is_left_to_others() -> None:
    arrays, ids_BT, _ = inputs(Sizes())
    assert calls(arrays, ids_BT) == 1
    assert calls({name: x.astype(jnp.bfloat16) for name, x in arrays.items()}, ids_BT) == 0
    assert calls(arrays, ids_BT, options=Options(softcap=30.0)) == 0
    assert calls(arrays, ids_BT, options=Options(kind="bidirectional")) == 0
    assert calls(arrays, ids_BT, terms=Terms(sinks_N=jnp.zeros(2))) == 0
    assert calls(arrays, ids_BT, q_offset=jnp.int32(0)) == 0
    assert calls(inputs(Sizes(T=32))[0], ids_BT[:, :32]) == 0


def test_no_rows_give_no_rows() -> None:
    arrays, ids_BT, _ = inputs(Sizes())
    assert attend({name: x[:0] for name, x in arrays.items()}, ids_BT[:0]).shape == (0, 128, 2, 32)


def test_a_map_over_calls() -> None:
    arrays, ids_BT, _ = inputs(Sizes())
    with jax.set_mesh(single_device_mesh()):
        mapped = jax.vmap(lambda scale: cpu.attention(arrays["q_BTNH"] * scale, arrays["k_BSKH"], arrays["v_BSKW"],
                                                      q_segment_ids_BT=ids_BT, kv_segment_ids_BS=ids_BT))
        made = mapped(jnp.asarray([1.0, 2.0]))
    assert np.array_equal(made[1], attend(arrays | {"q_BTNH": arrays["q_BTNH"] * 2}, ids_BT))
