"""The quick evaluation on the way: the loss of a few packed rows of held-out documents, always the same ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from llmjax.core.processes import first_alone
from llmjax.core.sections import Config
from llmjax.core.task import Hook
from llmjax.data.loader import PackedRows, Shuffled, serve
from llmjax.data.pack import pack_plan
from llmjax.data.shards import Document, TokenStore, write_store
from llmjax.data.tokenizer import Tokenizer
from llmjax.evals.run import read_holdout
from llmjax.models.decoder import Model
from llmjax.models.stack import execution_of
from llmjax.train import pretrain
from llmjax.train.batch import put_batch, row_share
from llmjax.train.state import TrainState, chosen_weights
from llmjax.train.step import make_eval_step


def make_hook(config: Config, model: Model, *, data: Path, tokenizer: Tokenizer, workdir: Path) -> Hook:
    """Writes `eval_loss`, the mean over the targets of eval.batches batches, every eval.every steps."""
    documents = read_holdout(data / "holdout.parquet")
    encoded = tokenizer.encode_batch([document.text for document in documents])
    stored = (Document(f"{index:032x}", np.array([tokenizer.bos_id, *tokens, tokenizer.eos_id]))
              for index, tokens in enumerate(encoded))
    first_alone("held out", lambda: write_store(workdir / "held_out", stored, vocab_size=tokenizer.vocab_size))
    store = TokenStore.open(workdir / "held_out")
    plan = pack_plan(store.lengths, seq_len=config.data.seq_len, seed=0)
    share = row_share(jax.sharding.get_mesh())
    batches = list(itertools.islice(
        serve(Shuffled(PackedRows(store, plan), config.data.batch_size, seed=0), process_index=share.process_index,
              process_count=share.process_count), config.eval.batches))
    eval_step = jax.jit(make_eval_step(model, pretrain.make_loss(config.task, execution=execution_of(config))))

    def evaluate(step: int, state: TrainState) -> Mapping[str, float]:
        del step
        params = chosen_weights(state, config.eval.weights)
        sums = [jax.device_get(eval_step(params, {}, put_batch(batch))) for batch in batches]
        return {"eval_loss": float(sum(s.loss_sum for s in sums) / sum(s.weight for s in sums))}

    return Hook(config.eval.every, evaluate)
