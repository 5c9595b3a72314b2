"""The one place that runs stacked layers: scanned, recomputed in the derivative or not.

Letters: B batch, T time, D model width, L layers, P layers of a period.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llmjax.core import collectives
from llmjax.core.errors import ConfigError
from llmjax.core.sections import Config
from llmjax.kernels.matmul.cpu import is_product
from llmjax.models import pipeline
from llmjax.models.boundaries import row_major
from llmjax.models.inputs import Watch

# (x_BTD, one layer's part of `layers`, what all layers share) -> (x_BTD, what this layer leaves)
ApplyBlock = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]

policies = jax.checkpoint_policies
# By train.remat: what of a block's forward pass waits for its derivative, given the names of train.remat_names.
REMAT_POLICIES: dict[str, Callable[[tuple[str, ...]], Any]] = {
    "full": lambda names: None,  # its input alone
    "save_matmuls": lambda names: policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, is_product),
    "save_names": lambda names: policies.save_only_these_names(*names),
    "offload": lambda names: policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=list(names), offload_src="device",
        offload_dst="pinned_host"),
}  # fmt: skip


REMAT_NAMES = ("block_input", "attn_out", "mlp_out", "attention")  # the last: what the TPU kernel leaves, not run again


@dataclasses.dataclass(frozen=True)
class Execution:
    """How layers are run; nothing here changes what they compute."""

    remat: str = "none"
    remat_names: tuple[str, ...] = ()
    context_method: str = "ring"
    num_microbatches: int = 1  # that pass through the stages
    rounds: int = 1  # of each of them through all stages
    schedule: str = "gpipe"
    layers: Literal["scanned", "unrolled"] = "scanned"
    watch: Watch = ""


def execution_of(config: Config) -> Execution:
    """The execution that a config asks for; ConfigError for a name that no block has."""
    names = tuple(name.strip() for name in config.train.remat_names.split(",") if name.strip())
    for name in names:
        if name not in REMAT_NAMES:
            raise ConfigError(f"train.remat_names={name}: the names are {', '.join(REMAT_NAMES)}")
    return Execution(config.train.remat, names, config.mesh.context_method, config.train.accumulation,
                     config.mesh.rounds, config.mesh.schedule, config.train.layers)


def run_layers(blocks: Sequence[ApplyBlock], x_BTD: jax.Array, layers: Any, shared: Any, *,
               execution: Execution) -> tuple[jax.Array, Any]:
    """`x_BTD` through all layers in turn, and what each of them leaves, stacked.

    Leaves of `layers` are (L, ...), or this stage's part of them; `blocks` is the period in which layers differ: layer
    i is run by blocks[i % P].
    """
    run = functools.partial(run_here, blocks, execution=execution)
    if collectives.manual_size(pipeline.AXIS) == 1:
        return run(x_BTD, layers, shared)
    return pipeline.run_stages(run, x_BTD, layers, shared, num_microbatches=execution.num_microbatches,
                               rounds=execution.rounds)


def run_here(blocks: Sequence[ApplyBlock], x_BTD: jax.Array, layers: Any, shared: Any, *,
             execution: Execution) -> tuple[jax.Array, Any]:
    """`run_layers` for the layers and rows that this device holds."""
    bodies = [recomputed(functools.partial(_apply, block, shared), execution) for block in blocks]
    unroll = execution.layers == "unrolled"
    if len(bodies) == 1:
        return lax.scan(bodies[0], x_BTD, layers, unroll=unroll)

    def run_some(x_BTD: jax.Array, some: Any) -> tuple[jax.Array, Any]:
        left = []
        for i in range(jax.tree.leaves(some)[0].shape[0]):
            x_BTD, one = bodies[i](x_BTD, _take(some, i))
            left.append(one)
        return x_BTD, jax.tree.map(lambda *ones: jnp.stack(ones), *left)

    P, L = len(bodies), jax.tree.leaves(layers)[0].shape[0]
    whole = L - L % P
    repeats = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, P, *leaf.shape[1:]), layers)
    x_BTD, left = lax.scan(run_some, x_BTD, repeats, unroll=unroll)
    left = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), left)
    if whole == L:
        return x_BTD, left
    x_BTD, last = run_some(x_BTD, jax.tree.map(lambda leaf: leaf[whole:], layers))
    return x_BTD, jax.tree.map(lambda *parts: jnp.concatenate(parts), left, last)


def _take(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _apply(block: ApplyBlock, shared: Any, x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
    return block(checkpoint_name(row_major(x_BTD), "block_input"), layer, shared)


def recomputed(body: Callable, execution: Execution) -> Callable:
    """`body`, of whose forward pass only what the policy names is kept for the derivative."""
    if execution.remat == "none":
        return body
    policy = REMAT_POLICIES[execution.remat](execution.remat_names)
    # A scan's body is safe from being merged with its copy in the derivative.
    return jax.checkpoint(body, policy=policy, prevent_cse=execution.layers == "unrolled")
