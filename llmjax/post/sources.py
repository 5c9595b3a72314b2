"""Which files a post-training run learns from: those it names, or examples made from its ancestor's corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llmjax.core.config import from_workdir
from llmjax.core.errors import ConfigError, RunError
from llmjax.core.processes import first_alone
from llmjax.core.sections import Config
from llmjax.data.build import data_folder
from llmjax.data.registry import SOURCES, find_sources
from llmjax.post.corpus_examples import read_texts, write_jsonl

CORPUS = "corpus"  # the value of data.sources that asks for examples made from the corpus
SUFFIXES = (".jsonl", ".jsonl.gz")

Maker = Callable[[Iterable[str]], Iterator[dict[str, Any]]]


def example_files(config: Config, workdir: Path, *, make: Maker) -> list[Path]:
    """The JSONL files of `data.sources`; for "corpus", one that `make` fills from source texts, written once.

    Raises ConfigError for sources that hold no examples, RunError for files or a corpus that cannot be found.
    """
    spec = config.data.sources
    if spec == CORPUS:
        made = workdir / "data" / "examples.jsonl"

        def write() -> None:
            if not made.exists():
                write_jsonl(make(read_texts(corpus_documents(Path(config.train.init_from)))), made)

        first_alone("examples of the corpus", write)
        return [made]
    if spec in SOURCES:
        raise ConfigError(f"data.sources={spec!r} holds documents, task.name={config.task.name!r} needs examples: name "
                          f"JSONL files, or {CORPUS!r} for examples made from the parent's corpus")  # fmt: skip
    files = [file.path for source in find_sources(spec, field="data.sources", licence=config.data.licence)
             for file in source.files]  # fmt: skip
    for path in files:
        if not path.name.endswith(SUFFIXES):
            raise ConfigError(f"data.sources: {path} is not JSONL; examples come as {' or '.join(SUFFIXES)}")
    return files


def corpus_documents(workdir: Path) -> Path:
    """The documents.parquet of a run, or of the run it started from, and so on."""
    config = from_workdir(workdir)
    documents = data_folder(config.data, workdir) / "documents.parquet"
    if documents.exists():
        return documents
    if config.train.init_from:
        return corpus_documents(Path(config.train.init_from))
    raise RunError(f"{workdir} keeps no corpus ({documents} is missing): name JSONL files in data.sources")
