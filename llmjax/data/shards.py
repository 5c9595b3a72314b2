"""Token shards: documents as flat integer files on disk, read through memory maps.

A store is a folder of numbered shards and an `index.json`. A shard is a folder of `.npy` files: `tokens` (uint16, or
uint32 when the vocabulary needs it), `offsets` (document i is tokens[offsets[i]:offsets[i + 1]]), `doc_ids` (16 bytes
each) and, where not every token is learnt, `mask`. The `.npy` header carries dtype and length, so a truncated or
foreign file is refused when it is mapped, and any numpy reads the files without us. The whole store is written beside
its final place and renamed: a folder with an `index.json` is complete.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llmjax.core.errors import RunError

DEFAULT_SHARD_TOKENS = 16_777_216  # one shard is buffered in memory while it is written: 32 MB of uint16
DOC_ID_BYTES = 16  # xxh3-128


@dataclasses.dataclass(frozen=True)
class Document:
    """One document to store: its tokens as they will be read back (begin and end tokens included)."""

    doc_id: bytes | str  # 16 bytes, or the same as 32 hexadecimal digits
    tokens: np.ndarray  # (n,) integers
    mask: np.ndarray | None = None  # (n,) bool: which tokens are learnt; None: all


@dataclasses.dataclass(frozen=True)
class Shard:
    """What the manifest says about one shard; `hash` covers every file of it."""

    path: str  # folder, relative to the store
    tokens: int
    documents: int
    hash: str


def write_store(folder: Path, documents: Iterable[Document], *, vocab_size: int,
                shard_tokens: int = DEFAULT_SHARD_TOKENS) -> list[Shard]:
    """Stream `documents` into shards of about `shard_tokens` tokens; replaces what `folder` held.

    Raises RunError for an empty stream, a token outside of the vocabulary, or a mask on some documents only.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    shards: list[Shard] = []
    for chunk in _chunks(_checked(documents, vocab_size), shard_tokens):
        shards.append(_write_shard(partial / f"{len(shards):05d}", chunk, dtype))
    if not shards:
        raise RunError(f"no documents to store in {folder}: the corpus is empty")
    index = {"vocab_size": vocab_size, "shards": [dataclasses.asdict(shard) for shard in shards]}
    (partial / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return shards


def shard_hash(folder: Path) -> str:
    """xxh3-128 over the files of one shard, in the order of their names."""
    import xxhash

    digest = xxhash.xxh3_128()
    for path in sorted(folder.glob("*.npy")):
        digest.update(path.name.encode())
        digest.update(np.memmap(path, np.uint8, "r").data)
    return digest.hexdigest()


class TokenStore:
    """Read access to a store by global document index, in the order in which documents were written."""

    def __init__(self, folder: Path, shards: list[Shard], vocab_size: int):
        self.folder, self.shards, self.vocab_size = folder, shards, vocab_size
        self._tokens = [_map(folder / s.path / "tokens.npy") for s in shards]
        self._offsets = [_map(folder / s.path / "offsets.npy") for s in shards]
        self._doc_ids = [_map(folder / s.path / "doc_ids.npy") for s in shards]
        self.has_mask = bool(shards) and (folder / shards[0].path / "mask.npy").exists()
        self._masks = [_map(folder / s.path / "mask.npy") for s in shards] if self.has_mask else []
        # The global index of each shard's first document.
        self._first = [0, *itertools.accumulate(s.documents for s in shards)]

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Map the store in `folder`; raises RunError when there is no complete one."""
        try:
            index = json.loads((folder / "index.json").read_text())
        except FileNotFoundError:
            raise RunError(f"{folder} holds no complete token store (index.json is missing): build the data again"
                           ) from None
        return cls(folder, [Shard(**shard) for shard in index["shards"]], index["vocab_size"])

    @property
    def num_documents(self) -> int:
        return self._first[-1]

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) int64: tokens of each document."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets])

    @property
    def shard_tokens(self) -> list[np.ndarray]:
        """The tokens of each shard, one document after the other, as views of the files."""
        return self._tokens

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document, as a view of the file."""
        shard, window = self._window(document, start, stop)
        return self._tokens[shard][window]

    def mask(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Which of tokens [start, stop) are learnt: (n,) bool."""
        shard, window = self._window(document, start, stop)
        return self._masks[shard][window] if self.has_mask else np.ones(window.stop - window.start, bool)

    def doc_id(self, document: int) -> str:
        """The document's id, as hexadecimal digits."""
        shard = self._shard_of(document)
        return self._doc_ids[shard][document - self._first[shard]].tobytes().hex()

    def shard_of(self, document: int) -> str:
        """The folder, relative to the store, of the shard that holds a document."""
        return self.shards[self._shard_of(document)].path

    def locate(self, position: int) -> tuple[int, int]:
        """The document that token `position` of the whole store belongs to, and its place in it."""
        starts = [0, *itertools.accumulate(shard.tokens for shard in self.shards)]
        shard = bisect.bisect_right(starts, position) - 1
        local = position - starts[shard]
        document = int(np.searchsorted(self._offsets[shard], local, "right")) - 1
        return self._first[shard] + document, local - int(self._offsets[shard][document])

    def verify(self) -> None:
        """Raise RunError when a shard's files are not those that were written."""
        for shard in self.shards:
            if (found := shard_hash(self.folder / shard.path)) != shard.hash:
                raise RunError(f"shard {self.folder / shard.path} has hash {found}, its index says {shard.hash}: "
                               "it was damaged or replaced; build the data again")

    def _shard_of(self, document: int) -> int:
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document}: the store holds {self.num_documents}")
        return bisect.bisect_right(self._first, document) - 1

    def _window(self, document: int, start: int, stop: int | None) -> tuple[int, slice]:
        shard = self._shard_of(document)
        offsets, local = self._offsets[shard], document - self._first[shard]
        begin, end = offsets.item(local), offsets.item(local + 1)
        return shard, slice(min(begin + start, end), end if stop is None else min(begin + stop, end))


def _map(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, mmap_mode="r"))  # a plain view: slicing a np.memmap object is slower
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as a token shard ({error}): build the data again") from error


def _checked(documents: Iterable[Document], vocab_size: int) -> Iterator[Document]:
    masked: bool | None = None
    for document in documents:
        tokens = np.asarray(document.tokens)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise RunError(f"document {_id_bytes(document.doc_id).hex()} holds token {tokens.max()}, but the "
                           f"vocabulary ends at {vocab_size - 1}: was it encoded with another tokenizer?")
        masked = document.mask is not None if masked is None else masked
        mask_length = len(tokens) if document.mask is None else len(document.mask)
        if masked != (document.mask is not None) or mask_length != len(tokens):
            raise RunError(f"document {_id_bytes(document.doc_id).hex()}: every document of a store carries a mask as "
                           "long as its tokens, or none does")
        yield document


def _chunks(documents: Iterable[Document], shard_tokens: int) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.tokens)
        if size >= shard_tokens:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _write_shard(folder: Path, documents: list[Document], dtype: type) -> Shard:
    folder.mkdir()
    offsets = np.cumsum([0] + [len(document.tokens) for document in documents], dtype=np.int64)
    ids = b"".join(_id_bytes(document.doc_id) for document in documents)
    np.save(folder / "tokens.npy", np.concatenate([np.asarray(d.tokens).astype(dtype) for d in documents]))
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "doc_ids.npy", np.frombuffer(ids, np.uint8).reshape(-1, DOC_ID_BYTES))
    if documents[0].mask is not None:
        np.save(folder / "mask.npy", np.concatenate([np.asarray(d.mask, bool) for d in documents]))
    return Shard(folder.name, int(offsets[-1]), len(documents), shard_hash(folder))


def _id_bytes(doc_id: bytes | str) -> bytes:
    raw = bytes.fromhex(doc_id) if isinstance(doc_id, str) else doc_id
    if len(raw) != DOC_ID_BYTES:
        raise ValueError(f"doc_id {doc_id!r}: {len(raw)} bytes, {DOC_ID_BYTES} (or twice as many digits) are needed")
    return raw
