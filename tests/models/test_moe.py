"""Mixtures of experts: against plain loops over tokens, on every expert-parallel mesh, with every share of the load."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from llmjax.core import axes as axes_lib
from llmjax.core import collectives, tree
from llmjax.core.mesh import BATCH_AXES, SEQUENCE_AXES, TOKEN_AXES, make_mesh
from llmjax.core.model_sections import ModelConfig, MoEConfig
from llmjax.core.sections import MeshConfig
from llmjax.models import experts
from llmjax.models.moe import MoE
from llmjax.models.noise import Noise
from llmjax.models.param import logical_axes

B, T, D, E = 8, 16, 16, 8
MOE = MoEConfig(num_experts=E, top_k=2, expert_mlp_dim=12)
CONFIG = ModelConfig(dim=D, mlp_dim=24, num_layers=2, compute_dtype="float32", init_scale=0.5, moe=MOE)
KINDS = {
    "softmax": MOE,
    "everything": dataclasses.replace(
        MOE, score="sigmoid", top_k=3, num_groups=4, top_groups=2, num_shared_experts=2, router_bias="balancing",
        scaling_factor=2.5, bias="all"),
    "learned bias": dataclasses.replace(MOE, router_bias="learned", bias="all"),
    "jitter, as scored": dataclasses.replace(MOE, jitter=0.3, weights="as_scored"),
    "capacity": dataclasses.replace(MOE, capacity_factor=1.0, group_size=8),
}  # fmt: skip
MESHES = {"2": MeshConfig(expert=2, data=1), "4": MeshConfig(expert=4, data=1), "8": MeshConfig(expert=8, data=1),
          "2 and others": MeshConfig(expert=2, data=1, fsdp=2, tensor=2)}  # fmt: skip
QUICK = ("everything", "2 and others")


def config_of(kind: str) -> ModelConfig:
    activation = "swiglu_clamped" if kind == "learned bias" else "swiglu"
    return dataclasses.replace(CONFIG, moe=KINDS[kind], activation=activation)


@functools.cache
def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, cotangents, and which tokens are real."""
    rng = np.random.default_rng(0)
    x_BTD, weight_BTD = rng.normal(size=(2, B, T, D)).astype(np.float32)
    return x_BTD, weight_BTD, np.arange(T)[None] < rng.integers(T // 2, T + 1, (B, 1))


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, its parameters shaken so that none is trivial."""

    graphdef: Any
    params: dict[str, Any]
    axes: dict[str, Any]


@functools.cache
def layer_of(kind: str) -> Layer:
    module = MoE(config_of(kind), nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    leaves = tree.flatten(nnx.to_pure_dict(state))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    shaken = {p: v + 0.1 * jax.random.normal(k, v.shape) for k, (p, v) in zip(keys, leaves.items(), strict=True)}
    return Layer(graphdef, tree.unflatten(shaken), logical_axes(module))


def run(kind: str, mesh: jax.sharding.Mesh) -> tuple[dict[str, Any], dict[str, Any], np.ndarray, np.ndarray]:
    """Sums, gradients (of output, balance and z losses), outputs and input gradients of the layer on a mesh."""
    layer = layer_of(kind)
    specs = jax.tree.map(lambda axes: axes_lib.spec(axes, axes_lib.PARAM_RULES), layer.axes,
                         is_leaf=lambda leaf: isinstance(leaf, tuple))
    batch = PartitionSpec(BATCH_AXES, SEQUENCE_AXES)

    def scalar(params: dict, x_BTD: jax.Array, weight_BTD: jax.Array, real_BT: jax.Array, ids_BT: jax.Array) -> tuple:
        noise = Noise(jax.random.key(3), ids_BT) if KINDS[kind].jitter else None
        out_BTD, sums = nnx.merge(layer.graphdef, params)(x_BTD, real_BT=real_BT, noise=noise)
        return jnp.sum(out_BTD * weight_BTD) + 3.0 * sums.balance_loss + 0.1 * sums.z_loss, (sums, out_BTD)

    def local(params: dict, *args: jax.Array) -> tuple:
        (_, (sums, out_BTD)), grads = jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(params, *args)
        summed = jax.tree.map(collectives.sum_gradient, grads[0], specs)
        return jax.tree.map(lambda x: collectives.sum_over(x, TOKEN_AXES), sums), summed, out_BTD, grads[1]

    ids_BT = np.arange(B * T, dtype=np.int32).reshape(B, T)
    with jax.set_mesh(mesh):
        function = jax.shard_map(local, in_specs=(specs, batch, batch, batch, batch),
                                 out_specs=(PartitionSpec(), specs, batch, batch), check_vma=False)
        put = lambda array, spec: jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))  # noqa: E731
        params = jax.tree.map(put, layer.params, specs)
        sums, grads, out, dx = jax.jit(function)(params, *(put(array, batch) for array in (*arrays(), ids_BT)))
        return jax.device_get((dataclasses.asdict(sums), grads, out, dx))


@functools.cache
def on_one_device(kind: str) -> tuple:
    return run(kind, make_mesh(MeshConfig(data=1), jax.devices()[:1]))


def naive(kind: str) -> np.ndarray:
    """Each token alone, each of its experts in turn."""
    config, params = config_of(kind).moe, jax.device_get(layer_of(kind).params)
    x_BTD, _, _ = arrays()
    router, stacked, out = params["router"], params["experts"], np.zeros_like(x_BTD)
    for place in np.ndindex(B, T):
        x = x_BTD[place]
        logits = x @ router["kernel"] + router.get("bias", 0.0)
        scores = np.exp(logits) / np.exp(logits).sum() if config.score == "softmax" else 1 / (1 + np.exp(-logits))
        wanted = scores + router.get("balance", 0.0)
        if config.num_groups > 1:
            groups = wanted.reshape(config.num_groups, -1)
            best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(axis=1))[: config.top_groups]
            wanted = np.where(np.isin(np.arange(E) // groups.shape[1], best), wanted, -np.inf)
        chosen = np.argsort(-wanted, kind="stable")[: config.top_k]
        for e in chosen:
            gate = x @ stacked["gate"][e] + stacked.get("gate_bias", np.zeros((E, 1)))[e]
            up = x @ stacked["up"][e] + stacked.get("up_bias", np.zeros((E, 1)))[e]
            if kind == "learned bias":
                gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
                inner = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            else:
                inner = up * gate / (1 + np.exp(-gate))
            down = inner @ stacked["down"][e] + stacked.get("down_bias", np.zeros((E, 1)))[e]
            share = scores[e] / (scores[chosen].sum() if config.weights == "normalised" else 1.0)
            out[place] += share * config.scaling_factor * down
        if "shared" in params:
            gate, up = x @ params["shared"]["gate"], x @ params["shared"]["up"]
            out[place] += (up * gate / (1 + np.exp(-gate))) @ params["shared"]["down"]
    return out


def marked(kind: str, *rest: str) -> Any:
    """A case that runs by default only when it is the quick one."""
    quick = (kind, *rest) == QUICK[: 1 + len(rest)]
    return pytest.param(kind, *rest, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("kind", [marked(kind) for kind in ("softmax", "everything", "learned bias")])
def test_outputs_equal_a_loop_over_tokens_and_experts(kind: str) -> None:
    _, _, out_BTD, _ = on_one_device(kind)
    np.testing.assert_allclose(out_BTD, naive(kind), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "name"), [marked(kind, name) for kind in KINDS for name in MESHES])
def test_expert_parallel_meshes_give_the_same_numbers(kind: str, name: str) -> None:
    assert_as_on_one_device(kind, name)


def test_rows_without_room_at_their_experts_come_in_further_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ninth of an even share at a time."""
    monkeypatch.setattr(experts, "ROOM", 1 / 9)
    monkeypatch.setattr(experts, "WHOLE_ROWS", 1)
    assert experts.room_for(B * T * MOE.top_k, shards=4) == 29
    assert_as_on_one_device("everything", "4")


def assert_as_on_one_device(kind: str, name: str) -> None:
    size = MESHES[name].expert * MESHES[name].fsdp * MESHES[name].tensor
    sums, grads, out, dx = run(kind, make_mesh(MESHES[name], jax.devices()[:size]))
    wanted_sums, wanted_grads, wanted_out, wanted_dx = on_one_device(kind)
    np.testing.assert_array_equal(sums["load_E"], wanted_sums["load_E"])  # the routing first
    for field, value in wanted_sums.items():
        np.testing.assert_allclose(sums[field], value, rtol=1e-5, err_msg=field)
    np.testing.assert_allclose(out, wanted_out, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, wanted_dx, rtol=1e-4, atol=1e-4)
    for path, grad in tree.flatten(grads).items():
        wanted = tree.flatten(wanted_grads)[path]
        assert np.abs(grad - wanted).max() <= 1e-5 * max(np.abs(wanted).max(), 1e-9), path
