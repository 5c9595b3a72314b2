"""Batches hold the plan's rows, alike from any start and on any number of processes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmjax.core.errors import ConfigError, RunError
from llmjax.data.loader import PackedRows, Shuffled, serve
from llmjax.data.order import rows_at
from llmjax.data.pack import pack_plan
from llmjax.data.shards import Document, TokenStore, write_store

SEQ_LEN = 32


def make_store(folder: Path, *, lengths: list[int], masked: bool = False) -> TokenStore:
    """Document i holds tokens i * 1000, i * 1000 + 1, ...; so a token tells where it came from."""
    def documents():
        for i, n in enumerate(lengths):
            yield Document(i.to_bytes(16, "little"), np.arange(n) + 1000 * i, np.arange(n) % 3 == 0 if masked else None)

    write_store(folder, documents(), vocab_size=1000 * len(lengths), shard_tokens=100)
    return TokenStore.open(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    lengths = np.random.default_rng(0).integers(1, 90, 40).tolist()
    return make_store(tmp_path_factory.mktemp("loader") / "shards", lengths=lengths)


def read(store, count, *, batch_size, seed, **options):
    plan = pack_plan(store.lengths, seq_len=SEQ_LEN, seed=0)
    return list(itertools.islice(serve(Shuffled(PackedRows(store, plan), batch_size, seed), **options), count))


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], strict=True)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_against_a_plain_loop(tmp_path, masked):
    store = make_store(tmp_path / "s", lengths=[5, 80, 2, 17, 1, 33, 9], masked=masked)
    plan = pack_plan(store.lengths, seq_len=SEQ_LEN, seed=3)
    batch = PackedRows(store, plan).read(np.arange(plan.num_rows))
    for row in range(plan.num_rows):
        at = 0
        for number, segment in enumerate(range(plan.row_starts[row], plan.row_starts[row + 1]), start=1):
            document, start, length = (int(x[segment]) for x in (plan.documents, plan.starts, plan.lengths))
            for i in range(length):
                assert batch["tokens_BT"][row, at] == 1000 * document + start + i
                assert batch["targets_BT"][row, at] == 1000 * document + start + i + 1
                assert batch["positions_BT"][row, at] == i
                assert batch["segment_ids_BT"][row, at] == number
                assert batch["weights_BT"][row, at] == (1 if not masked else (start + i + 1) % 3 == 0)
                at += 1
        assert all((batch[name][row, at:] == 0).all() for name in batch)
    assert {name: str(array.dtype) for name, array in batch.items()} == {
        "tokens_BT": "int32", "targets_BT": "int32", "positions_BT": "int32", "segment_ids_BT": "int32",
        "weights_BT": "float32"}


def test_an_epoch_makes_every_prediction_once(store):
    plan = pack_plan(store.lengths, seq_len=SEQ_LEN, seed=0)
    epoch = itertools.islice(serve(Shuffled(PackedRows(store, plan), batch_size=1, seed=5)), plan.num_rows)
    targets = np.concatenate([batch["targets_BT"][batch["segment_ids_BT"] > 0] for batch in epoch])
    wanted = np.concatenate([np.arange(1, n) + 1000 * i for i, n in enumerate(store.lengths)])
    np.testing.assert_array_equal(np.sort(targets), wanted)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, 30), processes=st.sampled_from([1, 2, 4]), seed=st.integers(0, 3))
def test_any_start_and_any_process_count_give_the_same_rows(store, start, processes, seed):
    whole = read(store, 4, batch_size=4, seed=seed, start_step=start)
    shares = [read(store, 4, batch_size=4, seed=seed, start_step=start, process_index=p, process_count=processes)
              for p in range(processes)]
    for step in range(4):
        joined = {name: np.concatenate([share[step][name] for share in shares]) for name in whole[step]}
        assert_equal(joined, whole[step])
    assert_equal(read(store, start + 1, batch_size=4, seed=seed)[start], whole[0])


@settings(max_examples=30, deadline=None)
@given(num_rows=st.integers(1, 50), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_every_epoch_is_a_permutation(num_rows, seed, epoch):
    rows = rows_at(np.arange(epoch * num_rows, (epoch + 1) * num_rows), num_rows, seed=seed)
    assert sorted(rows) == list(range(num_rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(rows_at(epoch * 30 + np.arange(30), 30, seed=seed)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_batches_are_the_rows_at_their_places(store):
    plan = pack_plan(store.lengths, seq_len=SEQ_LEN, seed=0)
    batch = next(serve(Shuffled(PackedRows(store, plan), batch_size=4, seed=1), start_step=9))
    assert_equal(batch, PackedRows(store, plan).read(rows_at(np.arange(36, 40), plan.num_rows, seed=1)))


def test_far_steps_are_reached_at_once(store):
    batch = read(store, 1, batch_size=4, seed=0, start_step=10**9)[0]
    assert batch["tokens_BT"].shape == (4, SEQ_LEN)


def test_clear_errors(store, tmp_path):
    with pytest.raises(ConfigError, match="data.batch_size=4.*3 processes.*is 6"):
        read(store, 1, batch_size=4, seed=0, process_count=3)
    with pytest.raises(RunError, match="no rows to train on"):
        read(make_store(tmp_path / "s", lengths=[1, 1]), 1, batch_size=4, seed=0)
