"""Text to token ids and back, exactly: SentencePiece, `tokenizer.json` and tiktoken, behind one class."""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmjax.core.errors import RunError
from llmjax.core.sections import TokenizerConfig
from llmjax.data import byte_level
from llmjax.data.tokenizer_backends import BACKENDS, HUGGINGFACE_FILE, SENTENCEPIECE_FILE, Backend

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TIKTOKEN = "tiktoken:"  # before the name of an encoding, in place of a folder

# One `<role>: <content>` line a message, closed by the end token where the assistant spoke.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

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
        """Reads a tokenizer folder, the one inside a workdir, or `tiktoken:NAME`; RunError where there is none."""
        if str(folder).startswith(TIKTOKEN):
            return _from_tiktoken(byte_level.named_tiktoken(str(folder).removeprefix(TIKTOKEN)), {})
        for place in (folder, folder / "tokenizer"):
            for name, backend in BACKENDS.items():
                if (place / name).is_file():
                    return cls(backend((place / name).read_bytes()), _read_settings(place))
            for file in sorted(place.glob("*.tiktoken")):
                return _from_tiktoken(byte_level.read_tiktoken(file), _read_settings(place, default={}))
        raise RunError(
            f"no tokenizer in {folder}: neither {HUGGINGFACE_FILE} nor {SENTENCEPIECE_FILE} nor a .tiktoken is there"
        )

    def save(self, folder: Path) -> None:
        """Writes the tokenizer as a folder that `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self._backend.file).write_bytes(self._backend.contents)
        (folder / CONFIG_FILE).write_text(json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n", "utf-8")

    @property
    def file(self) -> str:
        """The name of the file that defines it."""
        return self._backend.file

    @property
    def contents(self) -> bytes:
        """What that file holds."""
        return self._backend.contents

    def with_contents(self, contents: bytes) -> Tokenizer:
        """The same special tokens and chat template over another definition."""
        return Tokenizer(type(self._backend)(contents), self._settings)

    def encode(self, text: str, *, specials: Literal["text", "parse"] = "text") -> list[int]:
        """Token ids of a text, none added; with "parse", what spells a special token becomes it (chat templates).

        Raises:
            ValueError: the text holds a lone surrogate, which no encoding of Unicode can write.
        """
        refuse_surrogates(text)
        if specials == "parse":
            return self._backend.encode_parsed(text)
        return self._backend.encode_batch([text])[0].tolist()

    def encode_bytes(self, raw: bytes) -> list[int]:
        """Token ids of any bytes: those of the text where they are UTF-8, one a byte where they are not."""
        parts = re.split("([\udc80-\udcff])", raw.decode("utf-8", "surrogateescape"))
        alone = self._byte_ids
        return [
            token
            for i, part in enumerate(parts)
            for token in ((alone[part.encode("utf-8", "surrogateescape")],) if i % 2 else self.encode(part))
        ]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of many texts, int32, in as many threads as there are cores."""
        for text in texts:
            refuse_surrogates(text)
        return self._backend.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of token ids without special tokens; they may end inside a character."""
        table = self.token_bytes
        return b"".join(table[int(i)] for i in ids)

    def token_id(self, token: str) -> int | None:
        """The id of a special token by its name; None where there is none."""
        return self._backend.token_to_id(token)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; empty for special tokens."""
        return self._backend.token_bytes()

    @functools.cached_property
    def _byte_ids(self) -> dict[bytes, int]:
        return {piece: i for i, piece in enumerate(self.token_bytes) if len(piece) == 1}

    @functools.cached_property
    def chat_template(self) -> str:
        """The Jinja2 template of conversations; a plain one, said once, where the tokenizer brings none."""
        if not self._settings.get("chat_template"):
            _log.warning("the tokenizer has no chat template: using one `<role>: <content>` line a message")
        return self._settings.get("chat_template") or DEFAULT_CHAT_TEMPLATE

    @functools.cached_property
    def hash(self) -> str:
        """Changes whenever the ids of some text would: a hash of the model file and of the special ids."""
        digest = hashlib.sha256(self._backend.contents)
        digest.update(repr((self.bos_id, self.eos_id, self.pad_id)).encode())
        return digest.hexdigest()[:32]

    def _special(self, name: str, *, default: str = "") -> tuple[str, int]:
        entry = self._settings.get(name) or self._settings.get(default)
        token = entry["content"] if isinstance(entry, Mapping) else entry
        if token is None:
            raise RunError(f"{CONFIG_FILE}: {default or name} is missing; name one of the tokenizer's tokens")
        index = self._backend.token_to_id(token)
        if index is None:
            raise RunError(f"{CONFIG_FILE}: {name} is {token!r}, which {self._backend.file} does not have")
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


_SETTINGS: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "chat_template": DEFAULT_CHAT_TEMPLATE,
}


def _from_tiktoken(definition: dict[str, Any], settings: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer of tiktoken's, which names no end-of-text token but has one."""
    specials = [token["content"] for token in definition["added_tokens"]]
    end = byte_level.END_OF_TEXT if byte_level.END_OF_TEXT in specials else specials[-1]
    backend = BACKENDS[HUGGINGFACE_FILE](json.dumps(definition, ensure_ascii=False).encode())
    return Tokenizer(backend, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end} | dict(settings))


def _read_settings(folder: Path, default: Mapping[str, Any] = _SETTINGS) -> dict[str, Any]:
    """`tokenizer_config.json` with the chat template, which newer folders keep in a file of its own."""
    config, template = folder / CONFIG_FILE, folder / TEMPLATE_FILE
    settings: dict[str, Any] = json.loads(config.read_text("utf-8")) if config.is_file() else dict(default)
    return settings | ({"chat_template": template.read_text("utf-8")} if template.is_file() else {})


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, out: Path) -> Tokenizer:
    """Trains a tokenizer on a sample of the texts, the same in whatever order they come, into the folder `out`.

    Raises:
        RunError: there is no text.
        ConfigError: `tokenizer.vocab_size` is too small for the characters of the corpus.
    """
    from llmjax.data.tokenizer_train import TRAINERS

    file = HUGGINGFACE_FILE if config.kind == "byte_bpe" else SENTENCEPIECE_FILE
    tokenizer = Tokenizer(BACKENDS[file](TRAINERS[config.kind](texts, config)), _SETTINGS)
    tokenizer.save(out)
    return tokenizer


def take_tokenizer(texts: Iterable[str], config: TokenizerConfig, out: Path) -> Tokenizer:
    """The tokenizer that `tokenizer.path` names, in the folder `out`; extended on the texts where that is asked for."""
    tokenizer = Tokenizer.load(Path(config.path))
    if config.extend_by:
        from llmjax.data.tokenizer_extend import extended

        tokenizer = extended(tokenizer, texts, config)
    tokenizer.save(out)
    return tokenizer
