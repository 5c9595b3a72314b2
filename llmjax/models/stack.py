"""The one place that runs stacked layers: scanned, recomputed in the derivative or not.

Letters: B batch, T time, D model width, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llmjax.core.sections import Config

# (x_BTD, one layer's part of `layers`, what all layers share) -> (x_BTD, what this layer leaves)
ApplyBlock = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]

policies = jax.checkpoint_policies
# By train.remat: what of a block's forward pass waits for its derivative, given the names in train.remat_names.
REMAT_POLICIES: dict[str, Callable[[tuple[str, ...]], Any]] = {
    "full": lambda names: None,  # its input alone
    "save_matmuls": lambda names: policies.dots_with_no_batch_dims_saveable,
    "save_names": lambda names: policies.save_only_these_names(*names),
    "offload": lambda names: policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=list(names), offload_src="device",
        offload_dst="pinned_host"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Execution:
    """How layers are run; nothing here changes what they compute."""

    remat: str = "none"
    remat_names: tuple[str, ...] = ()


def execution_of(config: Config) -> Execution:
    """The execution that a config asks for."""
    names = tuple(name.strip() for name in config.train.remat_names.split(",") if name.strip())
    return Execution(remat=config.train.remat, remat_names=names)


def run_layers(apply_block: ApplyBlock, x_BTD: jax.Array, layers: Any, shared: Any, *,
               execution: Execution) -> tuple[jax.Array, Any]:
    """`x_BTD` through all blocks in turn, and what each of them leaves, stacked; leaves of `layers` are (L, ...)."""
    def body(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        return apply_block(checkpoint_name(x_BTD, "block_input"), layer, shared)

    return lax.scan(recomputed(body, execution), x_BTD, layers)


def recomputed(body: Callable, execution: Execution) -> Callable:
    """`body`, of whose forward pass only what the policy names is kept for the derivative."""
    if execution.remat == "none":
        return body
    policy = REMAT_POLICIES[execution.remat](execution.remat_names)
    return jax.checkpoint(body, policy=policy, prevent_cse=False)  # a scan's body is safe from it
