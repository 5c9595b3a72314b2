"""Mixture weights that follow the losses while the run goes on, each change an intervention that resuming replays.

Every data.mix_every steps the loss of each source is taken on rows that it would give next and its weight multiplied by
exp(data.mix_rate * loss): sources with more left to learn come more often, as in online data mixing (Albalak et al.
2023), here with the losses of all sources instead of importance-weighted ones. A share of EXPLORE is spread evenly. The
weights are the only state, and they stand in the run's log, so a resumed run takes the same decisions again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from llmjax.core.errors import ConfigError
from llmjax.core.processes import first_alone
from llmjax.core.sections import Config
from llmjax.core.stage_sections import rope_theta_at
from llmjax.core.task import Hook, LossOutput, Params
from llmjax.data import interventions
from llmjax.data.interventions import Timeline, change_weights
from llmjax.data.loader import Selection, read_share
from llmjax.data.stages import Staged, open_stream
from llmjax.models.decoder import Model, abstract_model
from llmjax.models.stack import execution_of
from llmjax.track.logbook import Logbook
from llmjax.train import pretrain
from llmjax.train.batch import RowShare, put_batch
from llmjax.train.state import TrainState
from llmjax.train.step import make_eval_step

EXPLORE = 0.05  # of the mixture, spread evenly: no source is given up


def make_hook(config: Config, model: Model, *, data: Path, workdir: Path, share: RowShare) -> Hook:
    """Changes the weights every data.mix_every steps; writes `source_loss` and `source_weight` of each source."""
    if not config.data.mixture:
        raise ConfigError(f"data.mix_every={config.data.mix_every}: without data.mixture there is nothing to weigh")
    make = open_stream(data, config.data, config.stages)
    loss = pretrain.make_loss(config.task, execution=execution_of(config))

    @functools.cache
    def eval_step(rope_theta: float) -> Callable[[Params, Params, Mapping[str, jax.Array]], LossOutput]:
        return jax.jit(make_eval_step(abstract_model(dataclasses.replace(model.config, rope_theta=rope_theta)), loss))

    def mean_loss(step: int, state: TrainState, rows: Selection) -> float:
        evaluate = eval_step(rope_theta_at(config.stages, step, otherwise=model.config.rope_theta))
        batch = put_batch(read_share(rows, share.process_index, share.process_count))
        out = jax.device_get(evaluate(state.params, {}, batch))
        return float(out.loss_sum / out.weight)

    def mix(step: int, state: TrainState) -> Mapping[str, float]:
        stream = make(Timeline.of(interventions.read(workdir)))
        assert isinstance(stream, Staged)
        if stream.stage_number(step) != stream.stage_number(step - 1):  # the next stage begins with its own mixture
            return {}
        # The weights of the step taken: what an earlier life of the run decided after it is decided again.
        before = stream.weights(step - 1)
        losses = {source: mean_loss(step, state, stream.next_rows(step, source)) for source in before}
        weights = updated(before, losses, rate=config.data.mix_rate)
        said = ", ".join(f"{source} {weights[source]:.3f} (loss {losses[source]:.4f})" for source in weights)
        change_weights(workdir, step=step, weights=weights, reason=said)
        first_alone(f"mixture {step}", lambda: Logbook(workdir).enter("mixture", f"after step {step:,}: {said}"))
        return {f"source_loss/{source}": losses[source] for source in losses} | {
            f"source_weight/{source}": weights[source] for source in weights}

    return Hook(config.data.mix_every, mix)


def updated(weights: Mapping[str, float], losses: Mapping[str, float], *, rate: float) -> dict[str, float]:
    """Multiplicative weights (Arora, Hazan and Kale 2012): (1 - e) normalise(w exp(rate * loss)) + e / sources."""
    most = max(losses.values())  # taken off, so that nothing overflows
    raw = {source: weight * math.exp(rate * (losses[source] - most)) for source, weight in weights.items()}
    return {source: (1 - EXPLORE) * value / sum(raw.values()) + EXPLORE / len(raw) for source, value in raw.items()}
