"""muP: what the width does to initial values, rates, logits and scores, told from declarations alone."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core import config as configs
from llmjax.core.errors import ConfigError
from llmjax.core.model_sections import ModelConfig, MoEConfig, MupConfig
from llmjax.core.sections import OptimConfig
from llmjax.core.tree import flatten
from llmjax.models import decoder, parametrisation
from llmjax.optim.build import build_optimizer

BASE = ModelConfig(vocab_size=32, num_layers=2, dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
                   compute_dtype="float32", moe=MoEConfig(num_experts=4))
WIDE = dataclasses.replace(BASE, dim=128, num_heads=16, num_kv_heads=8, mlp_dim=256, mup=MupConfig(base_width=32))
# What four times the width does to the standard deviation of initial values and to the rate.
FACTORS = {"embedder/table": (1, 1), "head/kernel": (1, 1), "blocks/mlp/router/kernel": (1 / 4, 1 / 4),
           **{f"blocks/attn/{name}": (1 / 2, 1 / 4) for name in "qkvo"},
           **{f"blocks/mlp/experts/{name}": (1 / 2, 1 / 4) for name in ("gate", "up", "down")},
           **{f"{name}/scale": (1, 1) for name in ("final_norm", "blocks/attn_norm", "blocks/mlp_norm")}}


def by_path(tree: dict) -> dict[str, jax.Array]:
    return {"/".join(path): leaf for path, leaf in flatten(tree).items()}


def test_initial_values_and_rates_follow_the_declarations() -> None:
    plain = dataclasses.replace(WIDE, mup=MupConfig())
    theirs = by_path(decoder.init_params(plain, jax.random.key(0), None))
    ours = by_path(decoder.init_params(WIDE, jax.random.key(0), None))
    assert set(ours) == set(FACTORS)
    for path, leaf in ours.items():
        np.testing.assert_allclose(leaf, theirs[path] * FACTORS[path][0], rtol=1e-6, err_msg=path)
    model = decoder.abstract_model(WIDE)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), model.shapes)
    optim = OptimConfig(learning_rate=0.5, warmup_steps=0, schedule="constant")
    for name, power in (("adamw", 1.0), ("lion", 1.0), ("muon", 0.5)):
        optimizer = build_optimizer(dataclasses.replace(optim, name=name), steps=1, axes=model.axes,
                                    width=parametrisation.width(WIDE))
        plain_optimizer = build_optimizer(dataclasses.replace(optim, name=name), steps=1, axes=model.axes)
        grads = jax.tree.map(jnp.ones_like, params)
        steps = [by_path(o.update(grads, o.init(params), params)[0]) for o in (optimizer, plain_optimizer)]
        for path, step in steps[0].items():
            factor = FACTORS[path][1] ** (1.0 if "router" in path else power)
            np.testing.assert_allclose(step, steps[1][path] * factor, rtol=1e-5, err_msg=path)


def test_decay_is_the_same_at_all_widths() -> None:
    axes = {"up": ("embed", "mlp")}
    params = {"up": jnp.ones((4, 8))}
    optim = OptimConfig(learning_rate=0.5, warmup_steps=0, schedule="constant", weight_decay=0.1)
    for width in (1.0, 4.0):
        optimizer = build_optimizer(optim, steps=1, axes=axes, width=width)
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        np.testing.assert_allclose(updates["up"], -0.05, rtol=1e-6)


def test_nothing_changes_at_the_base_width() -> None:
    config = dataclasses.replace(BASE, mup=MupConfig(base_width=32, base_head_dim=8))
    assert parametrisation.width(config) == 1.0
    said = parametrisation.standard(config)
    assert dataclasses.replace(said, attention=BASE.attention) == BASE
    assert math.isclose(said.attention.scale, BASE.head_dim**-0.5)


def test_logits_are_divided_and_scores_of_growing_heads_scale_by_their_dims() -> None:
    grown = dataclasses.replace(WIDE, num_heads=4, num_kv_heads=2, head_dim=32,
                                mup=MupConfig(base_width=32, base_head_dim=8))
    said = parametrisation.standard(grown)
    assert said.attention.scale == pytest.approx(8**0.5 / 32) and said.logit_scale == 0.25
    params = decoder.init_params(grown, jax.random.key(0), None)
    tokens_BT = jnp.arange(8)[None] % 32
    inputs = {"positions_BT": jnp.arange(8)[None], "segment_ids_BT": jnp.ones((1, 8), jnp.int32)}

    def logits(config: ModelConfig) -> jax.Array:
        model = decoder.abstract_model(config)
        return decoder.logits(model, params, decoder.forward(model, params, tokens_BT, **inputs).hidden_BTD)

    plain = dataclasses.replace(grown, mup=MupConfig(), attention=dataclasses.replace(grown.attention,
                                                                                      scale=8**0.5 / 32))
    wanted = logits(plain) / 4
    np.testing.assert_allclose(logits(grown), wanted, rtol=1e-4, atol=1e-6)
    said, params = parametrisation.folded(grown, params)
    assert said == plain
    np.testing.assert_allclose(logits(said), wanted, rtol=1e-4, atol=1e-6)


def test_an_optimiser_without_a_rule_for_widths_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.name='lamb'.*base_width=64"):
        configs.resolve({"optim": {"name": "lamb"}, "model": {"mup": {"base_width": 64}}})
