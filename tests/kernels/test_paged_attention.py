"""Paged attention, on any platform and as the interpreted TPU kernel, against the plain reference."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmjax.kernels.attention.options import CAUSAL, Options
from llmjax.kernels.paged_attention import pages as paging
from llmjax.kernels.paged_attention import pallas_tpu, reference, tpu_plan, units, xla
from llmjax.kernels.paged_attention.pages import Pages, RowParts, Sequences


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch: how many tokens each sequence brings, and how many it had before."""

    new: tuple[int, ...]
    before: tuple[int, ...]
    N: int = 4
    K: int = 2
    H: int = 16
    W: int = 16
    L: int = 128
    dtype: str = "float32"
    options: Options = CAUSAL
    sinks: bool = False
    latent: bool = False
    loose: int = 0  # tokens of no sequence

    @property
    def parts(self) -> RowParts:
        return RowParts.of(self.width, key_dim=self.H, value_dim=self.W)

    @property
    def width(self) -> int:
        """Of a row; a latent's has a zero behind it, as one that is filled up to whole registers has."""
        return self.H + (1 if self.latent else self.W)


CASES = {
    "decoding, one key-value head": Case((1, 1, 1), (0, 299, 511), K=1),
    "decoding and chunks, empty sequences": Case((1, 0, 7, 1, 20), (0, 0, 293, 399, 380), loose=3),
    "window, softcap, sinks": Case((1, 5, 1), (400, 290, 3), options=Options(window=100, softcap=2.0, scale=0.3),
                                   sinks=True),
    "latent": Case((1, 9, 0), (6, 291, 17), K=1, H=24, latent=True, options=Options(scale=0.3)),
    "int8": Case((1, 9), (6, 291), dtype="int8"),
    "latent, int8": Case((1, 9), (6, 291), K=1, H=24, latent=True, dtype="int8"),
    "fp8": Case((1, 9), (6, 291), dtype="float8_e4m3fn"),
    "nothing to do": Case((0, 0), (0, 50), loose=2),
    "no token": Case((0,), (0,)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arrays of a case."""

    q_TNH: jax.Array
    pages: Pages
    sequences: Sequences
    rows_TKC: jax.Array
    sinks_N: jax.Array | None


jax.tree_util.register_dataclass(Batch, [field.name for field in dataclasses.fields(Batch)], [])


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel as plain jax, a few pages and rows at a time, for two cores."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(pallas_tpu, "SLOTS", {"decode": 256, "chunk": 256})
    monkeypatch.setattr(pallas_tpu, "ROWS", 8)


def batch(case: Case, seed: int = 0) -> Batch:
    """Every row but those of the new tokens is there; pages that no sequence owns hold numbers as well."""
    rng, total = np.random.default_rng(seed), [b + n for b, n in zip(case.before, case.new, strict=True)]
    num_pages = max(1, max(-(-length // case.L) for length in total))
    num_tokens, cache_pages = sum(case.new) + case.loose, num_pages * len(case.new) + 2
    table = rng.permutation(cache_pages)[:num_pages * len(case.new)].reshape(len(case.new), -1)
    sequences = Sequences(*(jnp.asarray(x, jnp.int32) for x in (np.cumsum([0, *case.new]), total, table)))
    rows = jnp.asarray(rng.normal(size=(cache_pages, case.K, case.L, case.width)), jnp.float32)
    pages = Pages(rows)
    if case.dtype != "float32":
        scales = jnp.asarray(rng.uniform(0.005, 0.02, (cache_pages, case.K, 2, case.L)), jnp.float32)
        scales = scales.at[:, :, 1].set(scales[:, :, 0]) if case.latent else scales
        pages = Pages(paging.rounded(rows * 40, jnp.dtype(case.dtype)), scales)
    q_TNH, rows_TKC = (jnp.asarray(rng.normal(size=(num_tokens, *shape)), jnp.float32)
                       for shape in ((case.N, case.H), (case.K, case.width)))
    sinks_N = jnp.asarray(rng.normal(size=case.N), jnp.float32) if case.sinks else None
    return Batch(q_TNH, pages, sequences, rows_TKC, sinks_N)


def run(module: ModuleType, case: Case, given_batch: Batch) -> jax.Array:
    def attend(given_batch: Batch) -> jax.Array:
        pages = paging.append(given_batch.pages, given_batch.rows_TKC, given_batch.sequences, parts=case.parts)
        return module.paged_attention(given_batch.q_TNH, pages, given_batch.sequences, max_queries=max(1, *case.new),
                                      value_dim=case.W, options=case.options, sinks_N=given_batch.sinks_N)

    return jax.jit(attend)(given_batch)


def assert_like_the_reference(module: ModuleType, case: Case, seed: int = 0) -> None:
    inputs = batch(case, seed)
    ours, plain = run(module, case, inputs), run(reference, case, inputs)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(plain).max(initial=0.0))))
    assert not np.any(ours[sum(case.new):])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_any_platform_equals_the_reference(case: Case) -> None:
    assert_like_the_reference(xla, case)


SLOW = {"latent, int8", "fp8", "decoding, one key-value head"}


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_the_tpu_kernel_equals_the_reference(case: str, interpreted: None) -> None:
    assert_like_the_reference(pallas_tpu, CASES[case])


counts = st.lists(st.tuples(st.sampled_from([0, 1, 1, 2, 5, 17]), st.integers(0, 500)), min_size=1, max_size=5)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    new, before = zip(*draw(counts), strict=True)
    latent, options = draw(st.booleans()), st.builds(Options, window=st.sampled_from([0, 1, 100, 300]),
                                                      softcap=st.sampled_from([0.0, 1.5]))
    return Case(new, before, N=4, K=1 if latent else draw(st.sampled_from([1, 2, 4])), H=24, W=16, latent=latent,
                dtype=draw(st.sampled_from(["float32", "int8", "float8_e4m3fn"])), options=draw(options),
                sinks=draw(st.booleans()), loose=draw(st.integers(0, 3)))


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), seed=st.integers(0, 1000))
def test_any_batch(case: Case, seed: int, interpreted: None) -> None:
    assert_like_the_reference(pallas_tpu, case, seed)
    assert_like_the_reference(xla, case, seed)


@pytest.mark.slow
def test_copies_do_not_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies and semaphores simulated, memory that nobody wrote full of NaN."""
    monkeypatch.setattr(pallas_tpu, "SLOTS", {"decode": 256, "chunk": 256})
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
        assert_like_the_reference(pallas_tpu, Case((1, 1, 3), (140, 300, 20)))
    assert not interpret_pallas_call.races.races_found


def plan(case: Case, *, window: int) -> tuple[tpu_plan.Steps, Sequences]:
    """Of sequences that decode."""
    sequences, blocks = batch(case).sequences, tpu_plan.Blocks(1, pages=2, slots=case.L, cores=2)

    @jax.jit
    def make() -> tuple[jax.Array, ...]:
        made = units.make_units(sequences, chosen_B=jnp.full(len(case.new), True), num_tokens=sum(case.new), queries=1,
                                multiple=2)
        steps = tpu_plan.make_steps(made, sequences, blocks=blocks, window=window)
        return steps.unit_DM, steps.block_DM, steps.page_DMF, steps.position_U, steps.count_D

    return tpu_plan.Steps(*make()), sequences


@pytest.mark.parametrize("window", [0, 100])
def test_only_pages_that_are_seen_are_fetched_and_each_core_has_its_share(window: int) -> None:
    case = Case((1, 1, 1, 1), (511, 30, 300, 511), L=128)
    steps, sequences = plan(case, window=window)
    fetched = [page for core in np.asarray(steps.page_DMF) for place in core.T
               for page in place[np.append(True, np.diff(place) != 0)]]
    lengths = np.asarray(sequences.lengths_B)
    first = np.maximum(lengths - window, 0) // 128 if window else np.zeros(4, int)
    seen = {int(sequences.pages_BP[b, p]) for b in range(4) for p in range(first[b], -(-lengths[b] // 128))}
    assert seen <= set(fetched) and len(fetched) <= len(seen) + 4  # a place may begin with a page that nobody needs
    assert int(steps.count_D.sum()) == sum(-(-length // 256) - first[b] // 2 for b, length in enumerate(lengths))
    assert int(jnp.abs(steps.count_D[0] - steps.count_D[1])) <= 1


def test_rounding_to_eight_bits_errs_by_half_a_step() -> None:
    case = Case((3, 2), (5, 100), dtype="int8")
    inputs = batch(case)
    pages = paging.append(inputs.pages, inputs.rows_TKC, inputs.sequences, parts=case.parts)
    rows_SKC = paging.gather(pages, inputs.sequences.pages_BP[0], parts=case.parts)
    new_TKC = inputs.rows_TKC[:3]
    step = jnp.max(jnp.abs(new_TKC[..., :case.H]), axis=-1) / 127
    error = jnp.max(jnp.abs(rows_SKC[5:8] - new_TKC)[..., :case.H], axis=-1)
    assert np.all(error <= 0.5001 * step) and float(error.max()) > 0
    untouched = paging.gather(inputs.pages, inputs.sequences.pages_BP[0], parts=case.parts)
    np.testing.assert_array_equal(rows_SKC[:5], untouched[:5])


def test_pages_of_other_sizes_are_left_to_others() -> None:
    with pytest.raises(NotImplementedError):
        run(pallas_tpu, case := Case((1,), (20,), L=16), batch(case))
    assert_like_the_reference(xla, Case((1, 20), (20, 3), L=16))
