"""Web-like text: Gopher's rules, exact and near duplicates, leaks of benchmarks, personal data redacted.

    llmjax data build --config=configs/data/rules.py:'crawl/*.parquet' --workdir=runs/crawl \\
        --config.data.holdouts='eval/*.jsonl'

Hardware: none beyond one core; about 10 MB of text a second before tokenising. Expected: of a crawl a third stays.
"""

from ml_collections import ConfigDict


def get_config(sources: str = "stdlib") -> ConfigDict:
    """`sources`: comma-separated files, globs or registry names."""
    return ConfigDict({
        "data": {"sources": sources, "licence": "stated by the user", "holdout_fraction": 0.001,
                 "curation": {"rules": "gopher_quality,gopher_repetition", "pii": "redact", "boilerplate": "strip"}},
        "tokenizer": {"kind": "bpe", "vocab_size": 32_000},
    })  # fmt: skip
