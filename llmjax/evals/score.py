"""Log-probabilities of given tokens: the one scorer behind bits per byte and the harness.

Spans of different lengths are packed into rows of one fixed shape, kept apart by segment ids, so the model compiles
once and little of the work is padding. Only scored positions reach the output projection.

Letters: B rows, T time, D model width, X = B * T positions, S scored positions (padded to a multiple of C), C chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmjax.core.sections import ModelConfig
from llmjax.core.task import Params
from llmjax.data.pack import pack_plan
from llmjax.models import decoder

TOKENS_A_BATCH = 8192
LOGITS_A_CHUNK = 2**23  # 32 MB of float32 logits at a time, whatever the vocabulary


@dataclasses.dataclass(frozen=True)
class Span:
    """Token ids of which the last `num_scored` are predicted from all before them, at least one."""

    ids: np.ndarray
    num_scored: int


@dataclasses.dataclass(frozen=True)
class SpanScore:
    """Natural log-probability of each scored token, and whether each was the most probable one."""

    logprobs: np.ndarray  # (num_scored,) float32
    greedy: np.ndarray  # (num_scored,) bool

    @property
    def total(self) -> float:
        """Log-probability of the scored tokens together; summed in float64, documents have many tokens."""
        return float(self.logprobs.sum(dtype=np.float64))


@dataclasses.dataclass(frozen=True)
class Rows:
    """One batch: packed inputs, and for each scored position its place in them and its token."""

    tokens_BT: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array
    index_S: jax.Array  # into the B * T positions
    targets_S: jax.Array
    num_scored: jax.Array  # () how many of S are real
    spans: tuple[int, ...]  # whose scored positions follow one another in S


jax.tree_util.register_dataclass(
    Rows, meta_fields=["spans"],
    data_fields=["tokens_BT", "positions_BT", "segment_ids_BT", "index_S", "targets_S", "num_scored"])


def windows(ids: np.ndarray, *, seq_len: int, stride: int) -> list[Span]:
    """Spans that score every token of `ids` but the first exactly once, with at most `seq_len` tokens before each.

    After the first window each one scores `stride` new tokens, the last one what is left, with a full context.
    No windows where there is nothing to score.
    """
    if not 1 <= stride <= seq_len:
        raise ValueError(f"stride {stride} must lie between 1 and the context, {seq_len} tokens")
    last = len(ids) - 1
    end = min(seq_len, last)
    spans = [Span(ids[:end + 1], end)] if end else []
    while end < last:
        step = min(stride, last - end)
        end += step
        spans.append(Span(ids[end - seq_len:end + 1], step))
    return spans


def score(model: decoder.Model, params: Params, spans: Sequence[Span], *, seq_len: int, tokens_a_batch: int = 0,
          on_batch: Callable[[int, int], None] | None = None) -> list[SpanScore]:
    """Score every span, in the order given.

    seq_len: the longest context, tokens; rows are the power of two that the longest span needs, at most this.
    tokens_a_batch: positions in a forward pass, 8192 when 0. on_batch: told (batches done, batches).
    Raises ValueError when a span scores nothing, has no token before its scored ones, or exceeds seq_len.
    """
    if not spans:
        return []
    _check(spans, seq_len)
    longest = max(len(span.ids) - 1 for span in spans)
    row_len = min(seq_len, max(32, 1 << (longest - 1).bit_length()))
    num_rows = max(1, (tokens_a_batch or TOKENS_A_BATCH) // row_len)
    plan = pack_plan(np.array([len(span.ids) for span in spans]), seq_len=row_len, seed=0, method="best_fit")
    packed = [plan.documents[start:end].tolist() for start, end in itertools.pairwise(plan.row_starts)]
    chunk = min(max(32, LOGITS_A_CHUNK // model.config.vocab_size), num_rows * row_len)
    scores: dict[int, SpanScore] = {}
    pending: tuple[tuple[int, ...], tuple[jax.Array, jax.Array]] | None = None
    starts = range(0, len(packed), num_rows)
    for done, start in enumerate(starts):
        rows = make_rows(spans, packed[start:start + num_rows], num_rows=num_rows, row_len=row_len, chunk=chunk)
        arrays = dataclasses.replace(rows, spans=())
        dispatched = (rows.spans, _score_rows(model.config, params, arrays, chunk=chunk))
        if pending:  # read a batch only when the next one is under way
            scores.update(_collect(spans, *pending))
        if on_batch:
            on_batch(done, len(starts))
        pending = dispatched
    assert pending
    scores.update(_collect(spans, *pending))
    if on_batch:
        on_batch(len(starts), len(starts))
    return [scores[i] for i in range(len(spans))]


def make_rows(spans: Sequence[Span], packed: Sequence[Sequence[int]], *, num_rows: int, row_len: int,
              chunk: int) -> Rows:
    """Lay spans out in rows; unused positions have segment id 0, unused rows are empty."""
    tokens_BT, positions_BT, segment_ids_BT = (np.zeros((num_rows, row_len), np.int32) for _ in range(3))
    index, targets, order = [], [], []
    for row, items in enumerate(packed):
        start = 0
        for segment, item in enumerate(items, start=1):
            span, length = spans[item], len(spans[item].ids) - 1
            tokens_BT[row, start:start + length] = span.ids[:-1]
            positions_BT[row, start:start + length] = np.arange(length)
            segment_ids_BT[row, start:start + length] = segment
            start += length
            index.append(np.arange(row * row_len + start - span.num_scored, row * row_len + start))
            targets.append(span.ids[-span.num_scored:])
            order.append(item)
    num_scored = sum(map(len, index))
    padding = np.zeros(-(-num_rows * row_len // chunk) * chunk - num_scored, np.int32)
    return Rows(jnp.asarray(tokens_BT), jnp.asarray(positions_BT), jnp.asarray(segment_ids_BT),
                index_S=jnp.asarray(np.concatenate([*index, padding]), jnp.int32),
                targets_S=jnp.asarray(np.concatenate([*targets, padding]), jnp.int32),
                num_scored=jnp.asarray(num_scored, jnp.int32), spans=tuple(order))


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def _score_rows(config: ModelConfig, params: Params, rows: Rows, *, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Log-probability (S,) of each scored token and whether it is the most probable; zeros beyond the real ones."""
    model = decoder.abstract_model(config)
    hidden_BTD = decoder.forward(model, params, rows.tokens_BT, positions_BT=rows.positions_BT,
                                 segment_ids_BT=rows.segment_ids_BT).hidden_BTD
    hidden_XD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])

    def score_chunk(i: jax.Array, scored: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index_C = lax.dynamic_slice_in_dim(rows.index_S, i * chunk, chunk)
        targets_C = lax.dynamic_slice_in_dim(rows.targets_S, i * chunk, chunk)
        logits_CV = decoder.logits(model, params, hidden_XD[index_C][None])[0]
        target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1)[:, 0]
        logprobs_C = target_C - jax.nn.logsumexp(logits_CV, axis=1)
        greedy_C = jnp.argmax(logits_CV, axis=1) == targets_C
        logprobs_S, greedy_S = scored
        return (lax.dynamic_update_slice_in_dim(logprobs_S, logprobs_C, i * chunk, axis=0),
                lax.dynamic_update_slice_in_dim(greedy_S, greedy_C, i * chunk, axis=0))

    num_chunks = (rows.num_scored + chunk - 1) // chunk
    nothing = (jnp.zeros(rows.index_S.shape, jnp.float32), jnp.zeros(rows.index_S.shape, bool))
    return lax.fori_loop(0, num_chunks, score_chunk, nothing)


def _collect(spans: Sequence[Span], order: Sequence[int],
             scored: tuple[jax.Array, jax.Array]) -> Iterator[tuple[int, SpanScore]]:
    """The scores of a batch's spans, by their index."""
    logprobs, greedy = jax.device_get(scored)
    start = 0
    for item in order:
        end = start + spans[item].num_scored
        yield item, SpanScore(logprobs[start:end], greedy[start:end])
        start = end


def _check(spans: Sequence[Span], seq_len: int) -> None:
    for span in spans:
        if not 1 <= span.num_scored < len(span.ids) <= seq_len + 1:
            raise ValueError(f"a span of {len(span.ids)} tokens cannot score its last {span.num_scored}: at least one "
                             f"must be scored, one must come before it, and the context is {seq_len} tokens")
