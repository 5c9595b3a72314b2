"""The decoder: documents do not see each other, a cache changes nothing, initial values do not depend on the mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core import tree
from llmjax.core.mesh import make_mesh
from llmjax.core.sections import MeshConfig, ModelConfig
from llmjax.models import decoder
from llmjax.models.cache import init_cache
from llmjax.models.stack import Execution

CONFIG = ModelConfig(vocab_size=64, num_layers=2, dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
                     compute_dtype="float32", init_scale=0.3)


def packed(seed: int = 0, T: int = 256) -> dict[str, jax.Array]:
    """Two rows of three documents each, and padding."""
    ends = [[100, 180, T], [T // 2, T - 30, T - 10]]
    segments = np.zeros((2, T), np.int32)
    positions = np.zeros((2, T), np.int32)
    for row, bounds in enumerate(ends):
        for number, (start, stop) in enumerate(zip([0, *bounds[:-1]], bounds, strict=True), start=1):
            segments[row, start:stop] = number
            positions[row, start:stop] = np.arange(stop - start)
    tokens = jax.random.randint(jax.random.key(seed), (2, T), 0, CONFIG.vocab_size)
    return {"tokens_BT": tokens, "positions_BT": jnp.asarray(positions), "segment_ids_BT": jnp.asarray(segments)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_document_does_not_change_the_logits_of_another(dtype: str) -> None:
    config = dataclasses.replace(CONFIG, compute_dtype=dtype)
    model, params = decoder.abstract_model(config), decoder.init_params(config, jax.random.key(0), None)
    batch = packed()

    @jax.jit
    def logits(tokens_BT: jax.Array) -> jax.Array:
        out = decoder.forward(model, params, **(batch | {"tokens_BT": tokens_BT}))
        return decoder.logits(model, params, out.hidden_BTD)

    second_BT = batch["segment_ids_BT"] == 2
    changed_BT = jnp.where(second_BT, (batch["tokens_BT"] + 7) % config.vocab_size, batch["tokens_BT"])
    before, after = np.asarray(logits(batch["tokens_BT"])), np.asarray(logits(changed_BT))
    others = np.asarray(~second_BT)
    assert np.array_equal(before[others], after[others])
    assert not np.allclose(before[~others], after[~others])


def test_a_cache_gives_the_logits_of_the_whole_sequence() -> None:
    model, params = decoder.abstract_model(CONFIG), decoder.init_params(CONFIG, jax.random.key(0), None)
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 12), 0, CONFIG.vocab_size)
    positions_BT, ones_BT = jnp.broadcast_to(jnp.arange(12), (2, 12)), jnp.ones((2, 12), jnp.int32)
    whole = decoder.forward(model, params, tokens_BT, positions_BT=positions_BT, segment_ids_BT=ones_BT)
    cache, pieces = init_cache(CONFIG, batch_size=2, max_len=16), []
    for start, stop in ((0, 7), (7, 8), (8, 12)):
        out = decoder.forward(model, params, tokens_BT[:, start:stop], cache=cache,
                              positions_BT=positions_BT[:, start:stop], segment_ids_BT=ones_BT[:, start:stop])
        pieces.append(out.hidden_BTD)
        cache = out.cache
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole.hidden_BTD, rtol=1e-4, atol=1e-4)


def test_initial_values_do_not_depend_on_the_mesh() -> None:
    single = decoder.init_params(CONFIG, jax.random.key(3), None)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        sharded = decoder.init_params(CONFIG, jax.random.key(3), mesh)
    for path, leaf in tree.flatten(sharded).items():
        # The same random bits; what turns them into normal values may round the last bit differently.
        np.testing.assert_allclose(leaf, tree.flatten(single)[path], rtol=1e-6, atol=1e-6, err_msg=str(path))
    assert sharded["blocks"]["mlp"]["up"].sharding.shard_shape((2, 32, 48)) == (2, 16, 24)


def test_saved_matmuls_are_not_run_again() -> None:
    """Queries, keys, values, output, gate and up; of the last, down, no derivative needs the result."""
    model, params = decoder.abstract_model(CONFIG), decoder.init_params(CONFIG, jax.random.key(0), None)

    def products(remat: str) -> int:
        def scalar(params: dict) -> jax.Array:
            return jnp.sum(decoder.forward(model, params, **packed(), execution=Execution(remat)).hidden_BTD)

        return str(jax.make_jaxpr(jax.grad(scalar))(params)).count("dot_general[")

    assert products("full") - products("save_matmuls") == 6


@pytest.mark.parametrize("remat", ["full", "save_matmuls", "save_names", "offload"])
def test_rematerialisation_changes_no_gradient(remat: str) -> None:
    model, params = decoder.abstract_model(CONFIG), decoder.init_params(CONFIG, jax.random.key(0), None)
    batch = packed()
    cotangent = jax.random.normal(jax.random.key(1), (2, 256, CONFIG.dim))

    def scalar(params: dict, remat: str) -> jax.Array:
        out = decoder.forward(model, params, **batch, execution=Execution(remat, ("block_input", "mlp_out")))
        return jnp.mean(out.hidden_BTD * cotangent)

    plain, again = jax.grad(scalar)(params, "none"), jax.grad(scalar)(params, remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()), plain, again)
