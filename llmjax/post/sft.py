"""Supervised fine-tuning: the loss of pre-training, on the assistant's tokens of conversations alone."""

from __future__ import annotations

import functools
from pathlib import Path

from llmjax.core.sections import Config
from llmjax.core.task import Task
from llmjax.data.examples import chat_store
from llmjax.data.loader import PackedRows, Shuffled, follow
from llmjax.data.pack import pack_plan
from llmjax.data.tokenizer import Tokenizer
from llmjax.models.stack import execution_of
from llmjax.post.corpus_examples import chat_examples
from llmjax.post.sources import example_files
from llmjax.train import pretrain


def make_task(config: Config, *, workdir: Path, tokenizer: Tokenizer, process_index: int = 0,
              process_count: int = 1) -> Task:
    """Packed conversations of `data.sources`, rendered by the tokenizer's chat template."""
    files = example_files(config, workdir, make=chat_examples)
    store = chat_store(files, tokenizer, workdir / "data" / "chat")
    # Best fit: a conversation that fits in a row is not cut.
    plan = pack_plan(store.lengths, seq_len=config.data.seq_len, seed=config.data.shuffle_seed, method="best_fit")
    stream = functools.partial(Shuffled, PackedRows(store, plan), config.data.batch_size, config.data.shuffle_seed)
    batches = functools.partial(follow, stream, workdir=workdir, process_index=process_index,
                                process_count=process_count)
    return Task(batches=batches, loss=pretrain.make_loss(config.task, execution=execution_of(config)))
