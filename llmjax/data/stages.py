"""The stream of a run that mixes sources, goes through stages or follows a curriculum.

Stage k serves slots of its own: places [n * B_k, (n + 1) * B_k) of its mixture, n counted from the first batch of the
stage. Which row stands at a place follows in closed form from the mixture's pieces (mixture.py) and the source's
order (supply.py), and what a stage finds of each source from how many rows the stages before it took.

A stage cuts a skipped window off at its end: rows of the next one are packed from what is left by then.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llmjax.core.errors import ConfigError
from llmjax.core.sections import DataConfig, StageConfig
from llmjax.data.curriculum import document_scores, pack_in_order
from llmjax.data.interventions import Timeline
from llmjax.data.loader import PackedRows, Selection, Shuffled, Stream
from llmjax.data.mixture import Ingredient, Mixture, parse_mixture, source_weights
from llmjax.data.pack import PackPlan, Pieces, Spans, join_plans, next_token_pieces, pack_spans
from llmjax.data.plan_cache import PlanCache
from llmjax.data.shards import TokenStore
from llmjax.data.supply import Left, Supply

Taken = tuple[int, ...]  # rows of one source taken in each of the stages so far


def open_stream(folder: Path, data: DataConfig, stages: Sequence[StageConfig],
                pieces: Callable[[int], Pieces] = next_token_pieces) -> Callable[[Timeline], Stream]:
    """The stream of a run on a data folder, once its interventions are known; `pieces` of rows of some length."""
    store = TokenStore.open(folder / "shards")
    if stages or data.mixture or data.curriculum:
        depot = Depot(read_corpus(folder, store, data), data, run_stages(data, stages), plans=PlanCache.of(folder),
                      pieces=pieces)
        return functools.partial(Staged, depot)
    how = pieces(data.seq_len)
    plan = PlanCache.of(folder).get(
        lambda: pack_spans(how.spans(store.lengths), seq_len=data.seq_len, seed=data.shuffle_seed, how=how),
        store.lengths, how.table, seq_len=data.seq_len, seed=data.shuffle_seed)
    return functools.partial(Shuffled, PackedRows(store, plan), data.batch_size, data.shuffle_seed)


def tokens_by_source(stream: Stream, step: int) -> dict[str, int]:
    """Predictions made of each source in the first `step` steps; nothing for a stream that does not tell them apart."""
    return stream.tokens(step) if isinstance(stream, Staged) else {}


def run_stages(data: DataConfig, stages: Sequence[StageConfig]) -> tuple[StageConfig, ...]:
    """The stages of a run; without any the whole run is one."""
    whole_run = StageConfig(mixture=data.mixture, seq_len=data.seq_len, batch_size=data.batch_size)
    return tuple(stages) or (whole_run,)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A store with the source of each document and, for a curriculum, its score."""

    store: TokenStore
    names: tuple[str, ...]  # of the S sources
    sources: np.ndarray  # (D,) int64 into `names`
    scores: np.ndarray | None  # (D,)

    def tokens(self) -> dict[str, int]:
        """Tokens by source."""
        sums = np.bincount(self.sources, weights=self.store.lengths, minlength=len(self.names))
        return dict(zip(self.names, sums.astype(int).tolist(), strict=True))


def read_corpus(folder: Path, store: TokenStore, data: DataConfig) -> Corpus:
    """The store of a data folder with what documents.parquet says about its documents, in the same order."""
    import pyarrow.parquet as pq

    column = pq.read_table(folder / "documents.parquet", columns=["source"])["source"].combine_chunks()
    encoded = column.dictionary_encode()
    scores = document_scores(data.curriculum, store, folder) if data.curriculum else None
    return Corpus(store, tuple(encoded.dictionary.to_pylist()), encoded.indices.to_numpy().astype(np.int64), scores)


class Depot:
    """Every source's supply in every stage, each packed when it is first asked for; knows nothing of interventions."""

    def __init__(self, corpus: Corpus, data: DataConfig, stages: tuple[StageConfig, ...], *, plans: PlanCache,
                 pieces: Callable[[int], Pieces] = next_token_pieces):
        self.corpus, self.stages, self.seed, self._plans = corpus, stages, data.shuffle_seed, plans
        self.pieces = pieces
        self._temperature = data.temperature
        self.supply = functools.lru_cache(maxsize=None)(self._supply)

    def ingredients(self, stage: int) -> tuple[Ingredient, ...]:
        """What a stage mixes: as it states, else every source by its size. Raises ConfigError for unknown names."""
        stated = parse_mixture(self.stages[stage].mixture, field="data.mixture")
        for ingredient in stated:
            self.check_known(ingredient.source)
        return stated or tuple(Ingredient(name, None, math.inf) for name in self.corpus.names)

    def weights(self, stage: int) -> dict[str, float]:
        """The weights that a stage begins with."""
        return source_weights(self.ingredients(stage), self.corpus.tokens(), temperature=self._temperature)

    def check_known(self, source: str) -> None:
        """Raise ConfigError when the corpus has no such source."""
        if source not in self.corpus.names:
            raise ConfigError(f"data.mixture: {source!r} is no source of the corpus; it has "
                              f"{', '.join(self.corpus.names)}")

    def _supply(self, source: int, before: Taken) -> Supply:
        """The rows of a source in stage number len(before), after what was taken in the stages before it."""
        left = self._left(source, before)
        documents = np.flatnonzero(self.corpus.sources == source)
        how = self.pieces(self.stages[len(before)].seq_len)
        whole = how.spans(self.corpus.store.lengths[documents], documents)
        return Supply(self._pack(left.spans, len(before)), self._pack(whole, len(before)), left.epochs,
                      order="shuffled" if self.corpus.scores is None else "planned", seed=self.seed)

    def _left(self, source: int, before: Taken) -> Left:
        if not before:
            return Left(Spans.of_documents(np.empty(0, np.int64)), 0)
        *earlier, last = before
        return self.supply(source, tuple(earlier)).left(last) if last else self._left(source, tuple(earlier))

    def _pack(self, spans: Spans, stage: int) -> PackPlan:
        seq_len, scores = self.stages[stage].seq_len, self.corpus.scores
        how = self.pieces(seq_len)

        def make() -> PackPlan:
            if scores is None:
                return pack_spans(spans, seq_len=seq_len, seed=self.seed, how=how)
            return pack_in_order(spans, scores, seq_len=seq_len, seed=self.seed)

        return self._plans.get(make, spans.documents, spans.starts, spans.lengths, scores, how.table, seq_len=seq_len,
                               seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run under a timeline."""

    batch_size: int
    first_slot: int  # of the timeline
    sources: tuple[int, ...]  # those that take part
    supplies: tuple[Supply, ...]  # one for each of them
    first_rows: np.ndarray  # where the rows of each begin in `rows`
    mixture: Mixture
    rows: PackedRows

    def taken(self, slot: int) -> np.ndarray:
        """Rows of each source that takes part before `slot`."""
        return self.mixture.taken((slot - self.first_slot) * self.batch_size)

    def tokens(self, slot: int) -> np.ndarray:
        """Predictions of each source that takes part before `slot`."""
        return np.array([supply.tokens(int(taken))
                         for supply, taken in zip(self.supplies, self.taken(slot), strict=True)])

    def next_rows(self, slot: int, source: int) -> Selection:
        """As many rows as a batch has, of one source that takes part: those it gives next from `slot` on."""
        place = self.sources.index(source)
        indices = self.taken(slot)[place] + np.arange(self.batch_size)
        return Selection(self.rows, self.first_rows[place] + self.supplies[place].rows(indices))

    def select(self, slot: int) -> Selection:
        """The rows at the places of a slot."""
        first = (slot - self.first_slot) * self.batch_size
        draw = self.mixture.draw(range(first, first + self.batch_size))
        numbers = np.empty(self.batch_size, np.int64)
        for source in np.unique(draw.sources).tolist():
            here = draw.sources == source
            numbers[here] = self.first_rows[source] + self.supplies[source].rows(draw.indices[here])
        return Selection(self.rows, numbers)


class Staged:
    """A stream of stages under a timeline; a stage is laid out when its first step is asked for."""

    def __init__(self, depot: Depot, timeline: Timeline = Timeline()):  # noqa: B008 (a frozen value)
        self._depot, self._timeline = depot, timeline
        steps = [stage.steps for stage in depot.stages[:-1]]
        self._first_steps = np.cumsum([0, *steps]).tolist()
        self.stage = functools.lru_cache(maxsize=None)(self._stage)

    def select(self, step: int) -> Selection:
        """The batch that the state after `step` steps takes next."""
        return self.stage(self.stage_number(step)).select(self._timeline.slot(step))

    def tokens(self, step: int) -> dict[str, int]:
        """Predictions made of each source in the first `step` steps, exactly; skipped windows are left out."""
        totals = np.zeros(len(self._depot.corpus.names), np.int64)
        for number in range(self.stage_number(max(step - 1, 0)) + 1):
            stage = self.stage(number)
            end = step if number == self.stage_number(step) else min(step, self._first_steps[number + 1])
            for slots in self._timeline.slots(range(self._first_steps[number], end)):
                totals[list(stage.sources)] += stage.tokens(slots.stop) - stage.tokens(slots.start)
        return dict(zip(self._depot.corpus.names, totals.tolist(), strict=True))

    def weights(self, step: int) -> dict[str, float]:
        """What that batch is mixed by: shares of rows by source, without regard to caps."""
        number, slot = self.stage_number(step), self._timeline.slot(step)
        changes = [weights for first, weights in self._timeline.weights if self._first_slot(number) <= first <= slot]
        weights = changes[-1] if changes else self._depot.weights(number)
        return {source: weight / sum(weights.values()) for source, weight in weights.items()}

    def next_rows(self, step: int, source: str) -> Selection:
        """As many rows as that batch has, of one source alone: those it gives next."""
        stage = self.stage(self.stage_number(step))
        return stage.next_rows(self._timeline.slot(step), self._depot.corpus.names.index(source))

    def stage_number(self, step: int) -> int:
        """The stage that a step belongs to."""
        return int(np.searchsorted(self._first_steps, step, side="right")) - 1

    def _first_slot(self, number: int) -> int:
        """The slot after the last one of the stage before."""
        first_step = self._first_steps[number]
        return self._timeline.slot(first_step - 1) + 1 if number else 0

    def _stage(self, number: int) -> Stage:
        depot, config = self._depot, self._depot.stages[number]
        first_slot = self._first_slot(number)
        changes = [change for change in self._timeline.weights if first_slot <= change[0] < self._end_slot(number)]
        weights = depot.weights(number)
        epochs = {ingredient.source: ingredient.epochs for ingredient in depot.ingredients(number)}
        for name in {name for _, changed in changes for name in changed}:
            depot.check_known(name)
        names = [name for name in depot.corpus.names
                 if name in weights or any(name in changed for _, changed in changes)]
        sources = tuple(depot.corpus.names.index(name) for name in names)
        supplies = tuple(depot.supply(source, self._before(source, number)) for source in sources)
        mixture = Mixture(
            [weights.get(name, 0) for name in names],
            [supply.capacity(epochs.get(name, math.inf)) for name, supply in zip(names, supplies, strict=True)],
            [((slot - first_slot) * config.batch_size, [changed.get(name, 0) for name in names])
             for slot, changed in changes])
        plans = [join_plans(supply.plans) for supply in supplies]
        first_rows = np.cumsum([0, *(plan.num_rows for plan in plans[:-1])])
        return Stage(config.batch_size, first_slot, sources, supplies, first_rows, mixture,
                     PackedRows(depot.corpus.store, join_plans(plans)))

    def _end_slot(self, number: int) -> float:
        return self._first_slot(number + 1) if number + 1 < len(self._first_steps) else math.inf

    def _before(self, source: int, number: int) -> Taken:
        """Rows of `source` taken in each stage before stage `number`."""
        taken = []
        for earlier in range(number):
            stage = self.stage(earlier)
            rows = stage.taken(int(self._end_slot(earlier)))
            taken.append(int(rows[stage.sources.index(source)]) if source in stage.sources else 0)
        return tuple(taken)
