"""What is watched beside the loss: norms by group, slow trends, a collapsing embedding, processes that lag behind."""

from __future__ import annotations

import collections
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from llmjax.core import collectives, tree
from llmjax.core.mesh import TOKEN_AXES
from llmjax.core.model_sections import MoEConfig
from llmjax.core.task import Params
from llmjax.models.decoder import Model, forward_batch, logits
from llmjax.models.stack import Execution
from llmjax.train.batch import batch_specs
from llmjax.train.gradients import leaf_specs

WINDOW, END = 128, 16  # a trend compares the first and the last END of WINDOW values
DRIFT = 4.0  # times by which they may differ
ALIKE = 0.9  # mean pairwise cosine above which embeddings point one way
UNLEARNT = 0.95  # share of log V above which a loss says that nothing was learnt
LAG = 1.5  # times the median that a process may take
ONE_SLOT = 0.02  # of its largest value: below this mean entropy a layer has collapsed (Zhai et al. 2023)
LARGE_SCORE = 1000.0  # ten times where training at scale begins to clip scores (Kimi K2, 2025)
PATIENCE = 8  # records in a row


def group_norms(kind: str, values: Params) -> dict[str, jax.Array]:
    """`kind/group`: the norm over each module of the model, layers taken together."""
    groups: dict[str, list[jax.Array]] = {}
    for path, leaf in tree.flatten(values).items():
        groups.setdefault(".".join(path[:2]) if len(path) > 2 else path[0], []).append(leaf)
    return {f"{kind}/{name}": optax.tree.norm(leaves) for name, leaves in groups.items()}


class Trends:
    """Says once when a norm, or anything else with a `/` in its name, drifts away slowly."""

    def __init__(self, *, say: Callable[[str], None]) -> None:
        self._say = say
        self._seen: dict[str, collections.deque[float]] = {}

    def see(self, step: int, values: Mapping[str, float]) -> None:
        """Take in what was logged at a step."""
        for name, value in values.items():
            if "/" not in name or not math.isfinite(value):
                continue
            seen = self._seen.setdefault(name, collections.deque(maxlen=WINDOW))
            seen.append(value)
            if len(seen) == WINDOW:
                self._compare(step, name, list(seen))

    def _compare(self, step: int, name: str, seen: list[float]) -> None:
        before, now = statistics.median(seen[:END]), statistics.median(seen[-END:])
        if before > 0 and not 1 / DRIFT <= now / before <= DRIFT:
            self._say(f"{name} drifts: {before:.3g}, and {WINDOW} records later {now:.3g} at step {step:,}")
            self._seen[name].clear()


READ = (*(f"{name}_{letters}" for letters in ("BT", "BS") for name in ("tokens", "positions", "segment_ids")),
        "prefix_BT")  # what a forward pass reads of a batch


def make_activations(model: Model) -> Callable[..., dict[str, jax.Array]]:
    """(params, batch) -> what a forward pass over the first row of each batch shard shows.

    RMS of what the last layer leaves, the largest logit and attention score, and the mean entropy share of the layer
    whose attention looks most sharply.
    """
    def local(params: Params, rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        first = {name: array[:1] for name, array in rows.items()}
        out = forward_batch(model, params, first, execution=Execution(watch="attention"))
        hidden_BTD, look_L = out.hidden_BTD, out.aux["attention"]
        largest = {"activation/largest_logit": jnp.max(jnp.abs(logits(model, params, hidden_BTD))),
                   "attention/largest_score": jnp.max(look_L.largest_score)}
        everywhere = functools.partial(collectives.sum_over, axes=TOKEN_AXES)
        squares, count = jnp.sum(jnp.square(hidden_BTD.astype(jnp.float32))), jnp.float32(hidden_BTD.size)
        entropy_L = everywhere(look_L.entropy) / jnp.maximum(everywhere(look_L.weight), 1.0)
        return {name: _largest(value) for name, value in largest.items()} | {
            "activation/rms": jnp.sqrt(everywhere(squares) / everywhere(count)),
            "attention/lowest_entropy": jnp.min(entropy_L)}

    def activations(params: Params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        rows = {name: batch[name] for name in READ if name in batch}
        return jax.shard_map(local, in_specs=(leaf_specs(params), batch_specs(rows)), out_specs=PartitionSpec(),
                             check_vma=False)(params, rows)

    return jax.jit(activations)


def _largest(value: jax.Array) -> jax.Array:
    for axis in TOKEN_AXES:
        value = collectives.max_over(value, axis)
    return value


def attention_fault(values: Mapping[str, float]) -> str:
    """What is wrong with the attention that `make_activations` saw; empty when nothing is."""
    entropy, score = values["attention/lowest_entropy"], values["attention/largest_score"]
    if entropy < ONE_SLOT:
        return f"all heads of a layer look at single tokens, entropy {entropy:.3f} of its largest value"
    if score > LARGE_SCORE:
        return f"an attention score has reached {score:,.0f}; a norm of queries and keys (attention.qk_norm) bounds it"
    return ""


@jax.jit
def mean_cosine(table_VD: jax.Array) -> jax.Array:
    """Mean cosine over all pairs of different rows: (|sum of unit rows|^2 - V) / (V (V - 1)), in float32."""
    table_VD = table_VD.astype(jnp.float32)
    unit_VD = table_VD / jnp.maximum(jnp.linalg.norm(table_VD, axis=-1, keepdims=True), 1e-12)
    num = table_VD.shape[0]
    return (jnp.sum(jnp.square(jnp.sum(unit_VD, axis=0))) - num) / (num * (num - 1))


def collapsed(cosine: float, loss: float, *, vocab_size: int) -> bool:
    """Whether an embedding has collapsed: alike rows alone may be a healthy common shift, so the loss decides."""
    return cosine > ALIKE and loss > UNLEARNT * math.log(vocab_size)


class ExpertLoads:
    """Says once when the fullest expert has had far more than its share for PATIENCE records in a row.

    Far is half-way, on a logarithmic scale, from an even load to a router that always picks the same experts.
    """

    def __init__(self, config: MoEConfig, *, say: Callable[[str], None]) -> None:
        self._limit = math.sqrt(config.num_experts / config.top_k) if config.num_experts else math.inf
        self._say, self._above = say, 0

    def see(self, step: int, values: Mapping[str, float]) -> None:
        """Take in what was logged at a step."""
        load = values.get("router_max_load")
        if load is None:
            return
        self._above = self._above + 1 if load > self._limit else 0
        if self._above == PATIENCE:
            self._say(f"the fullest expert has had {load:.1f} times its share of tokens at step {step:,}, above "
                      f"{self._limit:.1f} for {PATIENCE} records: raise model.moe.balance_loss or bias_update_rate")


def laggards(seconds: Sequence[float]) -> dict[int, float]:
    """Processes whose own work takes much longer than the median one's, with how many times longer."""
    middle = statistics.median_low(seconds)
    return {process: value / middle for process, value in enumerate(seconds) if middle > 0 and value > LAG * middle}


class HostTimes:
    """Every process's seconds of its own work a step: waiting for the others is what all have in common."""

    def __init__(self) -> None:
        self._seconds, self._steps = 0.0, 0

    def add(self, seconds: float) -> None:
        """One step's share that this process spent on input and dispatch."""
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1

    def gather(self) -> list[float]:
        """Mean seconds a step of every process since the last call, on every process; all have to call it."""
        from jax.experimental import multihost_utils

        mine: Any = np.float32(self._seconds / max(self._steps, 1))
        self._seconds, self._steps = 0.0, 0
        return [float(value) for value in np.atleast_1d(multihost_utils.process_allgather(mine))]
