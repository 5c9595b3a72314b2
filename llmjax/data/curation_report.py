"""The page that shows what curation did: kept and dropped by reason, samples, clusters, leaks, lengths, languages."""

from __future__ import annotations

import collections
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from llmjax.data.corpus import Corpus

FILE = "curation.html"
SAMPLES = 3  # documents shown of each reason
EXCERPT = 400  # characters of each
CLUSTERS = 20  # of duplicates, the largest
BARS = 24
_STYLE = ("body{font:15px/1.5 system-ui;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
          "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}td.n{text-align:right}"
          "pre{background:#f6f6f6;padding:.6em;white-space:pre-wrap;overflow-wrap:anywhere}"
          ".bar{background:#4a7ab5;height:.9em;display:inline-block}")


def write(path: Path, corpus: Corpus) -> None:
    """Write the page of a curated corpus."""
    kept = corpus.read - sum(corpus.dropped.values())
    parts = [f"<h1>Curation</h1><p>{corpus.read:,} documents read, {kept:,} kept.</p>",
             "<h2>Kept and dropped</h2>", _bars([("kept", kept), *corpus.dropped.items()]),
             "<h2>Stages</h2>", _list(repr(stage) for stage in corpus.stages),
             "<h2>Held-out items</h2>", _benchmarks(corpus), "<h2>Lengths of kept documents</h2>", _lengths(corpus),
             "<h2>Languages of kept documents</h2>", _languages(corpus), "<h2>Clusters of duplicates</h2>",
             _clusters(corpus), "<h2>Samples of what was dropped</h2>", _samples(corpus)]
    path.write_text(f"<!doctype html><meta charset=utf-8><title>Curation</title><style>{_STYLE}</style>"
                    + "\n".join(parts) + "\n", encoding="utf-8")


def _bars(counts: Sequence[tuple[str, int]]) -> str:
    most = max([count for _, count in counts] + [1])
    rows = "".join(f"<tr><td>{html.escape(name)}<td class=n>{count:,}"
                   f"<td><span class=bar style='width:{20 * count / most:.2f}em'></span>" for name, count in counts)
    return f"<table>{rows}</table>"


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li><code>{html.escape(line)}</code>" for line in lines) + "</ul>"


def _benchmarks(corpus: Corpus) -> str:
    if not corpus.benchmarks:
        return "<p>None were named (<code>data.holdouts</code>): nothing was looked for.</p>"
    rows = "".join(f"<tr><td>{html.escape(b.source)}<td class=n>{b.items:,}<td class=n>{b.too_short:,}"
                   f"<td class=n>{b.found:,}<td class=n>{b.documents:,}" for b in corpus.benchmarks)
    return ("<table><tr><th>source<th>items<th>shorter than 13 words<th>found<th>documents dropped"
            f"{rows}</table>")


def _lengths(corpus: Corpus) -> str:
    import pyarrow.compute as pc

    counts = np.zeros(64, np.int64)
    for table in corpus.tables("train", columns=("text",)):
        sizes = np.maximum(pc.binary_length(table["text"]).to_numpy(), 1)
        counts += np.bincount(np.log2(sizes).astype(int), minlength=64)[:64]
    present = np.flatnonzero(counts)
    return _bars([(f"{2**power:,} bytes and more", int(counts[power])) for power in present])


def _languages(corpus: Corpus) -> str:
    counts: collections.Counter[str] = collections.Counter()
    for table in corpus.tables("train"):
        if "language" in table.column_names:
            counts.update(table["language"].to_pylist())
    if not counts:
        return "<p>Not identified (<code>data.curation.languages</code> is empty).</p>"
    return _bars(counts.most_common(BARS))


def _clusters(corpus: Corpus) -> str:
    members: dict[int, list[str]] = collections.defaultdict(list)
    for table in corpus.removals():
        for row in table.to_pylist():
            if "duplicate" in row["decision"] and row["kept"] >= 0:
                members[row["kept"]].append(row["id"])
    largest = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))[:CLUSTERS]
    rows = "".join(f"<tr><td>{html.escape(corpus.id_of(kept))}<td class=n>{len(ids):,}"
                   f"<td>{html.escape(', '.join(ids[:5]))}{' ...' if len(ids) > 5 else ''}" for kept, ids in largest)
    return f"<p>{len(members):,} clusters.</p><table><tr><th>kept<th>dropped<th>such as{rows}</table>"


def _samples(corpus: Corpus) -> str:
    shown: collections.Counter[str] = collections.Counter()
    parts = []
    for table in corpus.removals(("id", "source", "text")):
        decisions = table["decision"].to_pylist()
        for row, decision in enumerate(decisions):
            if shown[decision] < SAMPLES:
                shown[decision] += 1
                text = table["text"][row].as_py()[:EXCERPT]
                parts.append((decision, f"<p><b>{html.escape(decision)}</b> {html.escape(table['id'][row].as_py())}</p>"
                                        f"<pre>{html.escape(text)}</pre>"))
    return "\n".join(part for _, part in sorted(parts, key=lambda part: part[0]))
