"""Token shards from your own files: text, Markdown, Python, HTML, WARC, Parquet, or JSONL with `id` and `text`.

    llmjax data build --config=configs/data/from_files.py:'books/*.txt,notes.jsonl.gz' --workdir=runs/books \\
        --config.data.licence='CC BY 4.0' --config.data.holdouts=exam.jsonl

Only exact and near duplicates and documents that hold a held-out item are removed. Hardware: none beyond one core;
about 20 MB of text a second to curate, 3 to train the tokenizer on and to encode. A run uses the result with
--config.data.path=runs/books, and is evaluated on data.holdouts or on --config.data.holdout_fraction=0.05 of the files.
"""

from ml_collections import ConfigDict


def get_config(sources: str = "stdlib") -> ConfigDict:
    """`sources`: comma-separated files, globs or registry names."""
    return ConfigDict({
        # Nothing goes but duplicates, and what holds an item of data.holdouts.
        "data": {"sources": sources, "licence": "stated by the user", "holdout_fraction": 0.0, "min_bytes": 0,
                 "max_bytes": 2**40},
        "tokenizer": {"kind": "bpe", "vocab_size": 8192},
    })  # fmt: skip
