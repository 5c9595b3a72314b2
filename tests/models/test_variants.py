"""Every part of the decoder: documents stay apart, a cache and a mesh change nothing, no part knows a family's name."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmjax.models
from llmjax.convert.registry import FAMILIES
from llmjax.core.mesh import make_mesh, single_device_mesh
from llmjax.core.model_sections import ModelConfig
from llmjax.core.sections import MeshConfig, TaskConfig
from llmjax.models import decoder
from llmjax.models.cache import init_cache
from llmjax.train.batch import put_batch
from llmjax.train.gradients import make_loss_and_grad
from llmjax.train.pretrain import make_loss
from tests.models.variants import VARIANTS, variant

T = 32
ON_A_MESH = ("local and global, norms of all heads", "ALiBi", "softcaps, biases, scales")


def shaken(config: ModelConfig) -> dict:
    """Parameters none of which is trivial."""
    leaves, structure = jax.tree.flatten(decoder.init_params(config, jax.random.key(0), None))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([leaf + 0.1 * jax.random.normal(key, leaf.shape)
                                for leaf, key in zip(leaves, keys, strict=True)])  # fmt: skip


def packed(num_rows: int) -> dict[str, np.ndarray]:
    """Rows of three documents and padding."""
    segments, positions = np.zeros((num_rows, T), np.int32), np.zeros((num_rows, T), np.int32)
    for row in range(num_rows):
        bounds = (0, 9 + row, 20, T - 2)
        for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False), start=1):
            segments[row, start:stop], positions[row, start:stop] = number, np.arange(stop - start)
    tokens = np.random.default_rng(0).integers(0, 64, (num_rows, T)).astype(np.int32)
    return {"tokens_BT": tokens, "positions_BT": positions, "segment_ids_BT": segments}


def with_targets(batch: dict[str, np.ndarray], tokens_BT: jax.Array) -> dict[str, jax.Array | np.ndarray]:
    """With the next token of each document; its last token has none."""
    segments = batch["segment_ids_BT"]
    goes_on = (segments == np.roll(segments, -1, axis=1)) & (segments > 0) & (np.arange(T) < T - 1)[None]
    return batch | {"tokens_BT": tokens_BT, "targets_BT": jnp.where(goes_on, jnp.roll(tokens_BT, -1, axis=1), 0),
                    "weights_BT": goes_on.astype(np.float32)}


@pytest.mark.parametrize("name", VARIANTS)
def test_documents_stay_apart_and_a_cache_changes_nothing(name: str) -> None:
    config = variant(name)
    model, params, batch = decoder.abstract_model(config), shaken(config), packed(2)

    @jax.jit
    def logits(tokens_BT: jax.Array) -> list[jax.Array]:
        """Of the model and of its further heads."""
        out = decoder.forward(model, params, **(batch | {"tokens_BT": tokens_BT}))
        hidden = [out.hidden_BTD]
        if config.multi_token:
            ahead = decoder.look_ahead(model, params, out.hidden_BTD, with_targets(batch, tokens_BT))
            hidden += list(ahead.hidden_KBTD)
        return [decoder.logits(model, params, one_BTD) for one_BTD in hidden]

    @jax.jit
    def continued(tokens_BT: jax.Array) -> jax.Array:
        """The same row by row in two pieces, the second on a cache of the first."""
        cache, pieces = init_cache(config, batch_size=2, max_len=T), []
        for piece in (slice(0, 23), slice(23, T)):
            out = decoder.forward(model, params, tokens_BT[:, piece], positions_BT=batch["positions_BT"][:, piece],
                                  segment_ids_BT=batch["segment_ids_BT"][:, piece], cache=cache)
            pieces.append(decoder.logits(model, params, out.hidden_BTD))
            cache = out.cache
        return jnp.concatenate(pieces, axis=1)

    second = batch["segment_ids_BT"] == 2
    changed = np.where(second, (batch["tokens_BT"] + 7) % 64, batch["tokens_BT"])
    before, *ahead = map(np.asarray, logits(batch["tokens_BT"]))
    after, *ahead_after = map(np.asarray, logits(changed))
    segments = batch["segment_ids_BT"]
    for depth, (one, other) in enumerate(zip((before, *ahead), (after, *ahead_after), strict=True)):
        # A further head has nothing to say where its tokens would be those of the next document.
        inside = (np.pad(segments[:, depth:], ((0, 0), (0, depth))) == segments) & (segments > 0)
        assert np.array_equal(one[inside & ~second], other[inside & ~second])
        assert not np.allclose(one[inside & second], other[inside & second])
    real = batch["segment_ids_BT"] > 0
    if name != "dynamic NTK":  # whose frequencies depend on how long the row is by then
        np.testing.assert_allclose(np.asarray(continued(batch["tokens_BT"]))[real], before[real], rtol=1e-3, atol=1e-4)


def loss_and_gradients(config: ModelConfig, mesh: jax.sharding.Mesh, *, num_microbatches: int = 1) -> tuple:
    rows = packed(8)
    batch = rows | {"targets_BT": np.roll(rows["tokens_BT"], -1, axis=1),
                    "weights_BT": (rows["segment_ids_BT"] > 0).astype(np.float32)}
    model, params = decoder.abstract_model(config), shaken(config)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, model.abstract_params(mesh)))
        step = make_loss_and_grad(model, make_loss(TaskConfig()), num_microbatches=num_microbatches)
        out, grads = jax.jit(step)(params, {}, put_batch(batch, mesh), jax.random.key(3))
        return float(out.loss_sum), jax.device_get(grads)


def assert_equal_gradients(ours: dict, theirs: dict) -> None:
    def check(path: tuple, a: np.ndarray, b: np.ndarray) -> None:
        scale = max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, ours, theirs)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == ON_A_MESH[0] else pytest.mark.slow)
                                  for n in ON_A_MESH])
def test_a_mesh_changes_no_gradient(name: str) -> None:
    config = variant(name, vocab_size=64)
    loss, grads = loss_and_gradients(config, single_device_mesh())
    sharded_loss, sharded_grads = loss_and_gradients(config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert sharded_loss == pytest.approx(loss, rel=1e-5)
    assert_equal_gradients(sharded_grads, grads)


def test_dropout_is_the_same_on_every_mesh_and_in_every_microbatch() -> None:
    config, eight = variant("rotary", dropout=0.4), MeshConfig(data=4, fsdp=2)
    loss, grads = loss_and_gradients(config, single_device_mesh())
    sharded_loss, sharded_grads = loss_and_gradients(config, make_mesh(eight), num_microbatches=1)
    again, _ = loss_and_gradients(config, single_device_mesh(), num_microbatches=4)
    without, _ = loss_and_gradients(variant("rotary"), single_device_mesh())
    assert sharded_loss == pytest.approx(loss, rel=1e-5) and again == pytest.approx(loss, rel=1e-5)
    assert without != pytest.approx(loss, rel=1e-2)
    assert_equal_gradients(sharded_grads, grads)


def test_no_part_of_the_decoder_knows_a_family() -> None:
    """Families are values of the config: no identifier or string of the code says one (comments may cite papers)."""
    first = {name.split("_")[0] for name in FAMILIES}
    names = {name.rstrip("0123456789") if len(name) > 2 else name for name in first}  # gemma3: gemma; but t5
    for path in sorted(Path(llmjax.models.__path__[0]).glob("*.py")):
        code = re.sub(r'"""(.|\n)*?"""|#.*', "", path.read_text()).replace('"llama3"', "")  # a kind of rope_scaling
        found = {name for name in names if re.search(rf"\b{name}", code, re.IGNORECASE)}
        assert not found, f"{path.name}: {found}"
