"""Erasure: documents leave a data folder, every copy of them too, and never come back in a rebuild.

What was asked is kept in erasures.json beside the shards (ids, authors and hashes of content; no text), and whatever
builds the folder again reads it first. The folder itself is rewritten at once with the tokenizer it has: no other
document changes its tokens or its place among the others.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmjax.core.errors import RunError
from llmjax.core.files import write_json
from llmjax.data import shards
from llmjax.data.dedup import content_hash
from llmjax.data.manifest import Manifest, SourceCounts, hash_file
from llmjax.data.shards import TokenStore
from llmjax.data.stage import with_reasons

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "erasures.json"
HASHES = "erased_hashes.json"
REPORT = "curation.html"
REASON = "erased"
PARTIAL = ".erase.partial"


@dataclasses.dataclass(frozen=True)
class Erasures:
    """Everything that must not be in a folder: documents by id, all of an author, and content by its hash."""

    ids: frozenset[str] = frozenset()
    authors: frozenset[str] = frozenset()
    doc_ids: frozenset[str] = frozenset()

    @classmethod
    def load(cls, folder: Path) -> Erasures:
        """What was ever asked of a folder; nothing where there is no list."""
        path = folder / FILE
        return cls(**{name: frozenset(values) for name, values in json.loads(path.read_text()).items()}) if (
            path.exists()) else cls()  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write erasures.json into the folder."""
        write_json(folder / FILE, {name: sorted(values) for name, values in dataclasses.asdict(self).items()})

    def __or__(self, other: Erasures) -> Erasures:
        return Erasures(self.ids | other.ids, self.authors | other.authors, self.doc_ids | other.doc_ids)

    def hit(self, document: dict[str, Any]) -> bool:
        """Whether a document (a row with id, doc_id and perhaps author) must go."""
        return (document["id"] in self.ids or document.get("doc_id") in self.doc_ids
                or document.get("author") in self.authors)


@dataclasses.dataclass(frozen=True)
class Erase:
    """The stage, after cleaning, that keeps erased documents out of a rebuild; copies under other ids too."""

    erasures: Erasures = dataclasses.field(repr=False)  # the manifest names the stage, not what was erased
    name: str = "erase"

    def __call__(self, documents: pa.Table) -> pa.Table:
        columns = (documents[name].to_pylist() for name in ("id", "author", "text"))
        return with_reasons(documents, [
            REASON if self.erasures.hit({"id": id_, "author": author, "doc_id": content_hash(text)}) else None
            for id_, author, text in zip(*columns, strict=True)])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Erased:
    """What an erasure did."""

    ids: list[str]  # documents that were in the shards or held out
    copies: list[str]  # documents that had been dropped as copies of those
    tokens: int
    data_hashes: frozenset[str]  # of the folder whenever it held them: runs know their data by it
    data_hash: str  # now


def erase(folder: Path, asked: Erasures) -> Erased:
    """Take documents, and the listed copies of them, out of a data folder.

    Raises RunError when nothing in the folder, kept or dropped, is what was asked for, or when nothing would be left.
    """
    manifest = Manifest.load(folder)
    rows = {name: _rows(folder / f"{name}.parquet") for name in ("documents", "holdout")}
    gone = [row for table in rows.values() for row in table if asked.hit(row)]
    names = {row["id"] for row in gone} | asked.ids
    dropped = _jsonl(folder / "dropped.jsonl")
    copies = [record["id"] for record in dropped if record.get("kept_id") in names and record["reason"] != REASON]
    if not gone and not any(asked.hit(record) for record in dropped):
        raise RunError(f"{folder}: no document, kept or dropped, is what data erase was asked for")
    if len({row["doc_id"] for row in rows["documents"]} - {row["doc_id"] for row in gone}) == 0:
        raise RunError(f"{folder}: nothing would be left to train on; delete the folder instead")
    complete = Erasures(asked.ids | names | set(copies), asked.authors, frozenset(row["doc_id"] for row in gone))
    (Erasures.load(folder) | complete).save(folder)  # first: a rebuild after a crash heeds it already
    made, tokens = _rewrite(folder, manifest, gone, dropped)
    before = _remember(folder, manifest.hash)
    return Erased(sorted(row["id"] for row in gone), sorted(copies), tokens, before, made.hash)


def _remember(folder: Path, data_hash: str) -> frozenset[str]:
    """The hashes that the folder had before this erasure and earlier ones, none of which is forgotten."""
    path = folder / HASHES
    known = frozenset(json.loads(path.read_text())) if path.exists() else frozenset[str]()
    write_json(path, sorted(known | {data_hash}))
    return known | {data_hash}


def _rewrite(folder: Path, manifest: Manifest, gone: list[dict[str, Any]],
             dropped: list[dict[str, Any]]) -> tuple[Manifest, int]:  # fmt: skip
    """The folder without some documents; there is no manifest while its files change. And the tokens that went."""
    hashes = {row["doc_id"] for row in gone}
    store = TokenStore.open(folder / "shards")
    stays = np.array([store.doc_id(i) not in hashes for i in range(store.num_documents)])
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    kept = _jsonl(folder / "kept.jsonl")
    _write_jsonl(partial / "kept.jsonl", [line for line, stay in zip(kept, stays, strict=True) if stay])
    names = {row["id"] for row in gone}
    lines = [record | {"reason": REASON} if record["reason"] == "held_out" and record["id"] in names else record
             for record in dropped]
    lines += [{"id": line["id"], "source": line["source"], "reason": REASON}
              for line, stay in zip(kept, stays, strict=True) if not stay]
    _write_jsonl(partial / "dropped.jsonl", lines)
    for name in ("documents", "holdout"):
        _filter_parquet(folder / f"{name}.parquet", partial / f"{name}.parquet", lambda doc_id: doc_id not in hashes)
    stored = shards.write_store(partial / "shards", _documents(store, np.flatnonzero(stays)),
                                vocab_size=store.vocab_size)
    changed = _manifest(manifest, partial, stored, lines)
    (folder / "manifest.json").unlink()
    (folder / REPORT).unlink(missing_ok=True)  # it quotes documents
    for piece in sorted(partial.iterdir()):
        target = folder / piece.name
        if target.is_dir():
            shutil.rmtree(target)
        piece.replace(target)
    partial.rmdir()
    changed.save()
    return changed, int(store.lengths[~stays].sum())


def _manifest(before: Manifest, partial: Path, stored: list[shards.Shard],
              dropped: list[dict[str, Any]]) -> Manifest:  # fmt: skip
    """The manifest of the folder that `partial` is about to become."""
    documents, holdout = (_rows(partial / f"{name}.parquet") for name in ("documents", "holdout"))
    tokens = [line["tokens"] for line in _jsonl(partial / "kept.jsonl")]
    new = {path.name: hash_file(path) for path in partial.iterdir() if path.is_file()}
    new |= {"shards/index.json": hash_file(partial / "shards" / "index.json")}
    reasons = [record["reason"] for record in dropped]
    return dataclasses.replace(
        before, num_documents=len(documents), num_tokens=sum(tokens),
        num_bytes=sum(row["num_bytes"] for row in documents), shards=tuple(stored),
        files={name: hash_ for name, hash_ in before.files.items() if name != REPORT} | new,
        sources=_recount(before.sources, documents, tokens), holdout=_recount(before.holdout, holdout, None),
        dropped={reason: reasons.count(reason) for reason in sorted(set(reasons))})  # fmt: skip


def _recount(sources: tuple[SourceCounts, ...], rows: list[dict[str, Any]],
             tokens: list[int] | None) -> tuple[SourceCounts, ...]:  # fmt: skip
    places = {(s.name, s.licence): [i for i, row in enumerate(rows) if (row["source"], row["licence"]) == (
        s.name, s.licence)] for s in sources}  # fmt: skip
    return tuple(dataclasses.replace(
        s, documents=len(found), bytes=sum(rows[i]["num_bytes"] for i in found),
        tokens=None if tokens is None else sum(tokens[i] for i in found))
        for s in sources if (found := places[s.name, s.licence]))  # fmt: skip


def _documents(store: TokenStore, places: np.ndarray) -> Iterator[shards.Document]:
    for place in places.tolist():
        mask = store.mask(place) if store.has_mask else None
        yield shards.Document(store.doc_id(place), store.tokens(place), mask)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file of documents, without their text."""
    import pyarrow.parquet as pq

    columns = [name for name in pq.read_schema(path).names if name != "text"]
    rows: list[dict[str, Any]] = pq.read_table(path, columns=columns).to_pylist()
    return rows


def _filter_parquet(path: Path, out: Path, wanted: Callable[[str], bool]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    with pq.ParquetWriter(out, file.schema_arrow, compression="zstd") as writer:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            writer.write_table(table.filter(pa.array([wanted(doc_id) for doc_id in table["doc_id"].to_pylist()])))


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
