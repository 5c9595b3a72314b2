"""The optimiser of a run: a direction, decoupled weight decay, the rate of the schedule.

Which parameter gets what follows from the logical axes it was declared with, never from its name (labels.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llmjax.core.roles import own_axes, rate_by_width, role
from llmjax.core.sections import OptimConfig
from llmjax.optim.adafactor import scale_by_adafactor
from llmjax.optim.labels import AxisNames, is_decayed, is_hidden_matrix, map_axes, match
from llmjax.optim.muon import scale_by_muon
from llmjax.optim.schedule import make_schedule


def build_optimizer(config: OptimConfig, *, steps: int, axes: Any, width: float = 1.0) -> optax.GradientTransformation:
    """The update rule, without clipping (the step clips: it reports the gradient norm anyway).

    Args:
      config: optimiser and schedule.
      steps: length of the run, for the schedule.
      axes: nested dict like the parameters, leaves tuples of logical axis names, e.g. ("layers", "embed", "mlp").
      width: of the model over the base width of its muP.
    """
    if config.name != "muon":
        return _rule(config, config.name, steps=steps, axes=axes, width=width, peak=config.learning_rate)
    labels = map_axes(lambda names: rule_of(config, names), axes)
    peaks = {"muon": config.learning_rate, "adamw": config.adam_learning_rate or config.learning_rate}
    return optax.partition({name: _rule(config, name, steps=steps, axes=axes, width=width, peak=peak)
                            for name, peak in peaks.items()}, labels)


def clip_by_global_norm(grads: Any, norm: jax.Array, *, max_norm: float) -> Any:
    """Scale `grads`, whose global norm is `norm`, so that it is at most `max_norm`; 0 leaves them alone."""
    if not max_norm:
        return grads
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda grad: (grad * scale).astype(grad.dtype), grads)


def rule_of(config: OptimConfig, names: AxisNames) -> str:
    """The rule that moves a parameter with these axes: the run's, but Muon leaves to AdamW what is no hidden matrix."""
    return "adamw" if config.name == "muon" and not is_hidden_matrix(names) else config.name


def decay_mask(config: OptimConfig, axes: Any) -> Any:
    """Which parameters decay, a tree of booleans."""
    spared = "embedding" if config.decay_embeddings == "no" else None
    return map_axes(lambda names: is_decayed(names) and role(names) != spared, axes)


def _rule(config: OptimConfig, name: str, *, steps: int, axes: Any, width: float,
          peak: float) -> optax.GradientTransformation:
    """One rule of the table with everything that goes around it."""
    def mask(params: Any) -> Any:
        return match(decay_mask(config, axes), params)

    decay = optax.add_decayed_weights(config.weight_decay, mask=mask)
    direction = DIRECTIONS[name](config, axes)
    if width != 1.0:  # without the decoupled decay, which is the same at all widths
        direction = optax.chain(direction, _scale_by_width(axes, optimizer=name, width=width))
    parts = [decay, direction] if name in COUPLED else [direction, decay]
    if name in LAYERWISE:
        parts.append(_scale_by_trust_ratio(axes))
    return optax.chain(*parts, optax.scale_by_learning_rate(make_schedule(config, steps=steps, peak=peak)))


def _scale_by_width(axes: Any, *, optimizer: str, width: float) -> optax.GradientTransformation:
    """The rates of muP, by the width of the model over that of its base."""
    factors = map_axes(lambda names: rate_by_width(names, optimizer=optimizer, width=width), axes)
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, match(factors, updates)))


def _scale_by_trust_ratio(axes: Any) -> optax.GradientTransformation:
    """Each weight's update as large as the weight (You et al. 2020, algorithm 2), each layer of a stack by itself."""
    def scaled(update: jax.Array, param: jax.Array, names: AxisNames) -> jax.Array:
        own = tuple(range(len(names) - len(own_axes(names)), len(names)))
        ours, theirs = (jnp.sqrt(jnp.sum(jnp.square(x), axis=own, keepdims=True)) for x in (param, update))
        return update * jnp.where((ours > 0) & (theirs > 0), ours / jnp.where(theirs > 0, theirs, 1.0), 1.0)

    return optax.stateless(lambda updates, params: jax.tree.map(scaled, updates, params, axes))


Direction = Callable[[OptimConfig, Any], optax.GradientTransformation]


def _adam(config: OptimConfig, axes: Any) -> optax.GradientTransformation:
    del axes
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


DIRECTIONS: dict[str, Direction] = {
    "adamw": _adam,  # Loshchilov and Hutter 2019; the decay scaled by the rate as in torch.optim.AdamW
    "adam": _adam,  # Kingma and Ba 2015, its decay part of the gradient (L2)
    "lamb": _adam,
    "lion": lambda config, axes: optax.scale_by_lion(b1=config.b1, b2=config.b2),  # Chen et al. 2023
    "adafactor": lambda config, axes: scale_by_adafactor(axes, relative=config.adafactor_steps == "relative"),
    "muon": lambda config, axes: scale_by_muon(axes, momentum=config.muon_momentum),
}  # fmt: skip
COUPLED = ("adam",)  # the gradient is decayed, and with it the moments
LAYERWISE = ("lamb",)
