"""`data build`: raw documents to token shards in one call that can be killed at any moment and started again.

A data folder holds shards/, tokenizer/, documents.parquet, holdout.parquet, kept.jsonl, dropped.jsonl and, written
last, manifest.json. Everything is made in a subfolder and moved into place when it is whole.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import itertools
import json
import platform
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

import llmjax
from llmjax.core.errors import RunError
from llmjax.core.sections import DataConfig, TokenizerConfig
from llmjax.data import manifest as manifests
from llmjax.data import shards
from llmjax.data.curate import Corpus, curate
from llmjax.data.manifest import Manifest, SourceCounts
from llmjax.data.progress import Progress, quiet
from llmjax.data.read import Document, Removal
from llmjax.data.registry import Source, find_sources
from llmjax.data.tokenizer import Tokenizer, take_tokenizer, train_tokenizer

PARTIAL = ".data.partial"
ENCODE_DOCUMENTS = 64  # encoded together: enough for the tokenizer's threads, little memory
ROW_GROUP = 1024  # documents in a Parquet row group

# Fields of the data section that say how documents become batches; they leave the folder as it is.
_BATCHING = {"path", "seq_len", "batch_size", "shuffle_seed"}
# What shapes the folder beside the config: our modules and the libraries.
_CODE = ("registry.py", "read.py", "clean.py", "shingles.py", "dedup.py", "curate.py", "tokenizer.py",
         "tokenizer_backends.py", "tokenizer_train.py", "tokenizer_extend.py", "byte_level.py", "shards.py", "build.py")
_VERSIONED = ("numpy", "pyarrow", "sentencepiece", "xxhash")


def data_folder(config: DataConfig, workdir: Path) -> Path:
    """Where a run's data lies: `data.path`, else the workdir when `data build` filled it, else its data/."""
    if config.path:
        return Path(config.path)
    return workdir if (workdir / manifests.FILE).exists() else workdir / "data"


def build(config: DataConfig, tokenizer: TokenizerConfig, out: Path, *, progress: Progress = quiet,
          reuse: Literal["same_config", "same_inputs"] = "same_config") -> Manifest:
    """Make `out` a complete data folder and return its manifest; a folder named by `data.path` is only looked at.

    A complete folder of the same config is left as it is; with `reuse="same_inputs"` only when the files that were read
    still hold the same bytes. Raises RunError for missing files, an empty corpus and a full disk.
    """
    if config.path:
        return Manifest.load(Path(config.path))
    recipe = _recipe(config, tokenizer)
    found = _complete(out, manifests.hash_json(recipe))
    if found and reuse == "same_config":
        return found
    sources = find_sources(config.sources, field="data.sources", licence=config.licence)
    holdouts = find_sources(config.holdouts, field="data.holdouts", licence=config.licence)
    input_hash = _input_hash(sources + holdouts, tokenizer)
    if found and found.input_hash == input_hash:
        return found
    partial = out / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        corpus = curate(config, sources, holdouts, progress=progress)
        made = _write(corpus, sources + holdouts, tokenizer, partial, recipe=recipe, input_hash=input_hash,
                      progress=progress)
        _publish(partial, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"no space left on the disk of {out}: free some, or choose another --workdir; "
                       "nothing unfinished was left there") from None
    progress("done", 1.0, f"{made.num_documents:,} documents, {made.num_tokens:,} tokens in {out}")
    return dataclasses.replace(made, folder=out)


def _recipe(config: DataConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """The fields that shape the folder."""
    data = {name: value for name, value in dataclasses.asdict(config).items() if name not in _BATCHING}
    return {"data": data, "tokenizer": dataclasses.asdict(tokenizer)}


def _complete(out: Path, config_hash: str) -> Manifest | None:
    """The manifest of a complete folder that this config made."""
    if not (out / manifests.FILE).exists():
        return None
    found = Manifest.load(out)
    return found if found.config_hash == config_hash else None


def _input_hash(sources: list[Source], tokenizer: TokenizerConfig) -> str:
    hashes = [(source.name, file.id, manifests.hash_file(file.path)) for source in sources for file in source.files]
    return manifests.hash_json([hashes, Tokenizer.load(Path(tokenizer.path)).hash if tokenizer.path else ""])


def _write(corpus: Corpus, sources: list[Source], config: TokenizerConfig, folder: Path, *, recipe: dict[str, Any],
           input_hash: str, progress: Progress) -> Manifest:
    """Write every file of a data folder, the manifest last."""
    tokenizer = make_tokenizer(corpus.train, config, folder / "tokenizer", progress)
    num_tokens: list[int] = []
    stored = shards.write_store(folder / "shards", _encoded(corpus.train, tokenizer, num_tokens, progress),
                                vocab_size=tokenizer.vocab_size)
    size = sum(document.num_bytes for document in corpus.train)
    progress("encode", 1.0, f"{sum(num_tokens):,} tokens, {size / sum(num_tokens):.2f} bytes a token")
    _write_documents(folder / "documents.parquet", corpus.train)
    _write_documents(folder / "holdout.parquet", corpus.holdout)
    _write_jsonl(folder / "kept.jsonl", ({"id": document.id, "source": document.source, "tokens": tokens}
                                         for document, tokens in zip(corpus.train, num_tokens, strict=True)))
    _write_jsonl(folder / "dropped.jsonl", map(_removal_record, corpus.removals))
    others = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".npy"]
    provenance = {source.name: source.provenance for source in sources}
    made = Manifest(
        folder=folder,
        num_documents=len(corpus.train),
        num_tokens=sum(num_tokens),
        num_bytes=size,
        sources=_count_sources(corpus.train, num_tokens, provenance),
        holdout=_count_sources(corpus.holdout, None, provenance),
        read=corpus.read,
        dropped=corpus.dropped,
        encodings=corpus.encodings,
        shards=tuple(stored),
        tokenizer_hash=tokenizer.hash,
        files={path.relative_to(folder).as_posix(): manifests.hash_file(path) for path in others},
        config=recipe,
        config_hash=manifests.hash_json(recipe),
        input_hash=input_hash,
        code_hash=manifests.hash_json([manifests.hash_file(Path(__file__).with_name(name)) for name in _CODE]),
        versions=_versions())
    made.save()
    return made


def make_tokenizer(documents: list[Document], config: TokenizerConfig, folder: Path, progress: Progress) -> Tokenizer:
    """The configured tokenizer, saved in `folder`; a new one learns from training documents alone."""
    progress("tokenizer", 0.0)
    # In the order of their hashes, whatever prefix the trainer reads is a fair sample of all sources.
    shuffled = sorted(documents, key=lambda document: document.doc_id)
    make = take_tokenizer if config.path else train_tokenizer
    tokenizer = make((document.text for document in shuffled), config, folder)
    progress("tokenizer", 1.0, f"{tokenizer.vocab_size:,} pieces, {'loaded' if config.path else 'trained'}")
    return tokenizer


def _encoded(documents: list[Document], tokenizer: Tokenizer, num_tokens: list[int],
             progress: Progress) -> Iterator[shards.Document]:
    """Each document between its begin and end tokens; `num_tokens` collects their lengths."""
    for start in range(0, len(documents), ENCODE_DOCUMENTS):
        group = documents[start:start + ENCODE_DOCUMENTS]
        for document, ids in zip(group, tokenizer.encode_batch([d.text for d in group]), strict=True):
            tokens = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]])
            num_tokens.append(len(tokens))
            yield shards.Document(document.doc_id, tokens)
        progress("encode", min(0.99, len(num_tokens) / len(documents)))


def _write_documents(path: Path, documents: list[Document]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ("doc_id", "id", "text", "source", "licence", "path")
    schema = pa.schema([(name, pa.string()) for name in columns] + [("num_bytes", pa.int64())])
    rows = {name: [getattr(document, name) for document in documents] for name in schema.names}
    pq.write_table(pa.table(rows, schema=schema), path, compression="zstd", row_group_size=ROW_GROUP)


def _removal_record(removal: Removal) -> dict[str, Any]:
    record = dataclasses.asdict(removal)
    return record if removal.kept_id else {name: record[name] for name in ("id", "source", "reason")}


def _write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _count_sources(documents: list[Document], num_tokens: list[int] | None,
                   provenance: dict[str, str]) -> tuple[SourceCounts, ...]:
    """Counts by source and licence, in the order in which they first appear."""
    members: dict[tuple[str, str], list[int]] = {}
    for i, document in enumerate(documents):
        members.setdefault((document.source, document.licence), []).append(i)
    return tuple(SourceCounts(name, licence, provenance[name], len(places), sum(documents[i].num_bytes for i in places),
                              sum(num_tokens[i] for i in places) if num_tokens else None)
                 for (name, licence), places in members.items())


def _versions() -> dict[str, str]:
    ours = {"llmjax": llmjax.__version__, "python": platform.python_version()}
    return ours | {name: importlib.metadata.version(name) for name in _VERSIONED}


def _publish(partial: Path, out: Path) -> None:
    """Move a finished folder's pieces into place; while they change there is no manifest."""
    last = partial / manifests.FILE
    (out / manifests.FILE).unlink(missing_ok=True)
    for piece in itertools.filterfalse(last.__eq__, sorted(partial.iterdir())):
        target = out / piece.name
        if target.is_dir():
            shutil.rmtree(target)
        piece.replace(target)
    last.replace(out / manifests.FILE)
    partial.rmdir()
