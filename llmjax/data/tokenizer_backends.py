"""The libraries behind a tokenizer: SentencePiece, `tokenizers`, and tiktoken where it gives the same ids faster."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from llmjax.core.errors import RunError
from llmjax.data import byte_level

if TYPE_CHECKING:
    import tiktoken

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "tokenizer.json"
SPECIAL_PIECES = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0, 1, 2, 3 of our own tokenizers
# Behind them where tokenizer.specials asks for what objectives write: masks, sentinels of spans, marks of the middle.
OBJECTIVE_PIECES = ("<mask>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>",
                    *(f"<extra_id_{number}>" for number in range(100)))  # fmt: skip
SPACE_MARK = "\u2581"  # stands for a space inside SentencePiece

# Characters encoded alone because SentencePiece or `tokenizers` would read them as something else: a real U+2581 (the
# mark of a space, written as bytes instead), and the first one of what looks like a control or a byte piece.
_ALONE = r"\u2581|<(?=(?:pad|s|/s|unk|mask|fim_(?:pre|suf)fix|fim_middle|extra_id_\d\d?|0x[0-9A-F]{2})>)"

# Where text is cut before it is encoded. Unigram models search for the best sum of scores, in float32 here and in
# float64 there: over at most 1024 characters the sums are exact in both (see `tokenizer_train`).
CUT_PATTERNS = {"bpe": _ALONE, "unigram": rf"{_ALONE}|(?:(?!{_ALONE})[\s\S]){{1,1024}}"}

FEW_CHARACTERS = 1 << 18  # below this the faster library does not earn the time that comparing the two takes


class Backend(Protocol):
    """What a tokenizer library has to offer; `contents` is the file that defines it, by the name `file`."""

    file: str
    contents: bytes
    vocab_size: int

    def __init__(self, contents: bytes): ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of texts in which nothing is special, int32."""
        ...

    def encode_parsed(self, text: str) -> list[int]:
        """Ids of a text in which special tokens may be spelt out."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """The id of a special token."""
        ...

    def token_bytes(self) -> list[bytes]:
        """The bytes of each id."""
        ...


class SentencePieceBackend:
    """A SentencePiece model that changes nothing in its input and falls back to bytes."""

    file = SENTENCEPIECE_FILE

    def __init__(self, contents: bytes):
        import sentencepiece

        self.contents = contents
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=contents)
        self._cut = re.compile(f"({CUT_PATTERNS[model_kind(contents)]})")
        self._bytes = self.token_bytes()
        self._mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._specials = {self._processor.id_to_piece(i): i for i in range(len(self._bytes)) if not self._bytes[i]}
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, self._specials)) + ")")
        self.vocab_size = len(self._bytes)
        probe = "  \ufb01 \u4e00\n "
        if b"".join(self._bytes[i] for i in self._processor.encode(probe)) != probe.encode():
            raise RunError(
                f"{SENTENCEPIECE_FILE}: this SentencePiece model normalises or has no bytes to fall back to, so text "
                f"would not come back as it was; use the same tokenizer as {HUGGINGFACE_FILE}"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        parts_of = [self._cut.split(text) for text in texts]
        flat = [part for parts in parts_of for part in parts]
        encoded = self._processor.encode(flat, num_threads=len(os.sched_getaffinity(0)))
        ids = (self._mark_ids if part == SPACE_MARK else tokens for part, tokens in zip(flat, encoded, strict=True))
        return [np.array([token for _ in parts for token in next(ids)], np.int32) for parts in parts_of]

    def encode_parsed(self, text: str) -> list[int]:
        pieces = (
            [self._specials[part]] if part in self._specials else self.encode_batch([part])[0].tolist()
            for part in self._special_pattern.split(text)
        )
        return [token for piece in pieces for token in piece]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    def token_to_id(self, token: str) -> int | None:
        index: int = self._processor.piece_to_id(token)
        return index if self._processor.id_to_piece(index) == token else None

    def token_bytes(self) -> list[bytes]:
        return [self._piece_bytes(i) for i in range(self._processor.vocab_size())]

    def _piece_bytes(self, index: int) -> bytes:
        piece: str = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        if self._processor.is_control(index) or self._processor.is_unknown(index):
            return b""
        return piece.replace(SPACE_MARK, " ").encode()


class HuggingFaceBackend:
    """A `tokenizer.json`, byte-level or of the SentencePiece kind, run by `tokenizers`; long texts by tiktoken."""

    file = HUGGINGFACE_FILE

    def __init__(self, contents: bytes):
        import tokenizers

        self.contents = contents
        self._parsing = tokenizers.Tokenizer.from_buffer(contents)
        self._parsing.no_truncation()
        self._parsing.no_padding()
        self._tokenizer = tokenizers.Tokenizer.from_str(self._parsing.to_str())
        self._tokenizer.encode_special_tokens = True  # despite its name: splits them like other text
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if sum(map(len, texts)) > FEW_CHARACTERS and (fast := self._tiktoken):
            with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
                encode = functools.partial(fast.encode_to_numpy, disallowed_special=())
                return [ids.view(np.int32) for ids in threads.map(encode, texts)]
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encoded]

    def encode_parsed(self, text: str) -> list[int]:
        return list(self._parsing.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def token_to_id(self, token: str) -> int | None:
        index: int | None = self._tokenizer.token_to_id(token)
        return index

    def token_bytes(self) -> list[bytes]:
        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
        kinds = {decoder.get("type"), *(part["type"] for part in decoder.get("decoders", ()))}
        to_bytes = byte_level.to_bytes if "ByteLevel" in kinds else _marked_bytes
        added = self._tokenizer.get_added_tokens_decoder()
        return [
            (b"" if added[i].special else added[i].content.encode())
            if i in added
            else to_bytes(self._tokenizer.id_to_token(i) or "")
            for i in range(self.vocab_size)
        ]

    @functools.cached_property
    def _tiktoken(self) -> tiktoken.Encoding | None:
        return byte_level.as_tiktoken(json.loads(self.contents))


BACKENDS: dict[str, type[Backend]] = {HUGGINGFACE_FILE: HuggingFaceBackend, SENTENCEPIECE_FILE: SentencePieceBackend}


def model_kind(serialised: bytes) -> Literal["bpe", "unigram"]:
    """The algorithm of a serialised SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    spec: Any = sentencepiece_model_pb2.ModelProto.FromString(serialised).trainer_spec
    return "bpe" if spec.model_type == spec.BPE else "unigram"


def _marked_bytes(token: str) -> bytes:
    """The bytes of a SentencePiece-style token: `<0x0A>` is a byte, U+2581 a space."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE_MARK, " ").encode()
