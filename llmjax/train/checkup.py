"""What is looked at now and then beside the step: embeddings, replicas, repeated work, processes that lag."""

from __future__ import annotations

import time
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from llmjax.core import tree
from llmjax.core.sections import GuardConfig
from llmjax.core.task import Task
from llmjax.models.decoder import Model
from llmjax.train import monitors
from llmjax.train.corruption import compare_replicas, make_replay
from llmjax.train.guard import Say
from llmjax.train.state import TrainState


class Checkup:
    """Every guard.check_every steps; what is wrong goes to the logbook as a warning."""

    def __init__(self, config: GuardConfig, model: Model, task: Task, mesh: Mesh, *, say: Say) -> None:
        self._config, self._task, self._mesh, self._say = config, task, mesh, say
        self._times = monitors.HostTimes()
        self._replay = make_replay(model, task.loss, mesh)  # compiled when first called
        self._activations = monitors.make_activations(model)

    def worked(self, began: float) -> None:
        """This process has been at work of its own since `began` (time.monotonic)."""
        self._times.add(time.monotonic() - began)

    def due(self, step: int) -> bool:
        """Whether to look after this step."""
        return bool(self._config.check_every) and step % self._config.check_every == 0

    def look(self, step: int, state: TrainState, batch: Mapping[str, jax.Array], *, loss: float) -> dict[str, float]:
        """Look at the state after `step`, its batch and its loss; returns metrics."""
        if self._mesh.size > 1:
            for suspect in compare_replicas(state.params, self._mesh):
                self._say("warning", f"step {step:,}: silent corruption, {suspect}; take it out of the run")
        if self._config.monitors == "full" and self._mesh.size > 1:
            for device in self._replay(state.params, self._task.frozen, batch):
                self._say("warning", f"step {step:,}: {device} computes what its neighbours do not; take it out")
        if jax.process_count() > 1:
            for process, times in monitors.laggards(self._times.gather()).items():
                self._say("warning", f"step {step:,}: process {process} takes {times:.1f} times the median for its own "
                                     "share of a step")
        self._look_at_embedding(step, state, loss)
        if self._config.monitors == "full" and "tokens_BT" in batch:
            values = {name: float(value) for name, value in self._activations(state.params, dict(batch)).items()}
            if fault := monitors.attention_fault(values):
                self._say("warning", f"step {step:,}: {fault}")
            return values
        return {}

    def _look_at_embedding(self, step: int, state: TrainState, loss: float) -> None:
        table = tree.flatten(state.params).get(("embedder", "table"))
        if table is None:
            return
        cosine, size = float(monitors.mean_cosine(table)), table.shape[0]
        if monitors.collapsed(cosine, loss, vocab_size=size):
            self._say("warning", f"step {step:,}: the embedding has collapsed, mean pairwise cosine {cosine:.3f} "
                                 f"with a loss of {loss:.3g}, near log V")
