"""`data build`: raw documents to token shards in one call that can be killed at any moment and started again.

A data folder holds shards/, tokenizer/, documents.parquet, holdout.parquet, kept.jsonl, dropped.jsonl, curation.html
and, written last, manifest.json. Everything is made in a subfolder and moved into place when it is whole; there a
killed build finds the units of the corpus that it had finished.
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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import llmjax
from llmjax.core.errors import RunError
from llmjax.core.sections import DataConfig, TokenizerConfig
from llmjax.data import curation_report, shards
from llmjax.data import manifest as manifests
from llmjax.data.corpus import Corpus
from llmjax.data.curate import curate
from llmjax.data.embedded import Embedded
from llmjax.data.erase import Erase, Erasures
from llmjax.data.manifest import Manifest, SourceCounts
from llmjax.data.progress import Progress, quiet
from llmjax.data.registry import Source, find_sources
from llmjax.data.stage import Engine
from llmjax.data.tokenizer import Tokenizer, take_tokenizer, train_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

PARTIAL = ".data.partial"
ENCODE_DOCUMENTS = 64  # encoded together: enough for the tokenizer's threads, little memory
ROW_GROUP = 1024  # documents in a Parquet row group

_COLUMNS = ("doc_id", "id", "text", "source", "licence", "path", "author", "url")
_INNER = {*_COLUMNS, "order", "kind", "encoding", "reason"}  # columns of curation that are not written as scores

# Fields of the data section that say how documents become batches; they leave the folder as it is.
_BATCHING = {"path", "seq_len", "target_len", "batch_size", "shuffle_seed", "mixture", "temperature", "curriculum",
             "mix_every", "mix_rate"}
# What shapes the folder beside the config: our modules and the libraries.
_CODE = ("registry.py", "governance.py", "read.py", "formats.py", "clean.py", "boilerplate.py", "filters.py",
         "census.py", "repeats.py", "language.py", "quality.py", "words.py", "compiled_words.py", "repetition.py",
         "scoring.py", "pii.py", "shingles.py", "compiled.py", "dedup.py", "lsh_bloom.py", "decontaminate.py",
         "units.py", "corpus.py", "curate.py", "embedded.py", "tokenizer.py", "tokenizer_backends.py",
         "tokenizer_train.py", "tokenizer_extend.py", "byte_level.py", "shards.py", "build.py")
_VERSIONED = ("numpy", "pyarrow", "sentencepiece", "xxhash")


def data_folder(config: DataConfig, workdir: Path) -> Path:
    """Where a run's data lies: `data.path`, else the workdir when `data build` filled it, else its data/."""
    if config.path:
        return Path(config.path)
    return workdir if (workdir / manifests.FILE).exists() else workdir / "data"


def build(config: DataConfig, tokenizer: TokenizerConfig, out: Path, *, engine: Engine | None = None,
          progress: Progress = quiet, reuse: Literal["same_config", "same_inputs"] = "same_config") -> Manifest:
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
    sources, holdouts = (
        find_sources(spec, field=field, licence=config.licence, registry=config.curation.registry)
        for spec, field in ((config.sources, "data.sources"), (config.holdouts, "data.holdouts")))
    input_hash = _input_hash(sources + holdouts, tokenizer)
    if found and found.input_hash == input_hash:
        return found
    erasures = Erasures.load(out)
    partial = _partial_folder(out, manifests.hash_json([recipe, input_hash, code_hash(), sorted(erasures.doc_ids),
                                                     sorted(erasures.ids), sorted(erasures.authors)]))
    try:
        (partial / "made").mkdir(parents=True)
        corpus = curate(config, sources, holdouts, partial / "units", engine=engine or Embedded(),
                        extra=(Erase(erasures),) if erasures != Erasures() else (), progress=progress)
        made = _write(corpus, sources + holdouts, tokenizer, partial / "made", recipe=recipe, input_hash=input_hash,
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


def _partial_folder(out: Path, key: str) -> Path:
    """Where a build is made; what an earlier one left stays there if it was of the same inputs, config and code."""
    partial = out / PARTIAL
    stamp = partial / "key"
    if not stamp.exists() or stamp.read_text() != key:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        stamp.write_text(key)
    shutil.rmtree(partial / "made", ignore_errors=True)
    return partial


def code_hash() -> str:
    """Of the modules that shape a data folder."""
    return manifests.hash_json([manifests.hash_file(Path(__file__).with_name(name)) for name in _CODE])


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
    files = [(source.name, file.id, path) for source in sources for file in source.files for path in file.parts()]
    hashes = [(name, id_, manifests.hash_file(path)) for name, id_, path in files]
    return manifests.hash_json([hashes, Tokenizer.load(Path(tokenizer.path)).hash if tokenizer.path else ""])


def _write(corpus: Corpus, sources: list[Source], config: TokenizerConfig, folder: Path, *, recipe: dict[str, Any],
           input_hash: str, progress: Progress) -> Manifest:
    """Write every file of a data folder, the manifest last."""
    tokenizer = make_tokenizer(corpus, config, folder / "tokenizer", progress)
    num_documents = corpus.read - sum(corpus.dropped.values())
    num_tokens: list[int] = []
    stored = shards.write_store(folder / "shards", _encoded(corpus, tokenizer, num_tokens, num_documents, progress),
                                vocab_size=tokenizer.vocab_size)
    train = _write_documents(folder / "documents.parquet", corpus.tables("train"))
    holdout = _write_documents(folder / "holdout.parquet", corpus.tables("holdout", columns=(*_COLUMNS, "order")))
    size = sum(train.sizes)
    progress("encode", 1.0, f"{sum(num_tokens):,} tokens, {size / sum(num_tokens):.2f} bytes a token")
    _write_jsonl(folder / "kept.jsonl", ({"id": id_, "source": source, "tokens": tokens} for id_, (source, _), tokens
                                         in zip(train.ids, train.origins, num_tokens, strict=True)))
    _write_jsonl(folder / "dropped.jsonl", corpus.removal_records())
    curation_report.write(folder / curation_report.FILE, corpus)
    others = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".npy"]
    provenance = {source.name: source.provenance for source in sources}
    made = Manifest(
        folder=folder,
        num_documents=num_documents,
        num_tokens=sum(num_tokens),
        num_bytes=size,
        sources=_count_sources(train, num_tokens, provenance),
        holdout=_count_sources(holdout, None, provenance),
        read=corpus.read,
        dropped=corpus.dropped,
        encodings=corpus.encodings,
        stages=tuple(f"{stage!r}" for stage in corpus.stages),
        benchmarks=corpus.benchmarks,
        shards=tuple(stored),
        tokenizer_hash=tokenizer.hash,
        files={path.relative_to(folder).as_posix(): manifests.hash_file(path) for path in others},
        config=recipe,
        config_hash=manifests.hash_json(recipe),
        input_hash=input_hash,
        code_hash=code_hash(),
        versions=_versions())
    made.save()
    return made


def make_tokenizer(corpus: Corpus, config: TokenizerConfig, folder: Path, progress: Progress) -> Tokenizer:
    """The configured tokenizer, saved in `folder`; a new one learns from training documents alone."""
    progress("tokenizer", 0.0)
    make = take_tokenizer if config.path else train_tokenizer
    tokenizer = make(_sample(corpus, config.train_bytes), config, folder)
    progress("tokenizer", 1.0, f"{tokenizer.vocab_size:,} pieces, {'loaded' if config.path else 'trained'}")
    return tokenizer


def _sample(corpus: Corpus, num_bytes: int) -> list[str]:
    """At least `num_bytes` of training text, or all: a fair sample of every source, the order of content hashes."""
    import pyarrow as pa

    held: list[pa.Table] = []
    size = 0
    for table in corpus.tables("train", columns=("text", "doc_id")):
        held.append(table)
        size += table["text"].nbytes
        if size > 4 * num_bytes:
            held, size = [_first(pa.concat_tables(held), num_bytes)], num_bytes
    sample = _first(pa.concat_tables(held), num_bytes)
    return sample["text"].to_pylist()


def _first(table: pa.Table, num_bytes: int) -> pa.Table:
    """The rows of the smallest hashes that together hold `num_bytes`, in the order of their hashes."""
    import pyarrow.compute as pc

    order = pc.sort_indices(table["doc_id"])
    sizes = np.cumsum(pc.binary_length(table["text"].take(order)).to_numpy())
    return table.take(order[:int(np.searchsorted(sizes, num_bytes)) + 1])


def _encoded(corpus: Corpus, tokenizer: Tokenizer, num_tokens: list[int], num_documents: int,
             progress: Progress) -> Iterator[shards.Document]:
    """Each document between its begin and end tokens; `num_tokens` collects their lengths."""
    for table in corpus.tables("train", columns=("doc_id", "text")):
        for batch in table.to_batches(ENCODE_DOCUMENTS):
            doc_ids, texts = batch["doc_id"].to_pylist(), batch["text"].to_pylist()
            for doc_id, ids in zip(doc_ids, tokenizer.encode_batch(texts), strict=True):
                tokens = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]])
                num_tokens.append(len(tokens))
                yield shards.Document(doc_id, tokens)
            progress("encode", min(0.99, len(num_tokens) / num_documents))


@dataclasses.dataclass
class _Written:
    """What is remembered of a file of documents: a few numbers of each."""

    ids: list[str] = dataclasses.field(default_factory=list)
    sizes: list[int] = dataclasses.field(default_factory=list)
    origins: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # source and licence


def _write_documents(path: Path, tables: Iterable[pa.Table]) -> _Written:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    written, writer = _Written(), None
    for table in tables:
        sizes = pc.cast(pc.binary_length(table["text"]), pa.int64())
        rows = table.select([*_COLUMNS, *(name for name in table.column_names if name not in _INNER)])
        rows = rows.append_column("num_bytes", sizes)
        writer = writer or pq.ParquetWriter(path, rows.schema, compression="zstd")
        writer.write_table(rows, row_group_size=ROW_GROUP)
        written.ids += rows["id"].to_pylist()
        written.sizes += sizes.to_pylist()
        written.origins += zip(rows["source"].to_pylist(), rows["licence"].to_pylist(), strict=True)
    if writer is None:
        schema = pa.schema([(name, pa.string()) for name in _COLUMNS] + [("num_bytes", pa.int64())])
        writer = pq.ParquetWriter(path, schema, compression="zstd")
    writer.close()
    return written


def _write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _count_sources(written: _Written, num_tokens: list[int] | None,
                   provenance: dict[str, str]) -> tuple[SourceCounts, ...]:
    """Counts by source and licence, in the order in which they first appear."""
    members: dict[tuple[str, str], list[int]] = {}
    for i, origin in enumerate(written.origins):
        members.setdefault(origin, []).append(i)
    return tuple(SourceCounts(name, licence, provenance[name], len(places), sum(written.sizes[i] for i in places),
                              sum(num_tokens[i] for i in places) if num_tokens else None)
                 for (name, licence), places in members.items())


def _versions() -> dict[str, str]:
    ours = {"llmjax": llmjax.__version__, "python": platform.python_version()}
    return ours | {name: importlib.metadata.version(name) for name in _VERSIONED}


def _publish(partial: Path, out: Path) -> None:
    """Move a finished folder's pieces into place; while they change there is no manifest."""
    made = partial / "made"
    last = made / manifests.FILE
    (out / manifests.FILE).unlink(missing_ok=True)
    for piece in itertools.filterfalse(last.__eq__, sorted(made.iterdir())):
        target = out / piece.name
        if target.is_dir():
            shutil.rmtree(target)
        piece.replace(target)
    last.replace(out / manifests.FILE)
    shutil.rmtree(partial)
