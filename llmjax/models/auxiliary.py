"""From what layers report beside the residual stream to what a loss adds, a run logs and untrained state is moved by.

Letters: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llmjax.core import collectives, tree
from llmjax.core.model_sections import ModelConfig
from llmjax.core.task import LossOutput, Params
from llmjax.models.groups import name_of
from llmjax.models.router import RouterSums, moved_bias

Reports = Mapping[tuple[str, ...], RouterSums]  # by the path of the routers they come from, leaves (L, ...)
# Where routers are among the parameters, but for what blocks that differ in turn put between.
BLOCKS: tuple[str, ...] = ("blocks", "mlp", "router")
ENCODER_BLOCKS: tuple[str, ...] = ("encoder", *BLOCKS)
DEPTHS: tuple[str, ...] = ("multi_token", "block", "mlp", "router")
METRICS = ("balance_loss", "z_loss", "max_load", "dropped")


def add_routers(total: LossOutput, reports: Reports, *, config: ModelConfig, segment_ids: jax.Array) -> LossOutput:
    """`total` with the routers' mean losses a real token beside it, and what they report.

    Losses are added over layers, metrics averaged over them.
    """
    if not reports:
        return total
    all_LE = jax.tree.map(lambda *parts: jnp.concatenate(parts), *reports.values())
    loss_sum = config.moe.balance_loss * jnp.sum(all_LE.balance_loss) + config.moe.z_loss * jnp.sum(all_LE.z_loss)
    # A sum over real tokens becomes a mean over them that weighs as much as the batch does.
    share = collectives.sum_over(total.weight, collectives.SHARE_AXES) / jnp.maximum(num_real(segment_ids), 1.0)
    metrics = {f"router_{name}": jnp.mean(getattr(all_LE, name)) * share for name in METRICS}
    return LossOutput(total.loss_sum + loss_sum * share, total.weight, total.metrics | metrics, _loads(config, reports))


def num_real(segment_ids: jax.Array) -> jax.Array:
    """Tokens of the global microbatch that are none of the padding."""
    return collectives.sum_over(jnp.sum(segment_ids > 0, dtype=jnp.float32), collectives.SHARE_AXES)


def _loads(config: ModelConfig, reports: Reports) -> Params:
    """Tokens of each expert, at the paths of the balancing biases."""
    if config.moe.router_bias != "balancing":
        return {}
    return tree.unflatten({(*_path(config, path), "balance"): sums.load_E for path, sums in reports.items()})


def _path(config: ModelConfig, path: tuple[str, ...]) -> tuple[str, ...]:
    """Where a model has the routers of `path`: where layers differ in turn, the last of a period has one."""
    if config.moe.every == 1 or path == DEPTHS:
        return path
    place = path.index("blocks") + 1
    return (*path[:place], name_of(config.moe.every - 1), *path[place:])


def moved(config: ModelConfig, params: Params, loads: Params) -> Params:
    """Parameters with every balancing bias moved by what its experts had to do in a step."""
    leaves = tree.flatten(params)
    steps = {path: moved_bias(leaves[path], load_LE, rate=config.moe.bias_update_rate)
             for path, load_LE in tree.flatten(loads).items()}
    return tree.unflatten(leaves | steps)
