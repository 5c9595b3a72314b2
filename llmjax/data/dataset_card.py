"""The dataset card: what a data folder holds and how it was made, in Markdown with the metadata block of model hubs."""

from __future__ import annotations

import json
from pathlib import Path

from llmjax.data.manifest import Manifest, SourceCounts

FILE = "dataset_card.md"
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip


def write(manifest: Manifest) -> Path:
    """Write dataset_card.md into the folder; the same folder always gets the same card."""
    path = manifest.folder / FILE
    path.write_text(card(manifest), encoding="utf-8")
    return path


def card(manifest: Manifest) -> str:
    """The text of the card."""
    licences = sorted({source.licence for source in manifest.sources})
    size = next((name for limit, name in _SIZES if manifest.num_documents < limit), "n>1B")
    kept = manifest.num_documents / max(manifest.read, 1)
    rows = "\n".join(_row(source) for source in manifest.sources)
    held_out = "\n".join(_row(source) for source in manifest.holdout)
    dropped = "\n".join(f"| {reason} | {count:,} |" for reason, count in manifest.dropped.items())
    settings = json.dumps(manifest.config, indent=1, ensure_ascii=False)
    return f"""---
license: other
license_name: {json.dumps(", ".join(licences), ensure_ascii=False)}
size_categories: [{size}]
task_categories: [text-generation]
---
# Token shards {manifest.hash}

{manifest.num_documents:,} documents of {manifest.read:,} read ({kept:.1%}), {manifest.num_bytes:,} bytes of text,
{manifest.num_tokens:,} tokens in {len(manifest.shards)} shards, tokenizer {manifest.tokenizer_hash}.

## Sources

| source | licence | provenance | documents | bytes | tokens |
|---|---|---|---|---|---|
{rows}

## Held out: never trained on

| source | licence | provenance | documents | bytes | tokens |
|---|---|---|---|---|---|
{held_out}

## Left out, by reason

| reason | documents |
|---|---|
{dropped}

The verdict on every document is in `kept.jsonl` and `dropped.jsonl`; `llmjax data trace` follows one of them.

## How to make it again

Inputs {manifest.input_hash}, code {manifest.code_hash}, config {manifest.config_hash},
{", ".join(f"{name} {version}" for name, version in manifest.versions.items())}.

```json
{settings}
```
"""


def _row(source: SourceCounts) -> str:
    tokens = "" if source.tokens is None else f"{source.tokens:,}"
    return (f"| {source.name} | {source.licence} | {source.provenance} | {source.documents:,} | {source.bytes:,} "
            f"| {tokens} |")  # fmt: skip
