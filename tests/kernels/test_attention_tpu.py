"""The TPU attention kernels, interpreted on the CPU, against the plain reference: values and gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl

from llmjax.kernels.attention import pallas_tpu, reference, tpu_tiles
from llmjax.kernels.attention.options import CAUSAL, Options, Terms

SLOPES, SINKS = jnp.asarray([0.5, 0.25, 0.1, 0.0]), jnp.asarray([0.3, -1.0, 2.0, 0.0])


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention: shapes, options and how long its documents are."""

    T: int = 384
    S: int = 0  # keys; 0: as many as queries, which then end where the keys end
    N: int = 4
    K: int = 2
    H: int = 16
    W: int = 16
    options: Options = CAUSAL
    alibi: bool = False
    sinks: bool = False
    documents: float = 3.0  # a row, on average; 0: one
    shuffled: bool = False  # segment ids in no order


CASES = {
    "packed": Case(),
    "one document, runs of tiles without a mask": Case(T=640, documents=0, alibi=True, sinks=True, W=8),
    "single tokens, one key-value head": Case(K=1, documents=1000),
    "window, softcap, odd length": Case(T=300, K=4, options=Options(window=60, softcap=1.5, scale=0.3), sinks=True),
    "prefix": Case(T=300, options=Options(kind="prefix")),
    "both ways, ids in no order": Case(T=260, options=Options(kind="bidirectional", softcap=2.0), alibi=True,
                                       shuffled=True),
    "later queries on a longer cache": Case(T=140, S=520, documents=1),
}  # fmt: skip


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run as plain jax, with blocks as small as they come and three chunks of keys for the larger cases."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(tpu_tiles, "BLOCK", 128)


def inputs(case: Case, seed: int) -> tuple[list[jax.Array], dict, Terms]:
    num_keys = case.S or case.T
    keys = jax.random.split(jax.random.key(seed), 6)
    shapes = ((case.T, case.N, case.H), (num_keys, case.K, case.H), (num_keys, case.K, case.W))
    arrays = [jax.random.normal(key, (2, *shape)) for key, shape in zip(keys, shapes, strict=False)]
    ids = jnp.cumsum(jax.random.bernoulli(keys[3], min(1.0, case.documents / num_keys), (2, num_keys)), axis=1)
    if case.shuffled:
        ids = jax.random.randint(keys[3], (2, num_keys), 0, 3)
    offset = num_keys - case.T
    prefix = jax.random.bernoulli(keys[4], 0.2, (2, num_keys)) if case.options.kind == "prefix" else None
    terms = Terms(SLOPES[:case.N] if case.alibi else None, SINKS[:case.N] if case.sinks else None, prefix)
    told = {"q_segment_ids_BT": ids[:, offset:], "kv_segment_ids_BS": ids, "q_offset": offset, "options": case.options}
    return arrays, told, terms


def assert_like_the_reference(case: Case, seed: int = 0) -> None:
    """Values and gradients, of the sinks as well."""
    arrays, told, terms = inputs(case, seed)
    weight = jax.random.normal(jax.random.key(seed + 1), (2, case.T, case.N, case.W))

    def scalar(module: object, arrays: list[jax.Array], sinks_N: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        out = module.attention(*arrays, **told, terms=dataclasses.replace(terms, sinks_N=sinks_N))
        return jnp.sum(out * weight), out

    def run(module: object) -> list[jax.Array]:
        pulled = jax.jit(jax.value_and_grad(functools.partial(scalar, module), argnums=(0, 1), has_aux=True))
        (_, out), grads = pulled(arrays, terms.sinks_N)
        return [out, *jax.tree.leaves(grads)]

    for ours, plain in zip(run(pallas_tpu), run(reference), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(plain).max())))


SLOW = {"single tokens, one key-value head", "both ways, ids in no order", "later queries on a longer cache"}


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_values_and_gradients_equal_the_reference(case: str) -> None:
    assert_like_the_reference(CASES[case])


def test_keys_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit into vector memory at once: statistics are carried on, derivatives of queries added."""
    monkeypatch.setattr(tpu_tiles, "DEFAULT_VMEM", tpu_tiles.TILE_BYTES + 300 * pallas_tpu.bytes_per_key(16, 16, 4))
    assert tpu_tiles.choose_tiling(640, 640, bytes_per_key=pallas_tpu.bytes_per_key(16, 16, 4)).chunk == 256
    assert_like_the_reference(Case(T=640, N=2, K=1, documents=2, sinks=True))


cases = st.builds(
    Case, T=st.integers(16, 400), S=st.sampled_from([0, 0, 401, 640]), N=st.just(4), K=st.sampled_from([1, 2, 4]),
    H=st.sampled_from([8, 24]), W=st.sampled_from([8, 16]),
    options=st.builds(Options, kind=st.sampled_from(["causal", "bidirectional", "prefix"]),
                      window=st.sampled_from([0, 1, 50, 200]), softcap=st.sampled_from([0.0, 1.5]),
                      scale=st.sampled_from([0.0, 0.4])),
    alibi=st.booleans(), sinks=st.booleans(), documents=st.sampled_from([0.0, 2.0, 8.0, 1e6]), shuffled=st.booleans(),
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases, seed=st.integers(0, 1000))
def test_any_options_and_sizes(case: Case, seed: int) -> None:
    assert_like_the_reference(case, seed)


def test_queries_that_see_nothing_give_zeros() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 140, 2, 8)) for i in range(3))
    ids = jnp.where(jnp.arange(140) < 70, 1, 5)[None]
    told = {"q_segment_ids_BT": ids, "kv_segment_ids_BS": jnp.full_like(ids, 5)}
    out, pull = jax.vjp(lambda q, k, v: pallas_tpu.attention(q, k, v, **told), q, k, v)
    assert not np.any(out[:, :70]) and np.all(np.isfinite(out))
    np.testing.assert_allclose(out, reference.attention(q, k, v, **told), atol=1e-5)
    dq, dk, dv = pull(jnp.ones_like(out))
    assert not np.any(dq[:, :70]) and all(np.all(np.isfinite(x)) for x in (dk, dv))


def visited(segments_BT: jax.Array, options: Options = CAUSAL) -> np.ndarray:
    """Tiles that the kernels loop over: (without a mask, with one)."""
    T = segments_BT.shape[1]
    tiling = tpu_tiles.Tiling(128, 128, T)
    slots = tpu_tiles.make_slots(segments_BT, segments_BT, q_offset=0, tiling=tiling, options=options, terms=Terms())
    tiles = np.asarray(slots.tiles).reshape(tpu_tiles.Tile.FIELDS, -1)
    return np.asarray([2 * tiles[tpu_tiles.Tile.PAIRS].sum(), tiles[tpu_tiles.Tile.MASKED].sum()])


def test_tiles_between_documents_are_not_visited() -> None:
    T = 4096
    unpacked, quarters = (visited(jnp.repeat(jnp.arange(n), T // n)[None]) for n in (1, 4))
    assert unpacked.sum() == 32 * 33 / 2 and unpacked[1] <= 32 + 16  # the diagonal, and an odd one before it
    assert quarters.sum() == 4 * 8 * 9 / 2 <= 0.5 * unpacked.sum()
    assert visited(jnp.arange(T)[None]).sum() == 32
    assert visited(jnp.zeros((1, T), jnp.int32), Options(window=256)).sum() == 32 * 3 - 3


def test_the_kernel_visits_what_its_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where it runs: scores of a tile are products, and so are its values."""
    trips: list[int] = []
    from llmjax.kernels.attention import tpu_forward

    product = tpu_forward.product

    def counted(a: jax.Array, b: jax.Array, order: str) -> jax.Array:
        if order == "nn":  # one a tile
            jax.debug.callback(lambda: trips.append(1))
        return product(a, b, order)

    monkeypatch.setattr(tpu_forward, "product", counted)
    x = jax.random.normal(jax.random.key(0), (1, 1024, 1, 8))
    for documents in (1, 4):
        ids = jnp.repeat(jnp.arange(documents), 1024 // documents)[None]
        trips.clear()
        pallas_tpu.attention(x, x, x, q_segment_ids_BT=ids, kv_segment_ids_BS=ids).block_until_ready()
        jax.effects_barrier()
        assert len(trips) == visited(ids).sum() == {1: 36, 4: 12}[documents]


def test_what_it_does_not_take_is_left_to_others() -> None:
    arrays, told, _ = inputs(Case(T=32), 0)
    with pytest.raises(NotImplementedError):
        pallas_tpu.attention(*arrays, **told, terms=Terms(bias_NR=jnp.zeros((4, 63))))
    with pytest.raises(NotImplementedError):
        pallas_tpu.attention(arrays[0][:, :1], *arrays[1:], **(told | {"q_segment_ids_BT": jnp.zeros((2, 1), int)}))
