"""The packed, chunked scorer against a forward pass for every single token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmjax.evals import score
from tests.evals.tiny import brute_force, tiny_model


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def random_ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 260, length).astype(np.int32)


@given(length=st.integers(1, 200), seq_len=st.integers(1, 50), data=st.data())
def test_windows_score_every_token_once_with_the_promised_context(length, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    ids = np.arange(length)  # a token's value is its place
    seen = []
    for number, window in enumerate(score.windows(ids, seq_len=seq_len, stride=stride)):
        scored, given_before = window.ids[-window.num_scored:], window.ids[:-window.num_scored]
        assert np.array_equal(window.ids, np.arange(window.ids[0], window.ids[0] + len(window.ids)))
        assert len(window.ids) - 1 <= seq_len and len(given_before) >= 1
        if number:
            assert len(scored) <= stride and len(window.ids) - 1 == seq_len
        seen += scored.tolist()
    assert seen == list(range(1, length))


@pytest.mark.parametrize("stride", [0, 9])
def test_windows_refuse_a_stride_that_leaves_gaps(stride):
    with pytest.raises(ValueError, match="stride"):
        score.windows(random_ids(20), seq_len=8, stride=stride)


@pytest.mark.parametrize("tokens_a_batch", [64, 1000])
@pytest.mark.parametrize("chunk_logits", [2**23, 260 * 40])
def test_scores_equal_brute_force(tiny, monkeypatch, tokens_a_batch, chunk_logits):
    monkeypatch.setattr(score, "LOGITS_A_CHUNK", chunk_logits)
    model, params = tiny
    lengths = [2, 5, 17, 48, 49, 3, 30, 30]
    spans = [score.Span(random_ids(n, seed=n), max(1, n // 2)) for n in lengths]
    scores = score.score(model, params, spans, seq_len=48, tokens_a_batch=tokens_a_batch)
    for span, scored in zip(spans, scores, strict=True):
        logprobs = brute_force(model, params, span.ids[:-1])
        expected = logprobs[np.arange(len(span.ids) - 1), span.ids[1:]][-span.num_scored:]
        np.testing.assert_allclose(scored.logprobs, expected, atol=2e-5)
        best = logprobs.argmax(1)[-span.num_scored:]
        np.testing.assert_array_equal(scored.greedy, best == span.ids[-span.num_scored:])
        assert scored.total == pytest.approx(expected.sum(), abs=1e-3)


def test_greedy_is_seen(tiny):
    model, params = tiny
    ids = random_ids(10)
    best = int(brute_force(model, params, ids)[-1].argmax())
    right, wrong = score.score(model, params, [score.Span(np.append(ids, best), 1),
                                               score.Span(np.append(ids, (best + 1) % 260), 1)], seq_len=32)
    assert right.greedy.all() and not wrong.greedy.any()


def test_one_compilation_whatever_the_batches(tiny):
    score._score_rows.clear_cache()
    told = []
    for longest in (40, 60):  # both need rows of 64
        score.score(*tiny, [score.Span(random_ids(n), 1) for n in range(2, longest)], seq_len=64, tokens_a_batch=64,
                    on_batch=lambda done, total: told.append((done, total)))
    assert score._score_rows._cache_size() == 1
    assert told[0][0] == 0 and told[-1] == (told[-1][1], told[-1][1]) and told[0][1] > 5


def test_neighbours_in_a_row_change_nothing(tiny):
    model, params = tiny
    spans = [score.Span(random_ids(n, seed=n), n - 1) for n in (9, 11, 8)]
    other = [spans[0], score.Span(random_ids(11, seed=99), 10), spans[2]]
    first, second = (score.score(model, params, s, seq_len=64) for s in (spans, other))
    for mine, theirs in zip(first[::2], second[::2], strict=True):
        np.testing.assert_array_equal(mine.logprobs, theirs.logprobs)


@pytest.mark.parametrize(("length", "num_scored"), [(50, 3), (5, 5), (5, 0)])
def test_impossible_spans_are_refused(tiny, length, num_scored):
    with pytest.raises(ValueError, match="span"):
        score.score(*tiny, [score.Span(random_ids(length), num_scored)], seq_len=48)


def test_no_spans_no_scores(tiny):
    assert score.score(*tiny, [], seq_len=8) == []
