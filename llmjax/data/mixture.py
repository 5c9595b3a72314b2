"""Mixing sources: which source the row at a place comes from, and which of its rows, in closed form at any place.

Weights become whole shares of 2^24 (largest remainders). The places are split between two halves of the sources in
proportion to their shares, `round(place * left / both)` to the left, and each half again: a tree of Sturmian sequences.
Whatever the place, a source is less than two rows away from its exact part. A source that has reached its cap of epochs
leaves the mixture at that place and the others take over its share; so do changed weights. Between such places the
mixture is one `Piece`, and all that a run has to know of the past is the list of pieces.

Shape letters: P places, S sources.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from llmjax.core.errors import ConfigError, RunError

WHOLE = 2**24  # shares of a mixture; times a place it fits into 63 bits for 5e11 rows


@dataclasses.dataclass(frozen=True)
class Ingredient:
    """One source in a mixture: `name[=weight][:epochs]`."""

    source: str
    weight: float | None  # None: as many tokens as it has, under the temperature
    epochs: float  # how often it may be seen at most


def parse_mixture(spec: str, *, field: str) -> tuple[Ingredient, ...]:
    """Ingredients of a comma-separated text; raises ConfigError naming `field`."""
    ingredients = tuple(_parse(part.strip(), field) for part in spec.split(",") if part.strip())
    names = [ingredient.source for ingredient in ingredients]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{field}={spec!r}: {twice.pop()} is named twice; give it one weight")
    return ingredients


def source_weights(ingredients: Sequence[Ingredient], tokens: Mapping[str, int], *,
                   temperature: float) -> dict[str, float]:
    """Weights w^(1 / temperature), w as stated or the source's tokens (Devlin et al. 2019): above 1 it levels them."""
    stated = {i.source: tokens[i.source] if i.weight is None else i.weight for i in ingredients}
    largest = max(stated.values())
    return {name: (weight / largest) ** (1 / temperature) for name, weight in stated.items()}


def whole_shares(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """(S,) int64 in proportion to `weights`, summing to WHOLE exactly: largest remainders (Hamilton 1792)."""
    exact = np.asarray(weights, np.float64) / sum(weights) * WHOLE
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[:WHOLE - int(shares.sum())]] += 1
    return shares


def rows_taken(shares: np.ndarray, places: np.ndarray) -> np.ndarray:
    """How many of the first `places` rows, (P,) int64, each source gave: (P, S) int64, rows summing to `places`."""
    if len(shares) == 1:
        return places[:, None]
    total = np.cumsum(shares)
    middle = min(int(np.searchsorted(total, total[-1] / 2)) + 1, len(shares) - 1)  # about half of the weight
    whole = max(int(total[-1]), 1)  # sources without a share give nothing
    left = (places * total[middle - 1] + whole // 2) // whole
    return np.hstack([rows_taken(shares[:middle], left), rows_taken(shares[middle:], places - left)])


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of places with constant shares."""

    first: int  # its first place
    taken: np.ndarray  # (S,) int64: rows of each source before it
    shares: np.ndarray  # (S,) int64; all zero: nothing is left to read


@dataclasses.dataclass(frozen=True)
class Draw:
    """The rows at P places: the source of each and its number among the rows of that source."""

    sources: np.ndarray  # (P,) int64
    indices: np.ndarray  # (P,) int64


class Mixture:
    """The interleaving of S sources from place 0 on.

    `capacities` are rows that a source may give (math.inf: any number), `changes` later weights by place, ascending.
    """

    def __init__(self, weights: Sequence[float], capacities: Sequence[float],
                 changes: Sequence[tuple[int, Sequence[float]]] = ()):
        self._capacities = np.asarray(capacities, np.float64)
        self._pieces: list[Piece] = []
        nothing = np.zeros(len(weights), np.int64)
        for place, now in [(0, weights), *changes]:
            taken = self._taken(place) if place else nothing
            kept = [piece for piece in self._pieces if piece.first < place]
            self._pieces = [*kept, *self._from(place, taken, np.asarray(now, np.float64))]

    def taken(self, place: int) -> np.ndarray:
        """(S,) int64: rows of each source before `place`; raises RunError past the end of capped sources."""
        piece = self._pieces[self._piece_at(place)]
        if place > piece.first and not piece.shares.any():
            raise RunError(f"every source has reached its cap of epochs after {piece.first:,} rows: raise the caps in "
                           "the mixture, add sources, or train for fewer steps")
        return self._taken(place)

    def draw(self, places: range) -> Draw:
        """Sources and their rows at consecutive places; raises RunError past the end of capped sources."""
        self.taken(places.stop)
        parts = [self._draw(piece, range(max(places.start, piece.first), min(places.stop, end)))
                 for piece, end in self._stretches(places)]
        return Draw(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("sources", "indices")))

    def _taken(self, place: int) -> np.ndarray:
        """(S,) rows before `place`; where nothing is left to read, nothing is taken."""
        piece = self._pieces[self._piece_at(place)]
        length = place - piece.first if piece.shares.any() else 0
        return piece.taken + rows_taken(piece.shares, np.array([length]))[0]

    def _draw(self, piece: Piece, places: range) -> Draw:
        counts = rows_taken(piece.shares, np.arange(places.start, places.stop + 1) - piece.first)
        sources = np.argmax(counts[1:] > counts[:-1], axis=1)  # each place adds a row to one source
        return Draw(sources, piece.taken[sources] + counts[np.arange(len(sources)), sources])

    def _stretches(self, places: range) -> Iterator[tuple[Piece, int]]:
        """The pieces that meet `places`, each with the place where it ends."""
        for number in range(self._piece_at(places.start), self._piece_at(places.stop - 1) + 1):
            later = self._pieces[number + 1:]
            yield self._pieces[number], later[0].first if later else places.stop

    def _piece_at(self, place: int) -> int:
        return bisect.bisect_right(self._pieces, place, key=lambda piece: piece.first) - 1

    def _from(self, place: int, taken: np.ndarray, weights: np.ndarray) -> Iterator[Piece]:
        """Pieces from `place` on: a new one wherever sources run out."""
        while (open_ := np.where(taken < self._capacities, weights, 0.0)).any():
            piece = Piece(place, taken, whole_shares(open_))
            yield piece
            lengths = [self._room(piece, source) for source in np.flatnonzero(piece.shares).tolist()]
            if min(lengths) == math.inf:
                return
            length = int(min(lengths))
            place, taken = place + length, taken + rows_taken(piece.shares, np.array([length]))[0]
        yield Piece(place, taken, np.zeros(len(weights), np.int64))

    def _room(self, piece: Piece, source: int) -> float:
        """Places of `piece` until `source` has reached its capacity."""
        room = self._capacities[source] - piece.taken[source]
        if room == math.inf:
            return math.inf
        enough = int(room + 2) * WHOLE // int(piece.shares[source]) + 1
        return bisect.bisect_left(range(enough), int(room),
                                  key=lambda n: int(rows_taken(piece.shares, np.array([n]))[0, source]))


def _parse(part: str, field: str) -> Ingredient:
    name, colon, epochs = part.rpartition(":") if ":" in part else (part, "", "inf")
    name, _, weight = name.partition("=")
    try:
        ingredient = Ingredient(name.strip(), float(weight) if weight else None, float(epochs))
    except ValueError:
        ingredient = Ingredient("", None, 0)
    if not ingredient.source or not ingredient.epochs > 0 or not 0 < (ingredient.weight or 1) < math.inf:
        raise ConfigError(f"{field}: {part!r} is not of the form source=weight:epochs, for example books=0.3:2; weight "
                          "and epochs are positive and may be left out")
    return ingredient
