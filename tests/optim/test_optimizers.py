"""The optimisers beside AdamW, step by step, against torch and optax on the same gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.core.sections import OptimConfig
from llmjax.optim.build import build_optimizer
from llmjax.optim.schedule import make_schedule

NUM_STEPS = 10
CONFIG = OptimConfig(learning_rate=1e-2, warmup_steps=3, schedule="linear", weight_decay=0.3, b1=0.9, b2=0.95, eps=1e-6)
# Weights of their own, so that a leaf is one weight to everybody else as well.
AXES = {"up": ("embed", "mlp"), "down": ("mlp", "embed"), "scale": ("norm",)}
SHAPES = {"up": (6, 20), "down": (20, 6), "scale": (6,)}
Tree = dict[str, Any]


def gradients(step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Tree:
    rng = np.random.default_rng(step)
    return {name: jnp.asarray(rng.normal(size=shape) * (1 + 3 * (step % 3)), jnp.float32)
            for name, shape in sorted(shapes.items())}


def trajectory(optimizer: optax.GradientTransformation, params: Tree) -> list[Tree]:
    """The parameters after each step."""
    state, found, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for step in range(NUM_STEPS):
        updates, state = update(gradients(step, {n: p.shape for n, p in params.items()}), state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found


def ours(config: OptimConfig, axes: dict[str, tuple[str, ...]] = AXES, params: Tree | None = None) -> list[Tree]:
    params = gradients(1000) if params is None else params
    return trajectory(build_optimizer(config, steps=NUM_STEPS, axes=axes), params)


def assert_alike(found: list[Tree], wanted: list[Tree]) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, wanted)


def decayed(params: Tree) -> Tree:
    return {name: name != "scale" for name in params}


@pytest.mark.parametrize("name", ["lion", "lamb", "adafactor"])
def test_trajectories_equal_those_of_optax(name: str) -> None:
    config = dataclasses.replace(CONFIG, name=name, weight_decay=0.0 if name == "adafactor" else 0.3)
    rate = make_schedule(config, steps=NUM_STEPS)
    theirs = {
        "lion": lambda: optax.lion(rate, b1=0.9, b2=0.95, weight_decay=0.3, mask=decayed),
        "lamb": lambda: optax.lamb(rate, b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.3, mask=decayed),
        "adafactor": lambda: optax.adafactor(rate, min_dim_size_to_factor=1),
    }[name]()
    assert_alike(ours(config), trajectory(theirs, gradients(1000)))


@pytest.mark.parametrize(("name", "make"), [
    ("adam", lambda torch, groups: torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-6)),
    ("adamw", lambda torch, groups: torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)),
    ("adafactor", lambda torch, groups: torch.optim.Adafactor(groups, eps=(None, 1e-3))),
])  # fmt: skip
def test_trajectories_equal_those_of_torch(name: str, make: Any) -> None:
    """torch's Adafactor has a schedule of its own: one over the root of the step, where the rate bounds it not."""
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(CONFIG, name=name, schedule="constant", warmup_steps=0)
    if name == "adafactor":
        config = dataclasses.replace(config, schedule="inverse_sqrt", warmup_steps=1, learning_rate=1.0,
                                     weight_decay=0.0)
    params = gradients(1000)
    theirs = {key: torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for key, leaf in params.items()}
    optimizer = make(torch, [
        {"params": [theirs["up"], theirs["down"]], "weight_decay": config.weight_decay, "lr": config.learning_rate},
        {"params": [theirs["scale"]], "weight_decay": 0.0, "lr": config.learning_rate}])
    found = ours(config)
    for step in range(NUM_STEPS):
        for key, grad in gradients(step).items():
            theirs[key].grad = torch.tensor(np.asarray(grad))
        optimizer.step()
        for key, param in theirs.items():
            wanted = param.detach().numpy()  # of sizes up to 20: float32 ends at the sixth digit of that
            np.testing.assert_allclose(found[step][key], wanted, rtol=3e-5, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["lamb", "adafactor", "lion", "adam"])
def test_a_stack_is_as_many_weights_and_heads_are_one_matrix(name: str) -> None:
    """Layer by layer the same as alone, whatever the other layers' sizes; (D, N, H) the same as (D, N H)."""
    config = dataclasses.replace(CONFIG, name=name)
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(6, 4, 5)) * size for size in (0.1, 1.0, 20.0)]
    stacked = {"q": jnp.asarray(np.stack(layers), jnp.float32)}
    axes = ("layers", "embed", "heads", "head_dim")
    optimizer = build_optimizer(config, steps=NUM_STEPS, axes={"q": axes})
    state = optimizer.init(stacked)
    grads = [rng.normal(size=(3, 6, 4, 5)) * np.array([1.0, 5.0, 0.01])[:, None, None, None] for _ in range(4)]
    for grad in grads:
        updates, state = optimizer.update({"q": jnp.asarray(grad, jnp.float32)}, state, stacked)
        stacked = optax.apply_updates(stacked, updates)
    alone = build_optimizer(config, steps=NUM_STEPS, axes={"q": ("embed", "mlp")})
    for place, layer in enumerate(layers):
        param = {"q": jnp.asarray(layer.reshape(6, 20), jnp.float32)}
        state = alone.init(param)
        for grad in grads:
            updates, state = alone.update({"q": jnp.asarray(grad[place].reshape(6, 20), jnp.float32)}, state, param)
            param = optax.apply_updates(param, updates)
        np.testing.assert_allclose(stacked["q"][place].reshape(6, 20), param["q"], rtol=1e-5, atol=1e-6)


def test_adafactor_keeps_rows_and_columns_alone() -> None:
    axes = {"q": ("layers", "embed", "heads", "head_dim"), "scale": ("layers", "norm")}
    optimizer = build_optimizer(dataclasses.replace(CONFIG, name="adafactor"), steps=1, axes=axes)
    state = optimizer.init({"q": jnp.ones((3, 64, 8, 16)), "scale": jnp.ones((3, 64))})
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 3 * (64 + 8 * 16) + 3 * 64 + 8


def test_embeddings_may_be_spared_by_decay() -> None:
    axes = {"table": ("vocab", "embed"), "up": ("embed", "mlp")}
    params = {"table": jnp.ones((5, 4)), "up": jnp.ones((4, 6))}
    optimizer = build_optimizer(dataclasses.replace(CONFIG, decay_embeddings="no"), steps=NUM_STEPS, axes=axes)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert not np.any(updates["table"]) and np.all(np.asarray(updates["up"]) < 0)
