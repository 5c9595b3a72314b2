"""Text to token ids and back, exactly: SentencePiece models of our own, `tokenizer.json` ones from elsewhere."""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from llmjax.core.errors import RunError
from llmjax.core.sections import TokenizerConfig

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_PIECES = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0, 1, 2, 3 of our own tokenizers
SPACE_MARK = "\u2581"  # stands for a space inside SentencePiece

# One `<role>: <content>` line a message, closed by the end token where the assistant spoke.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# Characters encoded alone because SentencePiece or `tokenizers` would read them as something else: a real U+2581 (the
# mark of a space, written as bytes instead), and the first one of what looks like a control or a byte piece.
_ALONE = r"\u2581|<(?=(?:pad|s|/s|unk|0x[0-9A-F]{2})>)"

# Where text is cut before it is encoded. Unigram models search for the best sum of scores, in float32 here and in
# float64 there: over at most 1024 characters the sums are exact in both (see `tokenizer_train`).
CUT_PATTERNS = {"bpe": _ALONE, "unigram": rf"{_ALONE}|(?:(?!{_ALONE})[\s\S]){{1,1024}}"}

_log = logging.getLogger(__name__)


class Tokenizer:
    """A tokenizer folder: `tokenizer.json` or else `tokenizer.model`, beside `tokenizer_config.json`.

    Text is never read as special tokens unless asked: "</s>" in a document is four characters, not an end.
    """

    def __init__(self, backend: Backend, settings: Mapping[str, Any]):
        self._backend = backend
        self._settings = settings
        self.vocab_size: int = backend.vocab_size
        self.eos_token, self.eos_id = self._special("eos_token")
        self.bos_token, self.bos_id = self._special("bos_token", default="eos_token")
        self.pad_token, self.pad_id = self._special("pad_token", default="eos_token")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads a tokenizer folder, or the one inside a workdir; RunError where there is none."""
        for place in (folder, folder / "tokenizer"):
            for name, backend in BACKENDS.items():
                if (place / name).is_file():
                    return cls(backend(place / name), _read_settings(place))
        raise RunError(f"no tokenizer in {folder}: neither {HUGGINGFACE_FILE} nor {SENTENCEPIECE_FILE} is there")

    def save(self, folder: Path) -> None:
        """Writes the tokenizer as a folder that `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        if folder / self._backend.file.name != self._backend.file:
            shutil.copyfile(self._backend.file, folder / self._backend.file.name)
        (folder / CONFIG_FILE).write_text(json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def encode(self, text: str, *, specials: Literal["text", "parse"] = "text") -> list[int]:
        """Token ids of a text, none added; with "parse", what spells a special token becomes it (chat templates).

        Raises:
            ValueError: the text holds a lone surrogate, which no encoding of Unicode can write.
        """
        refuse_surrogates(text)
        return self._backend.encode_parsed(text) if specials == "parse" else self._backend.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of many texts, int32, in as many threads as there are cores."""
        for text in texts:
            refuse_surrogates(text)
        return [np.array(ids, np.int32) for ids in self._backend.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of token ids without special tokens; they may end inside a character."""
        table = self.token_bytes
        return b"".join(table[int(i)] for i in ids)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; empty for special tokens."""
        return self._backend.token_bytes()

    @functools.cached_property
    def chat_template(self) -> str:
        """The Jinja2 template of conversations; a plain one, said once, where the tokenizer brings none."""
        if not self._settings.get("chat_template"):
            _log.warning("the tokenizer has no chat template: using one `<role>: <content>` line a message")
        return self._settings.get("chat_template") or DEFAULT_CHAT_TEMPLATE

    @functools.cached_property
    def hash(self) -> str:
        """Changes whenever the ids of some text would: a hash of the model file and of the special ids."""
        digest = hashlib.sha256(self._backend.file.read_bytes())
        digest.update(repr((self.bos_id, self.eos_id, self.pad_id)).encode())
        return digest.hexdigest()[:32]

    def _special(self, name: str, *, default: str = "") -> tuple[str, int]:
        entry = self._settings.get(name) or self._settings.get(default)
        token = entry["content"] if isinstance(entry, Mapping) else entry
        if token is None:
            raise RunError(f"{CONFIG_FILE}: {default or name} is missing; name one of the tokenizer's tokens")
        index = self._backend.token_to_id(token)
        if index is None:
            raise RunError(f"{CONFIG_FILE}: {name} is {token!r}, which {self._backend.file.name} does not have")
        return token, index


class StreamDecoder:
    """Turns a stream of token ids into text that never ends inside a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._table = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that this token completes, often none."""
        return self._decoder.decode(self._table[token])

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def refuse_surrogates(text: str) -> None:
    """ValueError naming the first lone surrogate of a text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds a lone surrogate, U+{ord(text[error.start]):04X} at character {error.start}; "
            "only Unicode that UTF-8 can write has tokens"
        ) from None


class Backend(Protocol):
    """What a tokenizer library has to offer."""

    file: Path
    vocab_size: int

    def __init__(self, file: Path): ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in which nothing is special."""
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

    _SPECIAL = re.compile("(" + "|".join(SPECIAL_PIECES) + ")")

    def __init__(self, file: Path):
        import sentencepiece

        self.file = file
        serialised = file.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialised)
        self._cut = re.compile(f"({CUT_PATTERNS[model_kind(serialised)]})")
        self._bytes = self.token_bytes()
        self._mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self.vocab_size = len(self._bytes)
        probe = "  \ufb01 \u4e00\n "
        if b"".join(self._bytes[i] for i in self._processor.encode(probe)) != probe.encode():
            raise RunError(
                f"{file}: this SentencePiece model normalises or has no bytes to fall back to, so text would not "
                f"come back as it was; use the same tokenizer as {HUGGINGFACE_FILE}"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        parts_of = [self._cut.split(text) for text in texts]
        flat = [part for parts in parts_of for part in parts]
        encoded = self._processor.encode(flat, num_threads=len(os.sched_getaffinity(0)))
        ids = (self._mark_ids if part == SPACE_MARK else tokens for part, tokens in zip(flat, encoded, strict=True))
        return [[token for _ in parts for token in next(ids)] for parts in parts_of]

    def encode_parsed(self, text: str) -> list[int]:
        parts = self._SPECIAL.split(text)
        special = {piece: self._processor.piece_to_id(piece) for piece in SPECIAL_PIECES}
        pieces = (self.encode_batch([p])[0] if p not in special else [special[p]] for p in parts)
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
    """A `tokenizer.json`, byte-level or of the SentencePiece kind, run by the `tokenizers` library."""

    def __init__(self, file: Path):
        import tokenizers

        self.file = file
        self._parsing = tokenizers.Tokenizer.from_file(str(file))
        self._parsing.no_truncation()
        self._parsing.no_padding()
        self._tokenizer = tokenizers.Tokenizer.from_str(self._parsing.to_str())
        self._tokenizer.encode_special_tokens = True  # despite its name: splits them like other text
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

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
        to_bytes = _byte_level_bytes if "ByteLevel" in kinds else _marked_bytes
        added = self._tokenizer.get_added_tokens_decoder()
        return [
            (b"" if added[i].special else added[i].content.encode())
            if i in added
            else to_bytes(self._tokenizer.id_to_token(i) or "")
            for i in range(self.vocab_size)
        ]


BACKENDS: dict[str, type[Backend]] = {HUGGINGFACE_FILE: HuggingFaceBackend, SENTENCEPIECE_FILE: SentencePieceBackend}

_SETTINGS: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "chat_template": DEFAULT_CHAT_TEMPLATE,
}


def _read_settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json` with the chat template, which newer folders keep in a file of its own."""
    config, template = folder / CONFIG_FILE, folder / TEMPLATE_FILE
    settings: dict[str, Any] = json.loads(config.read_text("utf-8")) if config.is_file() else dict(_SETTINGS)
    return settings | ({"chat_template": template.read_text("utf-8")} if template.is_file() else {})


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


def _byte_level_bytes(token: str) -> bytes:
    """The bytes of a GPT-2-style token, in which every byte is written as one printable character."""
    return bytes(_byte_level_table()[character] for character in token)


@functools.cache
def _byte_level_table() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + i): byte for i, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, out: Path) -> Tokenizer:
    """Trains SentencePiece on a sample of the texts, the same in whatever order they come, into the folder `out`.

    Raises:
        RunError: there is no text.
        ConfigError: `tokenizer.vocab_size` is too small for the characters of the corpus.
    """
    from llmjax.data.tokenizer_train import train_model

    model = train_model(texts, config)
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_FILE).write_text(json.dumps(_SETTINGS, indent=2) + "\n", "utf-8")
    (out / SENTENCEPIECE_FILE).write_bytes(model)
    return Tokenizer(SentencePieceBackend(out / SENTENCEPIECE_FILE), _SETTINGS)
