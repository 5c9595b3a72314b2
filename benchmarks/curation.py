"""Curation beside datatrove, dolma and datasketch: the same stages over the same documents, one after the other.

    python benchmarks/curation.py CORPUS [--part=4] [--peer-python=PYTHON] [--only=near-llmjax,...] [--json=FILE]

CORPUS: a folder of Parquet files with the columns `id` and `text`. Stages that peers have too see its first `--part`
files, the build sees all. Every variant is a process of its own on one thread; its CPU-seconds count from the moment
the texts are in memory, its peak memory holds them. Peers may live in another environment (`--peer-python`); one that
is not installed is said to be missing.

Near-duplicates are judged by every pair of documents with a Jaccard similarity of at least 0.7, found exhaustively with
another implementation of the shingles: recall is the share of those pairs of which a document was removed, precision
the share of removed documents that have such a pair.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from near_truth import JACCARD, WORDS, judge, true_pairs

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER_SHARE = 4  # one in so many documents trains the tokenizer
BUCKETS, ROWS = 14, 8  # of datatrove, its own default: 112 hashes
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

Texts = list[str]
Removed = list[int]  # places of documents that do not stay


@dataclasses.dataclass(frozen=True)
class Variant:
    """A stage of one library: called with all texts and an empty folder, it returns what it removed, if anything."""

    stage: str
    library: str
    call: Callable[[Texts, Path], Removed | None]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    reads: Literal["part", "all"] = "part"  # of the files


def near_llmjax(texts: Texts, folder: Path) -> Removed:
    """Sketches, bands, the exact check and groups."""
    from llmjax.data.dedup import near_duplicates

    return list(near_duplicates(texts, threshold=JACCARD))


def near_datatrove(texts: Texts, folder: Path) -> Removed:
    """Its four stages, by document."""
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature

    config = MinhashConfig(n_grams=WORDS, num_buckets=BUCKETS, hashes_per_bucket=ROWS)
    sigs, pairs, removed = (str(folder / name) for name in ("signatures", "pairs", "removed"))
    MinhashDedupSignature(sigs, config=config).run(_datatrove_documents(texts), 0, 1)
    for bucket in range(BUCKETS):
        MinhashDedupBuckets(sigs, pairs, config=config).run(None, bucket, BUCKETS)
    MinhashDedupCluster(pairs, removed, config=config).run(None, 0, 1)
    kept = {int(document.id) for document in MinhashDedupFilter(removed).run(_datatrove_documents(texts), 0, 1)}
    return [i for i in range(len(texts)) if i not in kept]


def near_datasketch(texts: Texts, folder: Path) -> Removed:
    """Signatures of 112 permutations, inserted into its index after asking it; what has a match goes."""
    import re

    from datasketch import MinHash, MinHashLSH

    index, removed = MinHashLSH(threshold=JACCARD, num_perm=BUCKETS * ROWS), []
    for i, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        shingles = {" ".join(words[k : k + WORDS]).encode() for k in range(max(len(words) - WORDS + 1, 1))}
        signature = MinHash(num_perm=BUCKETS * ROWS)
        signature.update_batch(list(shingles))
        if index.query(signature):
            removed.append(i)
        index.insert(str(i), signature)
    return removed


def exact_llmjax(texts: Texts, folder: Path) -> Removed:
    """Content hashes."""
    from llmjax.data.dedup import content_hash

    seen: set[str] = set()
    return [i for i, text in enumerate(texts) if (h := content_hash(text)) in seen or seen.add(h)]


def exact_dolma(texts: Texts, folder: Path) -> None:
    """Its Bloom filter by document, over gzipped JSONL as it wants them (writing them is not counted)."""
    from dolma import deduper

    deduper({
        "documents": [str(folder / "documents" / "*.gz")], "work_dir": {"input": str(folder), "output": str(folder)},
        "dedupe": {"name": "exact", "documents": {"attribute_name": "duplicate", "key": "$.text"}, "skip_empty": True},
        "bloom_filter": {"file": str(folder / "bloom"), "read_only": False, "size_in_bytes": 0,
                         "estimated_doc_count": max(len(texts), 1000), "desired_false_positive_rate": 1e-6},
        "processes": 1})  # fmt: skip


def quality_llmjax(texts: Texts, folder: Path) -> Removed:
    """Gopher's quality and repetition rules."""
    return _dropped_by_stages(texts, rules="gopher_quality,gopher_repetition")


def quality_datatrove(texts: Texts, folder: Path) -> Removed:
    """The same two filters."""
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

    kept = GopherRepetitionFilter().run(GopherQualityFilter().run(_datatrove_documents(texts)))
    stay = {int(document.id) for document in kept}
    return [i for i in range(len(texts)) if i not in stay]


def quality_dolma(texts: Texts, folder: Path) -> None:
    """Its tagger of the same rules."""
    from dolma.core.data_types import Document
    from dolma.taggers.gopher import GopherTagger

    tagger = GopherTagger()
    for i, text in enumerate(texts):
        tagger.predict(Document(source="", id=str(i), text=text))


def build_llmjax(texts: Texts, folder: Path) -> None:
    """The embedded build up to its decisions: Gopher's rules, exact and near duplicates, decontamination, write."""
    from llmjax.core.sections import CurationConfig, DataConfig
    from llmjax.data.curate import curate
    from llmjax.data.embedded import Embedded
    from llmjax.data.progress import quiet
    from llmjax.data.registry import find_sources

    rules = CurationConfig(rules="gopher_quality,gopher_repetition")
    config = DataConfig(sources=f"{folder.parent}/all/*.parquet", holdouts=f"{folder.parent}/exam.jsonl",
                        curation=rules)  # fmt: skip
    sources, holdouts = (find_sources(spec, field="data.sources", licence="stated by the user") for spec in (
        config.sources, config.holdouts))  # fmt: skip
    curate(config, sources, holdouts, folder / "units", engine=Embedded(), progress=quiet)


def language_llmjax(texts: Texts, folder: Path) -> Removed:
    """Language identification."""
    return _dropped_by_stages(texts, languages="en")


def pii_llmjax(texts: Texts, folder: Path) -> Removed:
    """Personal data and secrets, redacted."""
    return _dropped_by_stages(texts, pii="redact")


def encode_llmjax(texts: Texts, folder: Path) -> None:
    """Byte-level BPE of 32,000 pieces, trained before."""
    _tokenizer(folder.parent / "tokenizer").encode_batch(texts)


def encode_tiktoken(texts: Texts, folder: Path) -> None:
    """The same vocabulary, cut as Llama 3's is."""
    encoding = _tiktoken(folder.parent / "tokenizer")
    for text in texts:
        encoding.encode_to_numpy(text, disallowed_special=())


NUMPY = {"NUMBA_DISABLED": "1"}  # this script's own sign: numba is hidden before anything is imported
VARIANTS = {
    "near-llmjax": Variant("near duplicates", "llmjax", near_llmjax),
    "near-llmjax-numpy": Variant("near duplicates", "llmjax", near_llmjax, NUMPY),
    "near-datatrove": Variant("near duplicates", "datatrove", near_datatrove),
    "near-datasketch": Variant("near duplicates", "datasketch", near_datasketch),
    "exact-llmjax": Variant("exact duplicates", "llmjax", exact_llmjax),
    "exact-dolma": Variant("exact duplicates", "dolma", exact_dolma),
    "quality-llmjax": Variant("Gopher rules", "llmjax", quality_llmjax),
    "quality-llmjax-numpy": Variant("Gopher rules", "llmjax", quality_llmjax, NUMPY),
    "quality-datatrove": Variant("Gopher rules", "datatrove", quality_datatrove),
    "quality-dolma": Variant("Gopher rules", "dolma", quality_dolma),
    "build-llmjax": Variant("rules, duplicates, leaks, write", "llmjax", build_llmjax, reads="all"),
    "language-llmjax": Variant("language", "llmjax", language_llmjax),
    "pii-llmjax": Variant("personal data", "llmjax", pii_llmjax),
    "encode-llmjax": Variant("encode", "llmjax", encode_llmjax),
    "encode-tiktoken": Variant("encode", "tiktoken", encode_tiktoken),
}
OURS = ("llmjax", "tiktoken")  # run by this interpreter


def _datatrove_documents(texts: Texts) -> Iterator[Any]:
    from datatrove.data import Document

    return (Document(text=text, id=str(i)) for i, text in enumerate(texts))


def _dropped_by_stages(texts: Texts, **wanted: str) -> Removed:
    import pyarrow as pa

    from llmjax.core.sections import CurationConfig
    from llmjax.data.filters import filters
    from llmjax.data.stage import documents_schema, run_stages

    blank = {name: [""] * len(texts) for name in ("source", "licence", "path", "encoding", "url", "author")}
    columns = blank | {"order": list(range(len(texts))), "id": list(map(str, range(len(texts)))), "text": texts,
                       "kind": ["prose"] * len(texts), "reason": [None] * len(texts)}  # fmt: skip
    table = pa.table({field.name: pa.array(columns[field.name], field.type) for field in documents_schema()})
    stages, removed = filters(CurationConfig(**wanted)), []
    for start in range(0, len(texts), 512):
        reasons = run_stages(table.slice(start, 512), stages)["reason"].to_pylist()
        removed += [start + i for i, reason in enumerate(reasons) if reason is not None]
    return removed


@functools.cache
def _tokenizer(folder: Path) -> Any:
    """The tokenizer, compared with its fast library once: a matter of loading it."""
    from llmjax.data.tokenizer import Tokenizer
    from llmjax.data.tokenizer_backends import FEW_CHARACTERS

    tokenizer = Tokenizer.load(folder)
    tokenizer.encode_batch(["a " * FEW_CHARACTERS])
    return tokenizer


@functools.cache
def _tiktoken(folder: Path) -> Any:
    import tiktoken

    from llmjax.data import byte_level

    content = json.loads((folder / "tokenizer.json").read_text())
    specials = {token["content"]: token["id"] for token in content["added_tokens"]}
    vocab = content["model"]["vocab"].items()
    ranks = {byte_level.to_bytes(piece): rank for piece, rank in vocab if piece not in specials}
    return tiktoken.Encoding("", pat_str=byte_level.LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def read(corpus: Path) -> Texts:
    """The texts of a folder in the order of its files."""
    import pyarrow.parquet as pq

    return [text for file in sorted(corpus.glob("*.parquet")) for text in
            pq.read_table(file, columns=["text"])["text"].to_pylist()]  # fmt: skip


def work(name: str, folder: Path) -> dict[str, Any]:
    """Run one variant in this process; CPU-seconds of it and its children, peak memory in MB."""
    variant = VARIANTS[name]
    if "NUMBA_DISABLED" in os.environ:
        sys.modules["numba"] = None  # type: ignore[assignment]
    texts = read(folder.parent / variant.reads)
    if name == "exact-dolma":
        _write_for_dolma(texts, folder / "documents")
    for warm_up in (near_llmjax, quality_llmjax) if name == "build-llmjax" else (variant.call,):
        warm_up(texts[:20], Path(tempfile.mkdtemp(dir=folder.parent)))  # imports and compilation are not the stage
    before, wall = _cpu(), time.perf_counter()
    removed = variant.call(texts, folder)
    return {"cpu": _cpu() - before, "wall": time.perf_counter() - wall, "removed": removed,
            "peak_mb": _peak_mb()}  # fmt: skip


def _peak_mb() -> float:
    """Of this process alone: what `getrusage` says starts from the size of the process that it was forked from."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def _write_for_dolma(texts: Texts, folder: Path) -> None:
    import gzip

    folder.mkdir()
    with gzip.open(folder / "all.json.gz", "wt") as file:
        file.writelines(json.dumps({"id": str(i), "text": text, "source": ""}) + "\n" for i, text in enumerate(texts))


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def prepare(corpus: Path, folder: Path, *, part: int) -> None:
    """What variants find beside their folder: the corpus and a part of it, an exam to keep out, a tokenizer."""
    from llmjax.core.sections import TokenizerConfig
    from llmjax.data.tokenizer import train_tokenizer

    files = sorted(corpus.resolve().glob("*.parquet"))
    for name, some in (("all", files), ("part", files[:part])):
        (folder / name).mkdir()
        for file in some:
            (folder / name / file.name).symlink_to(file)
    texts = read(folder / "part")
    exam = [{"id": str(i), "text": " ".join(texts[i].split()[:60])} for i in range(0, len(texts), 97)]
    (folder / "exam.jsonl").write_text("".join(json.dumps(item) + "\n" for item in exam))
    train_tokenizer(texts[::TOKENIZER_SHARE], TokenizerConfig(kind="byte_bpe", vocab_size=32_000), folder / "tokenizer")


def measure(name: str, folder: Path, peer_python: str) -> dict[str, Any]:
    """One variant in a process of its own."""
    variant = VARIANTS[name]
    (folder / name).mkdir()
    python = sys.executable if variant.library in OURS else peer_python
    environment = os.environ | THREADS | variant.environment | {"PYTHONPATH": str(ROOT)}
    command = [python, __file__, str(folder / name), f"--work={name}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"missing": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else str(done.returncode)}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has datatrove and dolma")
    parser.add_argument("--part", type=int, default=None, help="files that stages with peers see (default all)")
    parser.add_argument("--only", default=",".join(VARIANTS), help="comma-separated variants")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--work", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(args.work, args.corpus)))
        return
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(args.corpus, folder, part=args.part)
        sizes = {reads: sum(len(text.encode()) for text in read(folder / reads)) / 1e6 for reads in ("part", "all")}
        texts = read(folder / "part")
        print(f"{sizes['all']:.1f} MB; stages with peers see {sizes['part']:.1f} of them, {len(texts):,} documents")
        pairs = true_pairs(texts) if "near-" in args.only else None
        for name in args.only.split(","):
            figures[name] = found = measure(name, folder, args.peer_python)
            removed, found["mb"] = found.pop("removed", None), sizes[VARIANTS[name].reads]
            if pairs and removed is not None and name.startswith("near-"):
                found |= judge(removed, pairs)
            print(_line(name, found), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def _line(name: str, found: dict[str, Any]) -> str:
    variant = VARIANTS[name]
    if "missing" in found:
        return f"{variant.stage:32} {name:22} not measured: {found['missing']}"
    judged = f"  precision {found['precision']:.3f} recall {found['recall']:.3f}" if "precision" in found else ""
    return (f"{variant.stage:32} {name:22} {found['mb'] / found['cpu']:8.2f} MB/CPU-s {found['cpu']:8.1f} CPU-s "
            f"{found['peak_mb']:6.0f} MB peak{judged}")  # fmt: skip


if __name__ == "__main__":
    main()
