"""Our SentencePiece models as the `tokenizer.json` of Hugging Face's `tokenizers`: the same ids on every text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmjax.data.tokenizer import CONFIG_FILE, Tokenizer
from llmjax.data.tokenizer_backends import (
    CUT_PATTERNS,
    HUGGINGFACE_FILE,
    SENTENCEPIECE_FILE,
    SPACE_MARK,
    SPECIAL_PIECES,
    model_kind,
)  # fmt: skip


def export_tokenizer(folder: Path, out: Path) -> None:
    """Writes the tokenizer of a folder as `AutoTokenizer` reads it; one that came from Hugging Face goes as it is."""
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(out)
    model = out / SENTENCEPIECE_FILE
    if model.is_file():
        definition = sentencepiece_to_json(model.read_bytes())
        (out / HUGGINGFACE_FILE).write_text(json.dumps(definition, ensure_ascii=False), "utf-8")
        model.unlink()
        _describe(out / CONFIG_FILE)


def sentencepiece_to_json(serialised: bytes) -> dict[str, Any]:
    """The content of `tokenizer.json` for a serialised model that our trainer wrote."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(serialised)
    kind = model_kind(serialised)
    cuts = {"type": "Split", "pattern": {"Regex": CUT_PATTERNS[kind]}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(index, piece.piece) for index, piece in enumerate(proto.pieces)
                         if piece.type in (piece.CONTROL, piece.UNKNOWN)],
        "normalizer": None,
        "pre_tokenizer": cuts,
        "post_processor": _begin_with(SPECIAL_PIECES[1], 1),
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": MODELS[kind](proto),
    }


def _bpe_model(proto: Any) -> dict[str, Any]:
    learnt = {piece.piece.replace(SPACE_MARK, " "): piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": SPECIAL_PIECES[3],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {piece.piece.replace(SPACE_MARK, " "): index for index, piece in enumerate(proto.pieces)},
        "merges": list(_merges(learnt)),
    }


def _merges(scores: dict[str, float]) -> Iterator[list[str]]:
    """Every pair of pieces that is itself a piece, best score first: SentencePiece merges any such neighbours."""
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        for at in range(1, len(piece)):
            if piece[:at] in scores and piece[at:] in scores:
                yield [piece[:at], piece[at:]]


def _unigram_model(proto: Any) -> dict[str, Any]:
    vocab = [[piece.piece.replace(SPACE_MARK, " "), piece.score] for piece in proto.pieces]
    return {"type": "Unigram", "unk_id": 3, "vocab": vocab, "byte_fallback": True}


MODELS = {"bpe": _bpe_model, "unigram": _unigram_model}


def _added_token(index: int, piece: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": piece, **flags}


def _begin_with(piece: str, index: int) -> dict[str, Any]:
    """The begin token before every text, as documents are stored; `add_special_tokens=False` leaves it out."""
    begin = {"SpecialToken": {"id": piece, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {piece: {"id": piece, "ids": [index], "tokens": [piece]}},
    }


def _describe(config: Path) -> None:
    """Tells transformers to read "</s>" in a text as text, as we do, and to leave spaces alone."""
    settings = json.loads(config.read_text("utf-8"))
    settings |= {"split_special_tokens": True, "clean_up_tokenization_spaces": False}
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
