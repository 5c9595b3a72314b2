"""Examples in JSON lines to a token store with loss masks, for supervised fine-tuning.

A line is {"messages": [...]}, or {"prompt", "completion"} as two texts or two lists of messages. Texts are joined as
they are, between the begin and end tokens; messages go through the chat template. Packed best-fit, a conversation is
never cut as long as it fits in a row; one that does not is cut like any long document.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmjax.core.errors import RunError
from llmjax.core.processes import first_alone
from llmjax.data.chat import EncodedChat, check_messages, encode_chat
from llmjax.data.shards import Document, TokenStore, write_store

if TYPE_CHECKING:
    from llmjax.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Line:
    """One JSON object of a file and where it stands."""

    path: Path
    number: int  # from 1
    value: dict[str, Any]

    def error(self, what: object) -> RunError:
        return RunError(f"{self.path} line {self.number}: {what}")


def read_lines(paths: Sequence[Path]) -> Iterator[Line]:
    """The objects of JSONL files, .gz or not; empty lines are passed over, anything else is a RunError."""
    for path in paths:
        try:
            with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
                for number, raw in enumerate(file, start=1):
                    if raw.strip():
                        yield Line(path, number, _parse(path, number, raw))
        except (OSError, EOFError) as error:
            raise RunError(f"{path} cannot be read: {error}") from error


def chat_store(paths: Sequence[Path], tokenizer: Tokenizer, folder: Path) -> TokenStore:
    """The examples of `paths` as a masked store in `folder`; built again only when they or the tokenizer changed."""
    return cached_store(folder, paths, tokenizer, lambda: _documents(paths, tokenizer))


def cached_store(folder: Path, paths: Sequence[Path], tokenizer: Tokenizer,
                 documents: Callable[[], Iterator[Document]]) -> TokenStore:
    """The store in `folder` if it was made of the same files with the same tokenizer, else a new one."""
    def make() -> None:
        key = _fingerprint(paths, tokenizer)
        note = folder / "made_of.txt"
        if not note.is_file() or note.read_text() != key:
            write_store(folder, documents(), vocab_size=tokenizer.vocab_size)
            note.write_text(key)
            _log.info("%s: %d examples", folder, TokenStore.open(folder).num_documents)

    first_alone(f"store {folder.name}", make)
    return TokenStore.open(folder)


def encode_example(line: Line, tokenizer: Tokenizer) -> EncodedChat:
    """Tokens of one example, the loss on the assistant's tokens or on the completion."""
    value = line.value
    try:
        if "messages" in value:
            check_messages(value["messages"])
            return encode_chat(value["messages"], tokenizer)
        if "prompt" in value and "completion" in value:
            return encode_completion(value["prompt"], value["completion"], tokenizer)
    except ValueError as error:
        raise line.error(error) from error
    raise line.error("neither messages nor prompt and completion; it has " + (", ".join(value) or "no fields"))


def encode_completion(prompt: Any, completion: Any, tokenizer: Tokenizer) -> EncodedChat:
    """Prompt and completion, both texts or both lists of messages; only the completion is learnt."""
    if isinstance(prompt, str) and isinstance(completion, str):
        before = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        after = [*tokenizer.encode(completion), tokenizer.eos_id]
        return EncodedChat(np.array(before + after, np.int32), np.repeat([False, True], [len(before), len(after)]))
    for messages in (prompt, completion):
        check_messages(messages)
    return encode_chat([*prompt, *completion], tokenizer, learn_from=len(prompt))


def example_id(line: Line, part: str) -> bytes:
    """16 bytes that follow from the content of a line (and name a part of it)."""
    import xxhash

    return xxhash.xxh3_128_digest((part + json.dumps(line.value, sort_keys=True)).encode())


def _documents(paths: Sequence[Path], tokenizer: Tokenizer) -> Iterator[Document]:
    skipped = 0
    for line in read_lines(paths):
        chat = encode_example(line, tokenizer)
        if chat.mask[1:].any():
            yield Document(example_id(line, ""), chat.tokens, chat.mask)
        else:
            skipped += 1
    if skipped:
        _log.warning("%d examples left out: the assistant says nothing in them", skipped)


def _parse(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError as error:  # of JSON, or of UTF-8
        raise RunError(f"{path} line {number}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} line {number}: a JSON {type(value).__name__}, an object is needed")
    return value


def _fingerprint(paths: Sequence[Path], tokenizer: Tokenizer) -> str:
    import xxhash

    digest = xxhash.xxh3_128((tokenizer.hash + tokenizer.chat_template).encode())
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, xxhash.xxh3_128).digest())
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
