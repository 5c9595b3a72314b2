"""Vocabulary extension: byte-pair encoding (Sennrich et al., 2016) carried on over the tokens of a finished tokenizer.

New pieces join pairs of old ones and come after every old merge, so old ids keep their meaning, a text that holds no
new piece keeps its ids, and taking new ids apart again gives the old ones. Embeddings only grow at their end.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import json
from collections.abc import Iterable, Sequence
from typing import Any

from llmjax.core.errors import ConfigError
from llmjax.core.sections import TokenizerConfig
from llmjax.data import byte_level
from llmjax.data.tokenizer import Tokenizer
from llmjax.data.tokenizer_backends import HUGGINGFACE_FILE, SPACE_MARK, model_kind
from llmjax.data.tokenizer_train import count_words, sample

Pair = tuple[int, int]
Words = collections.Counter[tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Merge:
    """Two neighbouring tokens, the token that they become, and its bytes."""

    pair: Pair
    token: int
    piece: bytes


def extended(tokenizer: Tokenizer, texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """`tokenizer` with up to `config.extend_by` more pieces, learnt on a sample of the texts.

    Raises ConfigError for a tokenizer whose pieces compete (unigram) or whose merges cannot be told.
    """
    picked = sample(texts, max_chars=config.train_bytes)
    byte_pieces = tokenizer.file == HUGGINGFACE_FILE
    words = (_byte_level_words if byte_pieces else _sentencepiece_words)(tokenizer, picked)
    merges = learn_merges(words, tokenizer.token_bytes, num_merges=config.extend_by)
    return tokenizer.with_contents((_grow_json if byte_pieces else _grow_sentencepiece)(tokenizer, merges))


def _byte_level_words(tokenizer: Tokenizer, texts: list[str]) -> Words:
    """The texts as their tokenizer cuts them before it joins bytes."""
    import tokenizers

    library = tokenizers.Tokenizer.from_buffer(tokenizer.contents)
    if not isinstance(library.decoder, tokenizers.decoders.ByteLevel):
        raise ConfigError("tokenizer.extend_by: only byte-level and SentencePiece BPE tokenizers can be extended")
    cut = collections.Counter(word for text in texts for word, _ in library.pre_tokenizer.pre_tokenize_str(text))
    words: Words = collections.Counter()
    for word, count in cut.items():
        words[tuple(token.id for token in library.model.tokenize(word))] += count
    return words


def _sentencepiece_words(tokenizer: Tokenizer, texts: list[str]) -> Words:
    """The texts in training words; without those that bytes had to spell, as SentencePiece never joins bytes."""
    if model_kind(tokenizer.contents) == "unigram":
        raise ConfigError("tokenizer.extend_by: the pieces of a unigram tokenizer compete, so new ones would change "
                          "how old text is cut; extend a BPE tokenizer")  # fmt: skip
    spelling = {i for i, piece in enumerate(_model(tokenizer).pieces) if piece.type == piece.BYTE}
    cut = count_words(texts)
    words: Words = collections.Counter()
    for ids, count in zip(tokenizer.encode_batch(list(cut)), cut.values(), strict=True):
        if not spelling.intersection(ids.tolist()):
            words[tuple(ids.tolist())] += count
    return words


def learn_merges(words: Words, pieces: Sequence[bytes], *, num_merges: int) -> list[Merge]:
    """New pieces, most frequent first (smallest ids among equals), numbered from `len(pieces)` on.

    Stops when no pair occurs twice; a pair that spells a piece that is there already makes no second one.
    """
    spelt = [list(word) for word in words]
    times = list(words.values())
    counts: collections.Counter[Pair] = collections.Counter()
    where: dict[Pair, set[int]] = collections.defaultdict(set)
    for i, ids in enumerate(spelt):
        for pair in zip(ids, ids[1:], strict=False):
            counts[pair] += times[i]
            where[pair].add(i)
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)
    known = set(pieces)
    spelling = list(pieces)
    merges: list[Merge] = []
    while queue and len(merges) < num_merges:
        negative, pair = heapq.heappop(queue)
        if counts[pair] != -negative:  # the count fell since: look again when it comes up
            heapq.heappush(queue, (-counts[pair], pair))
            continue
        if counts[pair] < 2:
            break
        piece = spelling[pair[0]] + spelling[pair[1]]
        if piece in known:
            continue
        token = len(spelling)
        known.add(piece)
        spelling.append(piece)
        merges.append(Merge(pair, token, piece))
        risen = set()
        for i in where.pop(pair):
            old, new = spelt[i], join(spelt[i], pair, token)
            for gone in zip(old, old[1:], strict=False):
                counts[gone] -= times[i]
            for come in zip(new, new[1:], strict=False):
                counts[come] += times[i]
                where[come].add(i)
                risen.add(come)
            spelt[i] = new
        for come in risen:
            heapq.heappush(queue, (-counts[come], come))
    return merges


def join(ids: list[int], pair: Pair, token: int) -> list[int]:
    """`ids` with every occurrence of `pair`, from the left, as `token`."""
    out: list[int] = []
    i = 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            out.append(token)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def _grow_json(tokenizer: Tokenizer, merges: list[Merge]) -> bytes:
    content: dict[str, Any] = json.loads(tokenizer.contents)
    model = content["model"]
    spelt = {index: piece for piece, index in model["vocab"].items()}
    joined = " ".join if model["merges"] and isinstance(model["merges"][0], str) else list
    for merge in merges:
        spelt[merge.token] = byte_level.to_piece(merge.piece)
        model["vocab"][spelt[merge.token]] = merge.token
        model["merges"].append(joined(spelt[index] for index in merge.pair))
    return json.dumps(content, ensure_ascii=False).encode()


def _grow_sentencepiece(tokenizer: Tokenizer, merges: list[Merge]) -> bytes:
    model = _model(tokenizer)
    worst = min(piece.score for piece in model.pieces)
    for place, merge in enumerate(merges, start=1):
        model.pieces.add(piece=merge.piece.decode().replace(" ", SPACE_MARK), score=worst - place)
    model.trainer_spec.vocab_size = len(model.pieces)
    return bytes(model.SerializeToString(deterministic=True))


def _model(tokenizer: Tokenizer) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(tokenizer.contents)
