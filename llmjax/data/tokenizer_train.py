"""Training of tokenizers on words cut so that code compresses well: SentencePiece models and byte-level BPE.

For SentencePiece (Kudo and Richardson, 2018) the words come from our own cutting, counted, because its trainer allows
neither a tab in a piece nor a space at its end: here a line break takes the punctuation before it and the indentation
and word after it, `):\\n    return`. Stand-ins from the private use area carry spaces, breaks and tabs past the trainer
and are put back in the model.
"""

from __future__ import annotations

import collections
import hashlib
import heapq
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llmjax.core.errors import ConfigError, LlmjaxError, RunError
from llmjax.core.sections import TokenizerConfig
from llmjax.data import byte_level
from llmjax.data.tokenizer_backends import OBJECTIVE_PIECES, SPECIAL_PIECES

_STAND_INS = {" ": "\ue000", "\n": "\ue001", "\t": "\ue002"}
_TO_STAND_INS = str.maketrans(_STAND_INS)
_FROM_STAND_INS = str.maketrans({"\ue000": "\u2581", "\ue001": "\n", "\ue002": "\t"})
_UNTRAINABLE = re.compile("[\x00\u2581\u2585\ue000-\ue002\ud800-\udfff]")  # what the trainer or we give a meaning

_MAX_PIECE = 32  # characters; room for a line break and deep indentation
_WORD = re.compile(
    r"(?:[^\w\s]{0,16}\n[ \t]*)+(?:[^\W\d]{1,32})?"  # ends of lines with what starts the next one
    r"| ?[^\w\s]?[^\W\d]{1,32}"  # a name with a space, a dot, a bracket before it
    r"| ?\d{1,3}"
    r"| ?[^\w\s]{1,32}"
    r"|\s+"
)
NO_TEXT = "tokenizer: there is no text to train on; give data.sources that hold some"
_SCORE_STEP = 2.0**-9  # unigram scores are multiples of it: sums down to -2**15 are exact in float32
_MAX_WORDS = 1 << 16  # rarer ones cost time and teach little
_PIECE_CHARS = 1 << 16  # documents are sampled in pieces of this many characters


def train_sentencepiece(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """A serialised SentencePiece model: reversible, no normalisation, bytes for characters it does not know."""
    words = count_words(sample(texts, max_chars=config.train_bytes))
    if not words:
        raise RunError(NO_TEXT)
    return _finish(_train(words, config), config)


def train_byte_level(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """A `tokenizer.json` of byte-level BPE (Radford et al., 2019): every byte is a piece, so nothing is unknown."""
    import tokenizers

    pieces = special_pieces(config)
    least = len(pieces) + 256
    if config.vocab_size < least:
        raise ConfigError(f"tokenizer.vocab_size={config.vocab_size}: at least {least} is needed, for every byte")
    picked = sorted(sample(texts, max_chars=config.train_bytes))
    if not any(picked):
        raise RunError(NO_TEXT)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(byte_level.WORD_PATTERN), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=list(pieces), show_progress=False, min_frequency=2,
        initial_alphabet=byte_level.byte_characters(),
    )  # fmt: skip
    tokenizer.train_from_iterator(picked, trainer)
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    ranks = {byte_level.to_bytes(piece): rank for piece, rank in vocab.items() if rank >= len(pieces)}
    specials = {piece: index for index, piece in enumerate(pieces)}
    definition = byte_level.definition(ranks, pattern=byte_level.WORD_PATTERN, specials=specials)
    return json.dumps(definition, ensure_ascii=False).encode()


def special_pieces(config: TokenizerConfig) -> tuple[str, ...]:
    """The tokens that no text spells, by their ids."""
    return SPECIAL_PIECES + (OBJECTIVE_PIECES if config.specials == "objectives" else ())


TRAINERS: dict[str, Callable[[Iterable[str], TokenizerConfig], bytes]] = {
    "bpe": train_sentencepiece, "unigram": train_sentencepiece, "byte_bpe": train_byte_level,
}  # fmt: skip


def sample(texts: Iterable[str], *, max_chars: int) -> list[str]:
    """Pieces of texts up to a total length: those with the smallest hashes, so neither order nor chance matters."""
    heap: list[tuple[bytes, str]] = []  # hashes are inverted: the root is the piece to give up first
    total = 0
    for piece in _pieces(texts):
        digest = hashlib.blake2b(piece.encode(errors="surrogatepass"), digest_size=16).digest()
        heapq.heappush(heap, (bytes(255 - byte for byte in digest), piece))
        total += len(piece)
        while total > max_chars and len(heap) > 1:
            total -= len(heapq.heappop(heap)[1])
    return [piece[:max_chars] for _, piece in heap]


def count_words(texts: Iterable[str]) -> dict[str, int]:
    """How often each training word occurs, for the most common ones."""
    words: collections.Counter[str] = collections.Counter()
    for text in texts:
        words.update(_WORD.findall(text))
    usable = (word for word in words if not _UNTRAINABLE.search(word))
    common = sorted(usable, key=lambda word: (-words[word], word))[:_MAX_WORDS]
    return {word: words[word] for word in common}


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _PIECE_CHARS):
            yield text[start : start + _PIECE_CHARS]


def _train(words: dict[str, int], config: TokenizerConfig) -> bytes:
    import sentencepiece

    lines = (f"{word.translate(_TO_STAND_INS)}\t{count}" for word, count in sorted(words.items()))
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=out,
            input_format="tsv",
            model_type=config.kind,
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,  # a small corpus gives a smaller vocabulary
            byte_fallback=True,
            character_coverage=0.9995,  # the rest falls back to bytes
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_whitespace=False,
            split_by_unicode_script=False,
            split_by_number=False,
            max_sentencepiece_length=_MAX_PIECE,
            seed_sentencepiece_size=20 * config.vocab_size,
            shrinking_factor=0.5,  # unigram: three times as fast as the default pruning, for 0.1 % more tokens
            num_sub_iterations=1,
            num_threads=4,  # recorded in the model: a constant, so that every machine writes the same file
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            control_symbols=list(special_pieces(config)[len(SPECIAL_PIECES):]),
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, config) from error
    return out.getvalue()


def _explained(error: RuntimeError, config: TokenizerConfig) -> LlmjaxError:
    """What SentencePiece says, without the place in its source."""
    if too_small := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        return ConfigError(
            f"tokenizer.vocab_size={config.vocab_size}: at least {too_small[1]} is needed, for every byte and for the "
            "characters of this corpus"
        )
    return RunError(f"SentencePiece cannot train on this corpus: {str(error).splitlines()[-1].split('] ')[-1]}")


def _finish(serialised: bytes, config: TokenizerConfig) -> bytes:
    """Puts the true characters back and rounds unigram scores."""
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto.FromString(serialised)
    for piece in model.pieces:
        piece.piece = piece.piece.translate(_FROM_STAND_INS)
        if config.kind == "unigram":
            piece.score = round(piece.score / _SCORE_STEP) * _SCORE_STEP
    return bytes(model.SerializeToString(deterministic=True))
