"""The decoder: embedding, a scanned stack of blocks, a norm, a head; declared once, applied as functions.

Letters: B batch, T time, S slots, D model width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from llmjax.core import axes as axes_lib
from llmjax.core import collectives
from llmjax.core.sections import ModelConfig
from llmjax.core.task import Params
from llmjax.models import rope
from llmjax.models.attention import Attention, AttentionInputs, LayerCache
from llmjax.models.cache import Cache
from llmjax.models.layers import MLP, Embedder, Head, RMSNorm
from llmjax.models.param import logical_axes, stack, weight
from llmjax.models.stack import Execution, run_layers


class Block(nnx.Module):
    """Attention and MLP, each on a normed copy of the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(config, rngs)
        self.attn = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x_BTD: jax.Array, shared: AttentionInputs,
                 cache: LayerCache | None) -> tuple[jax.Array, LayerCache | None]:
        attended_BTD, cache = self.attn(self.attn_norm(x_BTD), shared, cache)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache


class Decoder(nnx.Module):
    """A decoder-only Transformer (Vaswani et al. 2017; layout of Llama, Touvron et al. 2023)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedder = Embedder(config, rngs)
        self.blocks = stack(functools.partial(Block, config), rngs, config.num_layers)
        self.final_norm = RMSNorm(config, rngs)
        if config.embeddings == "untied":
            self.head = Head(config, rngs)

    def __call__(self, tokens_BT: jax.Array, *, positions_BT: jax.Array, segment_ids_BT: jax.Array,
                 cache: Cache | None, execution: Execution) -> tuple[jax.Array, Cache | None]:
        shared, cache = self._shared(positions_BT, segment_ids_BT, cache)
        blockdef, stacked = nnx.split(self.blocks)

        def apply_block(x_BTD: jax.Array, layer: tuple[Any, LayerCache | None],
                        shared: AttentionInputs) -> tuple[jax.Array, LayerCache | None]:
            params, layer_cache = layer
            return nnx.merge(blockdef, params)(x_BTD, shared, layer_cache)

        layer_caches = LayerCache(cache.k_LBSKH, cache.v_LBSKH) if cache else None
        x_BTD, layer_caches = run_layers(apply_block, self.embedder(tokens_BT), (stacked, layer_caches), shared,
                                         execution=execution)
        if cache and layer_caches:
            cache = dataclasses.replace(cache, k_LBSKH=layer_caches.k_BSKH, v_LBSKH=layer_caches.v_BSKH)
        return self.final_norm(x_BTD), cache

    def _shared(self, positions_BT: jax.Array, segment_ids_BT: jax.Array,
                cache: Cache | None) -> tuple[AttentionInputs, Cache | None]:
        """What all layers' attention needs, computed once; the cache with the new tokens' slots claimed."""
        config = self.config
        inverse = rope.frequencies(config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)
        cos, sin = rope.tables(positions_BT, inverse)
        if cache is None:
            return AttentionInputs(cos, sin, segment_ids_BT, segment_ids_BT, 0), None
        kv_segment_ids_BS = lax.dynamic_update_slice_in_dim(cache.segment_ids_BS, segment_ids_BT, cache.length, axis=1)
        shared = AttentionInputs(cos, sin, segment_ids_BT, kv_segment_ids_BS, cache.length)
        length = cache.length + positions_BT.shape[1]
        return shared, dataclasses.replace(cache, segment_ids_BS=kv_segment_ids_BS, length=length)

    def head_kernel(self) -> jax.Array:
        """The output projection, (D, V), in compute precision."""
        if self.config.embeddings == "untied":
            return weight(self.head.kernel, self.config.compute_dtype)
        return weight(self.embedder.table, self.config.compute_dtype).T


@dataclasses.dataclass(frozen=True)
class Model:
    """A declared model: no arrays, only its structure. Parameters are plain nested dicts beside it."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    axes: dict[str, Any]  # logical axes of every parameter
    shapes: dict[str, Any]  # jax.ShapeDtypeStruct of every parameter

    def specs(self, rules: axes_lib.Rules = axes_lib.PARAM_RULES) -> dict[str, Any]:
        """The partition spec of every parameter under a table of rules."""
        return jax.tree.map(lambda axes: axes_lib.spec(axes, rules), self.axes, is_leaf=lambda x: isinstance(x, tuple))

    def abstract_params(self, mesh: Mesh | None) -> dict[str, Any]:
        """Shapes, dtypes and shardings of the parameters: the target of every restore.

        Without a mesh they stand whole on the default device, where `forward` runs under a plain `jit`; on a mesh it
        runs inside a `shard_map` that is manual over every axis.
        """
        def struct(spec: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(mesh, spec) if mesh else SingleDeviceSharding(jax.local_devices()[0])
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(struct, self.specs(), self.shapes, is_leaf=lambda x: isinstance(x, PartitionSpec))


def abstract_model(config: ModelConfig) -> Model:
    """Declare the model without allocating anything."""
    module = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    return Model(config, graphdef, axes=logical_axes(module), shapes=nnx.to_pure_dict(state))


def init_params(config: ModelConfig, key: jax.Array, mesh: Mesh | None) -> Params:
    """Fresh parameters, sharded as declared; the random bits behind them do not depend on the mesh."""
    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=key)), nnx.Param))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_model(config).abstract_params(mesh))
    return jax.jit(init, out_shardings=shardings)(key)


def forward(model: Model, params: Params, tokens_BT: jax.Array, *, positions_BT: jax.Array, segment_ids_BT: jax.Array,
            cache: Cache | None = None, execution: Execution = Execution()) -> tuple[jax.Array, Cache | None]:
    """Final hidden states (B, T, D) in compute precision, and the cache with the new tokens in it."""
    decoder = nnx.merge(model.graphdef, params)
    return decoder(tokens_BT, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, cache=cache,
                   execution=execution)


def head_kernel(model: Model, params: Params) -> jax.Array:
    """The output projection (D, V) in compute precision; tensor-parallel meshes hold a share of V."""
    return nnx.merge(model.graphdef, params).head_kernel()


def logits(model: Model, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Logits (B, T, V) in float32."""
    kernel_DV = head_kernel(model, params)
    return jnp.einsum("BTD,DV->BTV", collectives.enter_tensor(hidden_BTD), kernel_DV,
                      preferred_element_type=jnp.float32)
