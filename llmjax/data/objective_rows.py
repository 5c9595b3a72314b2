"""Batches of an objective: pieces of documents packed into rows, each hidden and predicted in part as it says.

What is drawn for a piece depends on the seed, the step, the row of the global batch and the place in the row alone, so
a resumed run, and any number of processes, draw the same.

Letters: B rows, T positions of targets, S positions of sources.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmjax.core.errors import ConfigError
from llmjax.core.objective_sections import ObjectiveConfig, ObjectiveName, corrupted_length, longest_text
from llmjax.core.sections import Config
from llmjax.data import objectives
from llmjax.data.loader import Batch, PackedRows, Selection, Stream
from llmjax.data.objectives import SpecialIds
from llmjax.data.pack import Pieces, next_token_pieces

if TYPE_CHECKING:
    from llmjax.data.tokenizer import Tokenizer

MARKS_OF_MIDDLE = 3
NAMES = {"mask": "<mask>", "prefix": "<fim_prefix>", "suffix": "<fim_suffix>", "middle": "<fim_middle>"}
OTHER_NAMES = {"mask": "[MASK]"}  # of tokenizers made elsewhere
SENTINEL = "<extra_id_{}>"
NEEDED: dict[ObjectiveName, tuple[str, ...]] = {
    "prefix": (), "masked_tokens": ("mask",), "span_corruption": ("sentinels",),
    "fill_in_the_middle": ("prefix", "suffix", "middle"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that the batches of an objective depend on beside the texts."""

    config: ObjectiveConfig
    ids: SpecialIds
    vocab_size: int
    seed: int
    target_len: int  # 0 where there is no encoder
    start_id: int

    def pieces(self, seq_len: int) -> Pieces:
        """What of documents becomes pieces of rows of `seq_len` positions."""
        name = self.config.name
        if name == "masked_tokens":
            return Pieces(longest=seq_len, ahead=0)
        if name == "fill_in_the_middle":
            return Pieces(longest=seq_len - MARKS_OF_MIDDLE, size=lambda lengths: lengths + MARKS_OF_MIDDLE)
        if not self.target_len:
            return next_token_pieces(seq_len)
        if name == "prefix":
            longest = min(seq_len, self.target_len)
            return Pieces(longest=longest, ahead=0, first=1, last=1, least=2, size=lambda lengths: -(
                -lengths * seq_len // longest))
        rates = {"density": self.config.noise_density, "mean_span": self.config.mean_span}
        table = np.array([(0, 0), (0, 0), *(corrupted_length(n, **rates) for n in
                                           range(2, longest_text(seq_len, **rates) + 1))])  # fmt: skip
        sizes = np.maximum(table[:, 0], -(-table[:, 1] * seq_len // self.target_len))
        longest = int(np.flatnonzero(sizes <= seq_len)[-1])
        return Pieces(longest=longest, ahead=0, first=1, last=1, least=2, size=lambda lengths: sizes[lengths])


def settings_of(config: Config, tokenizer: Tokenizer) -> Settings | None:
    """The settings of a run, None where it predicts the next token.

    Raises ConfigError where the tokenizer lacks a token that the objective writes.
    """
    objective = config.task.objective
    if objective.name == "next_token":
        return None
    ids = special_ids(tokenizer)
    for name in NEEDED[objective.name]:
        if getattr(ids, name) in (-1, ()):
            raise ConfigError(f"tokenizer.specials={config.tokenizer.specials!r}: task.objective.name="
                              f"{objective.name!r} needs {NAMES.get(name, SENTINEL.format(0))}, which the tokenizer "
                              "lacks; 'objectives' fits where one is trained")
    found = Settings(objective, ids, config.model.vocab_size, config.data.shuffle_seed, config.data.target_len,
                     config.model.start_id)
    if objective.name == "span_corruption":
        _check_sentinels(config, found)
    return found


def _check_sentinels(config: Config, settings: Settings) -> None:
    longest = settings.pieces(config.data.seq_len).longest
    source, target = corrupted_length(longest, density=settings.config.noise_density,
                                      mean_span=settings.config.mean_span)
    if (spans := (source + target - 2 - longest) // 2) > len(settings.ids.sentinels):
        raise ConfigError(f"data.seq_len={config.data.seq_len}: a text of {longest} tokens has {spans} corrupted spans "
                          f"and the tokenizer {len(settings.ids.sentinels)} sentinels")


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The tokens that objectives write, by their names."""
    named = {name: next((index for text in (text, OTHER_NAMES.get(name, text))
                         if (index := tokenizer.token_id(text)) is not None), -1) for name, text in NAMES.items()}
    sentinels: list[int] = []
    while (index := tokenizer.token_id(SENTINEL.format(len(sentinels)))) is not None:
        sentinels.append(index)
    return SpecialIds(tokenizer.bos_id, tokenizer.eos_id, sentinels=tuple(sentinels), **named)


@dataclasses.dataclass(frozen=True)
class Hidden:
    """A stream of batches as an objective makes them of the rows of another stream."""

    stream: Stream
    settings: Settings

    def stage_number(self, step: int) -> int:
        """The stretch of the run that the step belongs to."""
        return self.stream.stage_number(step)

    def select(self, step: int) -> Selection:
        """The rows of the batch that the state after `step` steps takes next, by their places in it."""
        chosen = self.stream.select(step)
        assert isinstance(chosen.rows, PackedRows), "objectives are of packed documents"
        return Selection(HiddenRows(chosen.rows, chosen.numbers, self.settings, step), np.arange(len(chosen.numbers)))


def hidden(make: Callable[..., Stream], settings: Settings) -> Callable[..., Stream]:
    """What makes a stream, with its batches turned into those of the objective."""
    return lambda timeline: Hidden(make(timeline), settings)


@dataclasses.dataclass(frozen=True)
class HiddenRows:
    """The rows of one batch."""

    rows: PackedRows
    numbers: np.ndarray  # of the rows, by place
    settings: Settings
    step: int

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, rows: np.ndarray) -> Batch:
        """The batch of the rows at these places."""
        settings, seq_len = self.settings, self.rows.plan.seq_len
        pieces = settings.pieces(seq_len)
        texts = [self.rows.segments(int(self.numbers[place]), ahead=pieces.ahead) for place in rows]
        draws = [[objectives.generator(settings.seed, self.step, int(place), number) for number in range(len(row))]
                 for place, row in zip(rows, texts, strict=True)]
        return FILL[settings.config.name](settings, texts, draws, seq_len)


Texts = Sequence[Sequence[np.ndarray]]  # of each row, its pieces
Draws = Sequence[Sequence[np.random.Generator]]


def _blank(num_rows: int, length: int, letters: str, *, targets: bool = True) -> Batch:
    names = ("tokens", "positions", "segment_ids", *(("targets",) if targets else ()))
    batch = {f"{name}_{letters}": np.zeros((num_rows, length), np.int32) for name in names}
    return batch | ({f"weights_{letters}": np.zeros((num_rows, length), np.float32)} if targets else {})


def _put(batch: Batch, letters: str, row: int, pieces: Iterable[dict[str, np.ndarray]]) -> None:
    """Pieces one after the other in a row, with their numbers and positions."""
    begin = 0
    for number, piece in enumerate(pieces, start=1):
        length = len(piece["tokens"])
        at = (row, slice(begin, begin + length))
        for name, values in piece.items():
            batch[f"{name}_{letters}"][at] = values
        batch[f"segment_ids_{letters}"][at] = number
        batch[f"positions_{letters}"][at] = np.arange(length)
        begin += length


def _masked(settings: Settings, texts: Texts, draws: Draws, seq_len: int) -> Batch:
    batch = _blank(len(texts), seq_len, "BT")
    mask = functools.partial(objectives.mask_tokens, config=settings.config, ids=settings.ids,
                             vocab_size=settings.vocab_size)
    for row, (pieces, rngs) in enumerate(zip(texts, draws, strict=True)):
        found = [mask(tokens, rng) for tokens, rng in zip(pieces, rngs, strict=True)]
        _put(batch, "BT", row, ({"tokens": one.tokens_N, "targets": tokens, "weights": one.hidden_N}
                                for one, tokens in zip(found, pieces, strict=True)))
    return batch


def _corrupted(settings: Settings, texts: Texts, draws: Draws, seq_len: int) -> Batch:
    def corrupt(tokens: np.ndarray, rng: np.random.Generator) -> objectives.Corrupted:
        if settings.config.name == "prefix":
            length = objectives.prefix_length(len(tokens), rng)
            return objectives.Corrupted(tokens[:length], tokens[length:])
        return objectives.corrupt_spans(tokens, rng, config=settings.config, ids=settings.ids)

    batch = _blank(len(texts), seq_len, "BS", targets=False) | _blank(len(texts), settings.target_len, "BT")
    for row, (pieces, rngs) in enumerate(zip(texts, draws, strict=True)):
        found = [corrupt(tokens, rng) for tokens, rng in zip(pieces, rngs, strict=True)]
        _put(batch, "BS", row, ({"tokens": one.source} for one in found))
        _put(batch, "BT", row, ({"tokens": np.r_[settings.start_id, one.target[:-1]], "targets": one.target,
                                 "weights": np.ones(len(one.target))} for one in found))
    return batch


def _prefixed(settings: Settings, texts: Texts, draws: Draws, seq_len: int) -> Batch:
    """Prefix language modelling (Liu et al. 2018; Raffel et al. 2020, section 3.2.1): a prefix sees all of itself."""
    if settings.target_len:
        return _corrupted(settings, texts, draws, seq_len)
    batch = _blank(len(texts), seq_len, "BT") | {"prefix_BT": np.zeros((len(texts), seq_len), np.int32)}
    for row, (pieces, rngs) in enumerate(zip(texts, draws, strict=True)):
        lengths = [objectives.prefix_length(len(tokens), rng) for tokens, rng in zip(pieces, rngs, strict=True)]
        _put(batch, "BT", row, ({"tokens": tokens[:-1], "targets": tokens[1:],
                                 "weights": np.arange(len(tokens) - 1) >= length - 1,  # its last token predicts
                                 "prefix": np.arange(len(tokens) - 1) < length}
                                for tokens, length in zip(pieces, lengths, strict=True)))  # fmt: skip
    return batch


def _middle(settings: Settings, texts: Texts, draws: Draws, seq_len: int) -> Batch:
    batch = _blank(len(texts), seq_len, "BT")
    for row, (pieces, rngs) in enumerate(zip(texts, draws, strict=True)):
        moved = [objectives.move_middle(tokens, rng, config=settings.config, ids=settings.ids)
                 for tokens, rng in zip(pieces, rngs, strict=True)]
        _put(batch, "BT", row, ({"tokens": tokens[:-1], "targets": tokens[1:], "weights": np.ones(len(tokens) - 1)}
                                for tokens in moved))
    return batch


FILL: dict[ObjectiveName, Callable[[Settings, Texts, Draws, int], Batch]] = {
    "masked_tokens": _masked, "span_corruption": _corrupted, "prefix": _prefixed, "fill_in_the_middle": _middle,
}  # fmt: skip
