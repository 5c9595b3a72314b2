"""Maximal update parametrisation (Yang et al. 2022, arXiv 2203.03466): what is best at one width is best at all.

In the form of table 8: with m the width over the base width, hidden matrices begin at 1 / sqrt(m) of their usual size
(so 1 / sqrt(fan_in)) and have 1 / m of Adam's rate; embedding, head and vectors keep both; logits are divided by m, and
scores of heads that grow scale by 1 / head_dim. At the base width nothing changes. The model itself knows none of it:
initial values and rates follow from the axes of each parameter (core/roles.py), and both divisions are fields that any
model has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from llmjax.core.model_sections import ModelConfig, MupConfig
from llmjax.core.roles import init_by_width
from llmjax.core.task import Params


def width(config: ModelConfig) -> float:
    """The model's width over the base width of its parametrisation, 1 without one."""
    return config.dim / config.mup.base_width if config.mup.base_width else 1.0


def standard(config: ModelConfig) -> ModelConfig:
    """The same function of the same parameters, said without a base width."""
    base, head_dim = config.mup.base_head_dim, score_dim(config)
    scale = config.attention.scale
    if config.mup.base_width and base:
        scale = (scale or base**-0.5) * base / head_dim
    return dataclasses.replace(config, mup=MupConfig(), logit_scale=config.logit_scale / width(config),
                               attention=dataclasses.replace(config.attention, scale=scale))


def score_dim(config: ModelConfig) -> int:
    """Dims of a head over which queries and keys are multiplied."""
    latent = config.latent
    return latent.qk_nope_head_dim + latent.qk_rope_head_dim if latent.kv_lora_rank else config.head_dim


def scaled(config: ModelConfig, params: Params, axes: Any) -> Params:
    """Fresh parameters at the size that their width asks for."""
    m = width(config)
    return params if m == 1.0 else jax.tree.map(lambda leaf, names: leaf * init_by_width(names, width=m), params, axes)


def folded(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same function without a base width, the division of the logits taken into the last norm where it can be."""
    if not config.mup.base_width:
        return config, params
    said = standard(config)
    if config.norm.scale == "plain" and config.norm.final == "norm":
        params = params | {"final_norm": {name: leaf / width(config) for name, leaf in params["final_norm"].items()}}
        said = dataclasses.replace(said, logit_scale=config.logit_scale)
    return said, params
