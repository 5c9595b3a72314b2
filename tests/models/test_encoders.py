"""Encoders and decoders beside them: packed documents stay apart, caches and meshes change nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core.config import resolve
from llmjax.core.errors import ConfigError
from llmjax.core.mesh import check_fits, make_mesh, single_device_mesh
from llmjax.core.model_sections import ModelConfig
from llmjax.core.sections import MeshConfig, TaskConfig
from llmjax.models import decoder
from llmjax.models.relative import bucket
from llmjax.train.batch import put_batch
from llmjax.train.gradients import make_loss_and_grad
from llmjax.train.pretrain import make_loss
from tests.models.variants import TINY

POST_NORM = {"kind": "layer", "bias": "learned", "placement": "sum", "final": "none"}
KINDS: dict[str, dict[str, Any]] = {
    "relative": {"encoder_layers": 3, "positions": "relative", "relative_buckets": 8, "relative_max_distance": 9,
                 "activation": "relu", "attention": {"scale": 1.0}},
    "experts in turn": {"encoder_layers": 2, "positions": "relative", "activation": "relu",
                        "moe": {"num_experts": 4, "top_k": 1, "every": 2, "weights": "as_scored",
                                "balance_loss": 0.1}},
    "sinusoidal, norms of sums": {"encoder_layers": 2, "positions": "sinusoidal_halves", "activation": "relu",
                                  "norm": POST_NORM, "attention": {"bias": "all"}, "mlp_bias": "all",
                                  "head_bias": "learned", "dropout": 0.3},
    "masked": {"positions": "learned", "activation": "gelu", "norm": POST_NORM | {"embedding": "norm"},
               "attention": {"mask": "bidirectional", "bias": "all"}, "embeddings": "tied", "token_types": 2,
               "head_transform": "dense", "head_bias": "learned"},
    "prefix": {"attention": {"mask": "prefix"}},
}  # fmt: skip
ON_A_MESH = ("relative", "masked")
T, S = 32, 40


def model_of(kind: str) -> ModelConfig:
    return resolve({"model": TINY | KINDS[kind], "data": {"seq_len": S}}).model


def shaken(config: ModelConfig) -> dict:
    """Parameters none of which is trivial."""
    leaves, structure = jax.tree.flatten(decoder.init_params(config, jax.random.key(0), None))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([leaf + 0.1 * jax.random.normal(key, leaf.shape)
                                for leaf, key in zip(leaves, keys, strict=True)])  # fmt: skip


def packed(config: ModelConfig, num_rows: int) -> dict[str, np.ndarray]:
    """Rows of three documents and padding; with an encoder, each target beside its source."""
    batch = documents(num_rows, "BT", (0, 9, 20, T - 2), seed=0)
    batch |= {"targets_BT": np.roll(batch["tokens_BT"], -1, axis=1),
              "weights_BT": (batch["segment_ids_BT"] > 0).astype(np.float32)}
    if config.encoder_layers:
        batch |= documents(num_rows, "BS", (0, 17, 21, S - 4), seed=1)
    if config.attention.mask == "prefix":
        batch["prefix_BT"] = (batch["positions_BT"] < 4).astype(np.int32)
    return batch


def documents(num_rows: int, letters: str, bounds: tuple[int, ...], *, seed: int) -> dict[str, np.ndarray]:
    length = T if letters == "BT" else S
    segments, positions = np.zeros((num_rows, length), np.int32), np.zeros((num_rows, length), np.int32)
    for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False), start=1):
        segments[:, start:stop], positions[:, start:stop] = number, np.arange(stop - start)
    tokens = np.random.default_rng(seed).integers(0, 64, (num_rows, length)).astype(np.int32)
    return {f"tokens_{letters}": tokens, f"positions_{letters}": positions, f"segment_ids_{letters}": segments}


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_changes_no_other_by_a_bit(kind: str) -> None:
    config = model_of(kind)
    model, params, batch = decoder.abstract_model(config), shaken(config), packed(config, 2)

    @jax.jit
    def logits(batch: dict) -> jax.Array:
        return decoder.logits(model, params, decoder.forward_batch(model, params, batch).hidden_BTD)

    before, second = np.asarray(logits(batch)), batch["segment_ids_BT"] == 2
    for letters in ("BT", "BS") if config.encoder_layers else ("BT",):
        tokens, own = batch[f"tokens_{letters}"], batch[f"segment_ids_{letters}"] == 2
        after = np.asarray(logits(batch | {f"tokens_{letters}": np.where(own, (tokens + 7) % 64, tokens)}))
        assert np.array_equal(before[~second], after[~second])
        assert not np.allclose(before[second], after[second])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "masked"])
def test_a_cache_changes_nothing(kind: str) -> None:
    config = model_of(kind)
    model, params, batch = decoder.abstract_model(config), shaken(config), packed(config, 2)

    @jax.jit
    def both(batch: dict) -> tuple[jax.Array, jax.Array]:
        """At once, and in two pieces, the second on a cache of the first."""
        whole = decoder.forward_batch(model, params, batch).hidden_BTD
        if config.encoder_layers:
            source, _ = decoder.encode(model, params, batch["tokens_BS"], positions_BS=batch["positions_BS"],
                                       segment_ids_BS=batch["segment_ids_BS"])
            cache = decoder.start_cache(model, params, source, max_len=T)
        else:
            cache = decoder.init_cache(config, batch_size=2, max_len=T)
        pieces = []
        for piece in (slice(0, 24), slice(24, T)):  # no prefix is cut
            part = {name: batch[f"{name}_BT"][:, piece] for name in ("positions", "segment_ids")}
            out = decoder.forward(model, params, batch["tokens_BT"][:, piece], positions_BT=part["positions"],
                                  segment_ids_BT=part["segment_ids"], cache=cache,
                                  prefix_BT=batch["prefix_BT"][:, piece] if "prefix_BT" in batch else None)
            pieces.append(out.hidden_BTD)
            cache = out.cache
        return whole, jnp.concatenate(pieces, axis=1)

    whole, pieces = both(batch)
    real = batch["segment_ids_BT"] > 0
    np.testing.assert_allclose(np.asarray(pieces)[real], np.asarray(whole)[real], rtol=1e-3, atol=1e-4)


def loss_and_gradients(kind: str, mesh: jax.sharding.Mesh, *, num_microbatches: int = 1) -> tuple[float, dict]:
    config = model_of(kind)
    model, params, batch = decoder.abstract_model(config), shaken(config), packed(config, 8)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, model.abstract_params(mesh)))
        step = make_loss_and_grad(model, make_loss(TaskConfig(label_smoothing=0.1)), num_microbatches=num_microbatches)
        out, grads = jax.jit(step)(params, {}, put_batch(batch, mesh), jax.random.key(3))
        return float(out.loss_sum), jax.device_get(grads)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in ON_A_MESH else pytest.mark.slow)
                                  for kind in KINDS])  # fmt: skip
def test_a_mesh_and_microbatches_change_no_gradient(kind: str) -> None:
    loss, grads = loss_and_gradients(kind, single_device_mesh())
    expert = 2 if kind == "experts in turn" else 1
    mesh = make_mesh(MeshConfig(data=2 // expert, fsdp=2, expert=expert, tensor=2))
    num_microbatches = 1 if expert == 2 else 2  # balance is that of a microbatch
    sharded_loss, sharded = loss_and_gradients(kind, mesh, num_microbatches=num_microbatches)
    assert sharded_loss == pytest.approx(loss, rel=1e-5)

    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads))

    def check(path: tuple, ours: np.ndarray, theirs: np.ndarray) -> None:
        # a key's bias shifts all scores of a query alike: its gradient is zero but for rounding of the others'
        scale = max(float(np.abs(theirs).max()), 1e-3, 1e-2 * largest if "k_bias" in str(path) else 0.0)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, sharded, grads)


def test_prefixes_see_all_of_themselves_and_nothing_else_does() -> None:
    config = model_of("prefix")
    model, params, batch = decoder.abstract_model(config), shaken(config), packed(config, 1)

    @jax.jit
    def hidden(batch: dict) -> jax.Array:
        return decoder.forward_batch(model, params, batch).hidden_BTD

    before = np.asarray(hidden(batch))
    for place, reached in ((3, range(9)), (6, range(6, 9))):  # the last token of the first prefix; one behind it
        tokens = batch["tokens_BT"].copy()
        tokens[0, place] = (tokens[0, place] + 1) % 64
        changed = np.flatnonzero(np.any(before != np.asarray(hidden(batch | {"tokens_BT": tokens})), axis=(0, 2)))
        assert changed.tolist() == list(reached)


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_buckets_are_those_of_transformers(mask: str) -> None:
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-300, 300)
    theirs = T5Attention._relative_position_bucket(torch.tensor(distances), bidirectional=mask == "bidirectional",
                                                   num_buckets=32, max_distance=128)
    ours = bucket(jnp.asarray(distances), num_buckets=32, max_distance=128, mask=mask)
    assert np.array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("axis", ["stage", "context"])
def test_what_wants_whole_rows_is_refused_elsewhere(axis: str) -> None:
    mesh = MeshConfig(**{"data": 4, axis: 2})
    config = resolve({"model": TINY | KINDS["relative"], "data": {"seq_len": S, "batch_size": 8}})
    with pytest.raises(ConfigError, match=rf"mesh\.{axis}=2: with model\.encoder_layers=3 1 fits"):
        check_fits(config, make_mesh(mesh))
