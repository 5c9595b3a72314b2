"""The quick evaluation on the way: the loss of a few packed rows of held-out documents, always the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax

from llmjax.core.processes import first_alone
from llmjax.core.sections import Config
from llmjax.core.task import Hook
from llmjax.data.tokenizer import Tokenizer
from llmjax.evals import held_out
from llmjax.evals.run import read_holdout
from llmjax.models.decoder import Model
from llmjax.models.stack import execution_of
from llmjax.train import pretrain
from llmjax.train.batch import put_batch, row_share
from llmjax.train.state import TrainState, chosen_weights
from llmjax.train.step import make_eval_step


def make_hook(config: Config, model: Model, *, data: Path, tokenizer: Tokenizer, workdir: Path) -> Hook:
    """Writes `eval_loss`, the mean over the targets of eval.batches batches, every eval.every steps."""
    folder = workdir / "held_out"
    texts = read_holdout(data / "holdout.parquet")
    first_alone("held out", lambda: held_out.write_texts(texts, tokenizer, folder))
    share = row_share(jax.sharding.get_mesh())
    stream = held_out.open_stream(config, tokenizer, folder)
    batches = list(held_out.batches(stream, share, num_batches=config.eval.batches))
    eval_step = jax.jit(make_eval_step(model, pretrain.make_loss(config.task, execution=execution_of(config))))

    def evaluate(step: int, state: TrainState) -> Mapping[str, float]:
        del step
        params = chosen_weights(state, config.eval.weights)
        sums = [jax.device_get(eval_step(params, {}, put_batch(batch))) for batch in batches]
        return {"eval_loss": float(sum(s.loss_sum for s in sums) / sum(s.weight for s in sums))}

    return Hook(config.eval.every, evaluate)
