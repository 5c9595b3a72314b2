"""Mixed and staged streams: nothing lost, nothing twice, alike from any start, on any number of processes."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmjax.core.errors import ConfigError, RunError
from llmjax.core.sections import DataConfig
from llmjax.core.stage_sections import StageConfig, complete
from llmjax.data.curriculum import document_scores
from llmjax.data.interventions import Skip, Timeline, Weights, change_weights, skip_window
from llmjax.data.loader import follow, serve
from llmjax.data.shards import Document, TokenStore, write_store
from llmjax.data.stages import open_stream
from tests.data.corpora import SPACING, make_folder

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LENGTHS = {"books": [200, 33, 90, 2, 61, 150], "code": [17, 18, 5, 40, 33, 21, 9], "wiki": [60, 61, 62, 63, 20, 70]}
PREDICTIONS = {source: sum(n - 1 for n in lengths) for source, lengths in LENGTHS.items()}
ORDER = sorted((place, source) for source, lengths in LENGTHS.items() for place in range(len(lengths)))
DATA = DataConfig(seq_len=32, batch_size=4, shuffle_seed=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("sources"), LENGTHS, loss_gap=np.linspace(1, 0, 19).tolist())


def staged(folder, data, *stages, interventions=()):
    return open_stream(folder, data, complete(stages, data, rope_theta=1e4))(Timeline.of(interventions))


def predictions(stream, steps):
    """How often each prediction, named by its target token, is made in `steps`."""
    made = Counter()
    for step in steps:
        selection = stream.select(step)
        batch = selection.rows.read(selection.numbers)
        made.update(batch["targets_BT"][batch["weights_BT"] > 0].tolist())
    return made


def by_source(made):
    return {source: sum(counts) for source, counts in counts_by_source(made).items()}


def counts_by_source(made):
    """How often each prediction of a source was made; all of them, in the order of the documents."""
    return {source: [made[document * SPACING + i] for place, n in enumerate(lengths)
                     for document in [ORDER.index((place, source))] for i in range(1, n)]
            for source, lengths in LENGTHS.items()}


def rows_by_source(selection):
    """(B,) the source of each row."""
    return np.array([ORDER[row[0] // SPACING][1] for row in selection.rows.read(selection.numbers)["tokens_BT"]])


@QUICK
@given(weights=st.lists(st.integers(1, 9), min_size=3, max_size=3), caps=st.lists(st.integers(1, 3), min_size=3,
       max_size=3), seed=st.integers(0, 5), batch_size=st.integers(1, 5))
def test_to_the_end_of_its_caps_every_prediction_is_made_exactly_so_often(folder, weights, caps, seed, batch_size):
    mixture = ",".join(f"{s}={w}:{c}" for s, w, c in zip(LENGTHS, weights, caps, strict=True))
    data = dataclasses.replace(DATA, mixture=mixture, shuffle_seed=seed, batch_size=batch_size)
    stream = staged(folder, data)
    made: Counter[int] = Counter()
    steps = 0
    with pytest.raises(RunError, match="every source has reached its cap"):
        for steps in itertools.count():
            made += predictions(stream, [steps])
    assert stream.tokens(steps) == by_source(made)
    missing = {s: c * PREDICTIONS[s] - by_source(made)[s] for s, c in zip(LENGTHS, caps, strict=True)}
    assert 0 <= sum(missing.values()) < batch_size * data.seq_len  # the last batch would not have been whole
    for (source, counts), cap in zip(counts_by_source(made).items(), caps, strict=True):
        assert max(counts) <= cap and sum(count < cap for count in counts) == missing[source]


@QUICK
@given(tokens=st.lists(st.integers(1, 700), min_size=2, max_size=3), seq_lens=st.permutations([16, 32, 64, 128]),
       seed=st.integers(0, 3), curriculum=st.sampled_from(["", "length"]))
def test_over_stages_of_any_row_length_an_epoch_ends_before_the_next_begins(folder, tokens, seq_lens, seed, curriculum):
    data = dataclasses.replace(DATA, shuffle_seed=seed, curriculum=curriculum)
    stages = [StageConfig(tokens=n, seq_len=t, mixture=m, batch_size=b)
              for n, t, m, b in zip(tokens, seq_lens, ("code,wiki", "books=2,wiki", "books,code"), (1, 2, 3),
                                    strict=False)]
    stream = staged(folder, data, *stages, StageConfig(tokens=10**6, seq_len=seq_lens[-1], mixture="books,code,wiki"))
    made: Counter[int] = Counter()
    step = 0
    while min(map(max, counts_by_source(made).values())) < 2:  # until what an early stage lost would be missed
        made += predictions(stream, [step])
        step += 1
        for source, counts in counts_by_source(made).items():
            assert max(counts) - min(counts) <= 1, source
    assert stream.tokens(step) == by_source(made)


@QUICK
@given(start=st.integers(0, 30), processes=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 3),
       skips=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)), max_size=2))
def test_any_resume_and_any_process_count_give_the_same_batches(folder, start, processes, seed, skips):
    data = dataclasses.replace(DATA, shuffle_seed=seed, batch_size=8)
    log = (*(Skip(step, step + n, "") for step, n in skips), Weights(4, {"books": 1, "code": 3}, ""))
    stages = (StageConfig(tokens=3000, mixture="books=3,code=1:4"), StageConfig(tokens=4000, seq_len=64, batch_size=16))
    stream = staged(folder, data, *stages, interventions=log)
    again = staged(folder, data, *stages, interventions=log)
    shares = [serve(again, start_step=start, process_index=p, process_count=processes) for p in range(processes)]
    for step in range(start, start + 3):
        selection = stream.select(step)
        whole = selection.rows.read(selection.numbers)
        parts = [next(share) for share in shares]
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_grain_changes_shape_where_a_stage_begins(folder):
    stages = (StageConfig(tokens=4 * 32 * 3), StageConfig(tokens=10**4, seq_len=64, batch_size=2))
    batches = serve(staged(folder, DATA, *stages))
    assert [next(batches)["tokens_BT"].shape for _ in range(5)] == [(4, 32)] * 3 + [(2, 64)] * 2


def test_weights_are_held_and_natural_ones_are_the_sources_sizes(folder):
    stream = staged(folder, dataclasses.replace(DATA, mixture="books=6,code=1,wiki=3"))
    sources = np.concatenate([rows_by_source(stream.select(step)) for step in range(50)])
    assert np.abs(np.array([np.count_nonzero(sources == s) for s in LENGTHS]) - [120, 20, 60]).max() < 2
    natural, level = (staged(folder, dataclasses.replace(DATA, mixture="books,code,wiki", temperature=t)).tokens(500)
                      for t in (1.0, 1e6))
    sizes = np.array([sum(lengths) for lengths in LENGTHS.values()])
    np.testing.assert_allclose(np.array([*natural.values()]) / sum(natural.values()), sizes / sizes.sum(), rtol=0.15)
    np.testing.assert_allclose(np.array([*level.values()]) / sum(level.values()), 1 / 3, rtol=0.15)


def test_skipped_windows_are_never_served_and_weights_change_at_their_step(folder):
    data = dataclasses.replace(DATA, mixture="books:1,code:1,wiki:1", batch_size=1)
    plain = staged(folder, data)
    rows = [plain.select(step).numbers[0] for step in range(20)]
    skipped = staged(folder, data, interventions=[Skip(5, 8, "")])
    assert [skipped.select(step).numbers[0] for step in range(10)] == rows[:5] + rows[8:13]
    assert sum(skipped.tokens(10).values()) == sum(predictions(skipped, range(10)).values())
    changed = staged(folder, data, interventions=[Weights(6, {"wiki": 1}, "")])
    assert [changed.select(step).numbers[0] for step in range(6)] == rows[:6]
    assert {rows_by_source(changed.select(step))[0] for step in range(6, 12)} == {"wiki"}


def test_what_is_recorded_while_batches_are_read_takes_effect_at_its_step(folder, tmp_path):
    stream = open_stream(folder, dataclasses.replace(DATA, mixture="books,code"), ())
    batches = follow(stream, workdir=tmp_path)
    for _ in range(3):
        next(batches)
    change_weights(tmp_path, step=4, weights={"code": 1}, reason="test")
    skip_window(tmp_path, step=6, until=9, reason="test")
    wanted = stream(Timeline.of((Weights(4, {"code": 1}, ""), Skip(6, 9, ""))))
    for step in range(3, 10):
        selection = wanted.select(step)
        np.testing.assert_array_equal(next(batches)["tokens_BT"], selection.rows.read(selection.numbers)["tokens_BT"])


@pytest.mark.parametrize(("curriculum", "sign"), [("length", 1), ("-length", -1), ("loss_gap", -1)])
def test_curricula_order_documents(tmp_path, curriculum, sign):
    """Documents get longer and their loss gap falls."""
    lengths = list(range(3, 203))
    folder = make_folder(tmp_path, {"only": lengths}, loss_gap=np.linspace(1, 0, 200).tolist())
    stream = staged(folder, dataclasses.replace(DATA, curriculum=curriculum, batch_size=8, seq_len=64))
    means = []
    for steps in (range(10), range(25, 35)):
        tokens = np.array([*predictions(stream, steps)])
        means.append(np.mean(tokens // SPACING))
    assert np.sign(np.round((means[1] - means[0]) / 50)) == sign


def test_rarity_is_the_mean_surprisal(tmp_path):
    documents = [[1, 1, 1, 1], [1, 2], [3, 3, 2]]
    write_store(tmp_path, (Document(bytes(16), np.array(tokens)) for tokens in documents), vocab_size=5, shard_tokens=5)
    share = {token: count / 9 for token, count in Counter(itertools.chain(*documents)).items()}
    wanted = [np.mean([-np.log(share[token]) for token in tokens]) for tokens in documents]
    np.testing.assert_allclose(document_scores("rarity", TokenStore.open(tmp_path), tmp_path), wanted)


def test_far_steps_are_reached_at_once(folder):
    stages = (StageConfig(tokens=10**15, mixture="books=1,code=3"), StageConfig(tokens=10**6))
    assert staged(folder, DATA, *stages).select(10**9).numbers.shape == (4,)


def test_clear_errors(folder):
    for mixture, message in [("bokks=1", "'bokks' is no source of the corpus; it has books, code, wiki"),
                             ("books=x", "'books=x' is not of the form"),
                             ("books=1:0", "'books=1:0' is not of the form"),
                             ("books,books", "books is named twice")]:
        with pytest.raises(ConfigError, match=message):
            staged(folder, dataclasses.replace(DATA, mixture=mixture)).select(0)
    with pytest.raises(ConfigError, match="data.curriculum='mood': one of length, rarity, loss_gap"):
        staged(folder, dataclasses.replace(DATA, curriculum="mood"))
