"""Token shards from your own files: text, Markdown, Python or JSONL documents with `id` and `text`.

    llmjax data build --config=configs/data/from_files.py:'books/*.txt,notes.jsonl.gz' --workdir=runs/books \\
        --config.data.licence='CC BY 4.0' --config.data.holdouts=exam.jsonl

Hardware: none beyond one core; about 10 MB of text a second to deduplicate, 3 to train the tokenizer on and to encode.
A run uses the result with --config.data.path=runs/books.
"""

from ml_collections import ConfigDict


def get_config(sources: str = "stdlib") -> ConfigDict:
    """`sources`: comma-separated files, globs or registry names."""
    return ConfigDict({
        "data": {"sources": sources, "licence": "stated by the user", "holdout_fraction": 0.05},
        "tokenizer": {"kind": "bpe", "vocab_size": 8192},
    })  # fmt: skip
