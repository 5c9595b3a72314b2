"""Supervised fine-tuning: the loss of pre-training, on the assistant's tokens of conversations alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from llmjax.core.sections import Config
from llmjax.core.task import Batch, Task
from llmjax.data import loader
from llmjax.data.examples import chat_store
from llmjax.data.pack import PackPlan, pack_plan
from llmjax.data.shards import TokenStore
from llmjax.data.tokenizer import Tokenizer
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
    return Task(batches=functools.partial(_batches, store, plan, config, process_index, process_count),
                loss=pretrain.make_loss(config.task, remat=config.train.remat))  # fmt: skip


def _batches(store: TokenStore, plan: PackPlan, config: Config, process_index: int, process_count: int,
             start_step: int) -> Iterator[Batch]:
    return loader.batches(store, plan, batch_size=config.data.batch_size, seed=config.data.shuffle_seed,
                          start_step=start_step, process_index=process_index, process_count=process_count)  # fmt: skip
