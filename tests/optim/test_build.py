"""Optimisers against torch, optax and linear algebra; what decays and what Muon takes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llmjax.core.sections import OptimConfig
from llmjax.optim.build import DIRECTIONS, build_optimizer, clip_by_global_norm
from llmjax.optim.labels import is_decayed, is_hidden_matrix
from llmjax.optim.muon import newton_schulz
from llmjax.optim.schedule import make_schedule

AXES = {
    "embedder": {"table": ("vocab", "embed")},
    "blocks": {
        "norm": {"scale": ("layers", "norm")},
        "q": ("layers", "embed", "heads", "head_dim"),
        "o": ("layers", "heads", "head_dim", "embed"),
    },
    "head": {"kernel": ("embed", "vocab"), "bias": ("vocab",)},
}
SIZES = {"vocab": 12, "embed": 8, "norm": 8, "layers": 4, "heads": 4, "head_dim": 4}


def random_tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)

    def leaf(names: tuple[str, ...]) -> jax.Array:
        return jnp.asarray(rng.normal(size=[SIZES[name] for name in names]), jnp.float32)

    return jax.tree.map(leaf, AXES, is_leaf=lambda x: isinstance(x, tuple))


def run(optimizer: optax.GradientTransformation, params: dict, num_steps: int) -> dict:
    @jax.jit
    def step(params: dict, state: optax.OptState, grads: dict) -> tuple[dict, optax.OptState]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for seed in range(num_steps):
        params, state = step(params, state, random_tree(seed + 100))
    return params


def test_labels_follow_the_axes() -> None:
    assert is_decayed(("layers", "embed", "mlp")) and is_decayed(("vocab", "embed"))
    assert not is_decayed(("layers", "norm")) and not is_decayed(("vocab",))
    assert is_hidden_matrix(("layers", "heads", "head_dim", "embed"))
    assert not is_hidden_matrix(("vocab", "embed")) and not is_hidden_matrix(("layers", "norm"))


def test_adamw_follows_torch() -> None:
    torch = pytest.importorskip("torch")
    config = OptimConfig(learning_rate=1e-2, warmup_steps=3, weight_decay=0.5, b2=0.9, eps=1e-5, schedule="linear")
    num_steps = 12
    ours = run(build_optimizer(config, steps=num_steps, axes=AXES), random_tree(0), num_steps)

    leaves, names = jax.tree.leaves(random_tree(0)), jax.tree.leaves(AXES, is_leaf=lambda x: isinstance(x, tuple))
    params = [torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for leaf in leaves]
    decayed = [p for p, axes in zip(params, names, strict=True) if len([a for a in axes if a != "layers"]) > 1]
    others = [p for p in params if not any(p is q for q in decayed)]
    assert len(decayed) == 4 and len(others) == 2
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}],
        betas=(config.b1, config.b2),
        eps=config.eps,
    )
    rate = make_schedule(config, steps=num_steps)
    for step in range(num_steps):
        for param, grad in zip(params, jax.tree.leaves(random_tree(step + 100)), strict=True):
            param.grad = torch.tensor(np.asarray(grad))
        for group in optimizer.param_groups:
            group["lr"] = float(rate(step))
        optimizer.step()
    for ours_leaf, torch_leaf in zip(jax.tree.leaves(ours), params, strict=True):
        np.testing.assert_allclose(ours_leaf, torch_leaf.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_newton_schulz_orthogonalises_every_matrix_of_the_stack() -> None:
    for shape in [(3, 16, 40), (3, 40, 16)]:
        x_LRC = jax.random.normal(jax.random.key(0), shape)
        y_LRC = newton_schulz(x_LRC)
        singular = np.linalg.svd(np.asarray(y_LRC), compute_uv=False)
        assert singular.min() > 0.6 and singular.max() < 1.3
        u, _, vt = np.linalg.svd(np.asarray(x_LRC), full_matrices=False)
        cosine = np.sum(np.asarray(y_LRC) * (u @ vt)) / np.linalg.norm(y_LRC) / np.linalg.norm(u @ vt)
        assert cosine > 0.97


def test_muon_follows_optax() -> None:
    """optax.contrib.muon differs in bias correction alone, which orthogonalisation divides out only at momentum 0."""
    config = OptimConfig(
        name="muon", learning_rate=1e-2, warmup_steps=0, weight_decay=0.1, schedule="constant", muon_momentum=0.0,
        adam_learning_rate=3e-3,
    )
    ours = run(build_optimizer(config, steps=8, axes=AXES), random_tree(0), 8)["blocks"]
    dims = {
        "norm": {"scale": None},
        "q": optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2, 3)),
        "o": optax.contrib.MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=(3,)),
    }
    theirs_optimizer = optax.contrib.muon(
        1e-2, beta=0.0, weight_decay=0.1, consistent_rms=0.2, muon_weight_dimension_numbers=dims
    )
    params = random_tree(0)["blocks"]
    state = theirs_optimizer.init(params)
    for seed in range(8):
        updates, state = theirs_optimizer.update(random_tree(seed + 100)["blocks"], state, params)
        params = optax.apply_updates(params, updates)
    for name in ("q", "o"):
        np.testing.assert_allclose(ours[name], params[name], rtol=1e-4, atol=1e-5)


def test_muon_leaves_embeddings_head_and_norms_to_adamw() -> None:
    muon = OptimConfig(name="muon", learning_rate=1e-2, adam_learning_rate=3e-3)
    adamw = OptimConfig(name="adamw", learning_rate=3e-3)
    with_muon = run(build_optimizer(muon, steps=5, axes=AXES), random_tree(0), 5)
    with_adamw = run(build_optimizer(adamw, steps=5, axes=AXES), random_tree(0), 5)
    for tree in (with_muon, with_adamw):
        del tree["blocks"]["q"], tree["blocks"]["o"]
    jax.tree.map(np.testing.assert_array_equal, with_muon, with_adamw)


@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("sizes", [(4, 2), (8, 1)])
def test_sharded_update_equals_the_unsharded_one(name: str, sizes: tuple[int, int]) -> None:
    config = OptimConfig(name=name, learning_rate=1e-2, warmup_steps=0)
    optimizer = build_optimizer(config, steps=10, axes=AXES)
    reference = run(optimizer, random_tree(0), 3)
    mesh = jax.make_mesh(sizes, ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    rules = {"embed": "fsdp", "heads": "tensor"}

    def place(tree: dict) -> dict:
        def put(leaf: jax.Array, names: tuple[str, ...]) -> jax.Array:
            return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*(rules.get(name) for name in names))))

        return jax.tree.map(put, tree, AXES)

    @jax.jit
    def step(params: dict, state: optax.OptState, grads: dict) -> tuple[dict, optax.OptState]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        params = place(random_tree(0))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        state = jax.jit(optimizer.init)(params)
        for seed in range(3):
            params, state = step(params, state, place(random_tree(seed + 100)))
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, reference)
    replicated = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 64 and leaf.sharding.is_fully_replicated]
    assert not replicated


def test_clipping() -> None:
    grads = random_tree(1)
    norm = optax.tree.norm(grads)
    clipped = clip_by_global_norm(grads, norm, max_norm=0.5)
    assert float(optax.tree.norm(clipped)) == pytest.approx(0.5, rel=1e-5)
    for untouched in (clip_by_global_norm(grads, norm, max_norm=0.0), clip_by_global_norm(grads, norm, max_norm=1e6)):
        jax.tree.map(np.testing.assert_array_equal, untouched, grads)
