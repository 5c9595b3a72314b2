"""From what layers report beside the residual stream to what a loss adds, a run logs and untrained state is moved by.

Letters: L layers, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core import tree
from llmjax.core.model_sections import ModelConfig
from llmjax.core.task import Params
from llmjax.models.groups import name_of
from llmjax.models.router import RouterSums, moved_bias

# Where routers are among the parameters, but for what blocks that differ in turn put between.
BLOCKS: tuple[str, ...] = ("blocks", "mlp", "router")
ENCODER_BLOCKS: tuple[str, ...] = ("encoder", *BLOCKS)
DEPTHS: tuple[str, ...] = ("multi_token", "block", "mlp", "router")


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """Sums over this device's real tokens."""

    loss_sum: jax.Array | float  # to be added to the loss
    metrics: dict[str, jax.Array]
    loads: Params  # tokens of each expert, at the paths of the balancing biases


def auxiliary(config: ModelConfig, reports: Mapping[tuple[str, ...], RouterSums]) -> Auxiliary:
    """Losses added over layers, metrics averaged over them; `reports` by the path of the routers they come from."""
    if not reports:
        return Auxiliary(0.0, {}, {})
    all_LE = jax.tree.map(lambda *parts: jnp.concatenate(parts), *reports.values())
    loss_sum = config.moe.balance_loss * jnp.sum(all_LE.balance_loss) + config.moe.z_loss * jnp.sum(all_LE.z_loss)
    metrics = {f"router_{name}": jnp.mean(getattr(all_LE, name))
               for name in ("balance_loss", "z_loss", "max_load", "dropped")}
    loads: dict[tuple[str, ...], Any] = {}
    if config.moe.router_bias == "balancing":
        loads = {(*_path(config, path), "balance"): sums.load_E for path, sums in reports.items()}
    return Auxiliary(loss_sum, metrics, tree.unflatten(loads))


def _path(config: ModelConfig, path: tuple[str, ...]) -> tuple[str, ...]:
    """Where a model has the routers of `path`: where layers differ in turn, the last of a period has one."""
    if config.moe.every == 1 or path == DEPTHS:
        return path
    place = path.index("blocks") + 1
    return (*path[:place], name_of(config.moe.every - 1), *path[place:])


def moved(config: ModelConfig, params: Params, loads: Params) -> Params:
    """Parameters with every balancing bias moved by what its experts had to do in a step."""
    steps = {path: moved_bias(tree.flatten(params)[path], load_LE, rate=config.moe.bias_update_rate)
             for path, load_LE in tree.flatten(loads).items()}
    return tree.unflatten(tree.flatten(params) | steps)
