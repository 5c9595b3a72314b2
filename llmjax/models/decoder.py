"""The decoder: embedding, a scanned stack of blocks, a norm, a head; declared once, applied as functions.

Letters: B batch, T time, S slots, D model width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from llmjax.core import axes as axes_lib
from llmjax.core import collectives
from llmjax.core.model_sections import ModelConfig, Span
from llmjax.core.task import Params
from llmjax.models import parametrisation, pipeline
from llmjax.models.auxiliary import moved
from llmjax.models.block import Aux, Block, Layer, LayerOutput
from llmjax.models.cache import Cache
from llmjax.models.groups import LayerGroup, layer_groups
from llmjax.models.inputs import BlockInputs, block_inputs
from llmjax.models.layers import Embedder, Head
from llmjax.models.multi_token import AheadOutput, Depth, run_depths
from llmjax.models.noise import Noise, dropout
from llmjax.models.norm import Norm
from llmjax.models.param import logical_axes, stack, weight
from llmjax.models.stack import ApplyBlock, Execution, run_here, run_layers

EMBEDDING_SITE = 0  # of the randomness outside of the layers


@dataclasses.dataclass(frozen=True)
class Output:
    """What a forward pass gives."""

    hidden_BTD: jax.Array  # final, ready for the head, in compute precision
    cache: Cache | None  # with the new tokens in it, where one was given
    aux: Aux  # what the layers report, stacked over those that do, summed over this device's tokens


class Decoder(nnx.Module):
    """A decoder-only Transformer (Vaswani et al. 2017), its parts picked by the config."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config = parametrisation.standard(config)
        self.embedder = Embedder(config, rngs)
        if config.norm.embedding == "norm":
            self.embedding_norm = Norm(config, rngs)
        for group in layer_groups(config):
            setattr(self, group.name, stack(functools.partial(Block, config, mlp=group.mlp), rngs, group.num_layers))
        self.final_norm = Norm(config, rngs)
        if config.embeddings == "untied":
            self.head = Head(config, rngs)
        if config.multi_token:
            mlp = layer_groups(config)[-1].mlp
            self.multi_token = stack(functools.partial(Depth, config, mlp=mlp), rngs, config.multi_token)

    def __call__(self, tokens_BT: jax.Array, *, positions_BT: jax.Array, segment_ids_BT: jax.Array,
                 cache: Cache | None, noise: Noise | None, execution: Execution) -> Output:
        inputs = block_inputs(self.config, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, cache=cache,
                              noise=noise, context_method=execution.context_method, watch=execution.watch)
        x_BTD = self.embed(tokens_BT, positions_BT, noise)
        caches: dict[str, Any] = {}
        aux: Aux = {}
        for group in layer_groups(self.config):
            x_BTD, left = run_layers(self.functions_of(group), x_BTD, self.layers_of(group, cache), inputs,
                                     execution=execution)
            caches[group.name] = left.cache
            aux |= {name: _behind(aux.get(name), sums) for name, sums in left.aux.items()}
        if cache:
            cache = Cache(caches, inputs.kv_segment_ids_BS, cache.length + positions_BT.shape[1])
        return Output(self.finish(x_BTD), cache, aux)

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array, noise: Noise | None) -> jax.Array:
        """What the first layer reads."""
        x_BTD = self.embedder(tokens_BT, positions_BT)
        if self.config.norm.embedding == "norm":
            x_BTD = self.embedding_norm(x_BTD)
        if noise is None:
            return x_BTD
        return dropout(x_BTD, noise.at(layer=self.config.num_layers, site=EMBEDDING_SITE), rate=self.config.dropout)

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """From what the last layer leaves to what the head reads."""
        x_BTD = self.final_norm(x_BTD)
        return x_BTD if self.config.logit_scale == 1.0 else x_BTD * self.config.logit_scale

    def functions_of(self, group: LayerGroup) -> list[ApplyBlock]:
        """The functions of a group's layers, by their place in its period."""
        blockdef, _ = nnx.split(getattr(self, group.name))

        def apply_block(x_BTD: jax.Array, layer: Layer, inputs: BlockInputs, *,
                        span: Span) -> tuple[jax.Array, LayerOutput]:
            return nnx.merge(blockdef, layer.params)(x_BTD, inputs, layer, span=span)

        return [functools.partial(apply_block, span=span) for span in group.spans]

    def layers_of(self, group: LayerGroup, cache: Cache | None) -> Layer:
        """The layers of a group, stacked."""
        _, stacked = nnx.split(getattr(self, group.name))
        numbers_L = group.first_layer + jnp.arange(group.num_layers)
        return Layer(stacked, cache.layers[group.name] if cache else None, numbers_L)

    def look_ahead(self, hidden_BTD: jax.Array, batch: Mapping[str, jax.Array], *, noise: Noise | None,
                   execution: Execution) -> AheadOutput:
        """The further heads, on the hidden states of a forward pass over the batch."""
        inputs = block_inputs(self.config, positions_BT=batch["positions_BT"], segment_ids_BT=batch["segment_ids_BT"],
                              cache=None, noise=noise, context_method=execution.context_method)
        return run_depths(self.multi_token, hidden_BTD, batch, inputs=inputs, num_depths=self.config.multi_token,
                          embed=lambda tokens_BT: self.embed(tokens_BT, batch["positions_BT"], noise),
                          first_layer=self.config.num_layers + 1, execution=execution)

    def head_kernel(self) -> jax.Array:
        """The output projection, (D, V), in compute precision."""
        if self.config.embeddings == "untied":
            return weight(self.head.kernel, self.config.compute_dtype)
        return weight(self.embedder.table, self.config.compute_dtype).T


def _behind(first: Any, second: Any) -> Any:
    """What one group of layers reports and then the next, stacked."""
    return second if first is None else jax.tree.map(lambda *parts: jnp.concatenate(parts), first, second)


@dataclasses.dataclass(frozen=True)
class Model:
    """A declared model: no arrays, only its structure. Parameters are plain nested dicts beside it."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    axes: dict[str, Any]  # logical axes of every parameter
    shapes: dict[str, Any]  # jax.ShapeDtypeStruct of every parameter

    @property
    def noisy(self) -> bool:
        """Whether training draws from randomness inside the model."""
        return bool(self.config.dropout or self.config.moe.num_experts and self.config.moe.jitter)

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

    def moved(self, params: Params, loads: Params) -> Params:
        """Parameters whose untrained state has been moved by the loads of a step."""
        return moved(self.config, params, loads) if loads else params


def abstract_model(config: ModelConfig) -> Model:
    """Declare the model without allocating anything."""
    module = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    return Model(config, graphdef, axes=logical_axes(module), shapes=nnx.to_pure_dict(state))


def init_params(config: ModelConfig, key: jax.Array, mesh: Mesh | None) -> Params:
    """Fresh parameters, sharded as declared; the random bits behind them do not depend on the mesh."""
    model = abstract_model(config)

    def init(key: jax.Array) -> Params:
        params = nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=key)), nnx.Param))
        return parametrisation.scaled(config, params, model.axes)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params(mesh))
    return jax.jit(init, out_shardings=shardings)(key)


def forward(model: Model, params: Params, tokens_BT: jax.Array, *, positions_BT: jax.Array, segment_ids_BT: jax.Array,
            cache: Cache | None = None, noise: Noise | None = None, execution: Execution = Execution()) -> Output:
    """Run the tokens; `noise` is what training's dropout and router jitter draw from, None elsewhere."""
    decoder = nnx.merge(model.graphdef, params)
    return decoder(tokens_BT, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, cache=cache, noise=noise,
                   execution=execution)


def embed(model: Model, params: Params, tokens_BT: jax.Array, *, positions_BT: jax.Array,
          noise: Noise | None) -> jax.Array:
    """What the first layer reads, (B, T, D)."""
    return nnx.merge(model.graphdef, params).embed(tokens_BT, positions_BT, noise)


def run_stage(model: Model, params: Params, x_BTD: jax.Array, *, positions_BT: jax.Array, segment_ids_BT: jax.Array,
              noise: Noise | None, execution: Execution) -> tuple[jax.Array, Aux]:
    """Rows through the layers of this stage of a pipeline, of a decoder whose layers are all of one kind."""
    decoder = nnx.merge(model.graphdef, params)
    (group,) = layer_groups(model.config)
    inputs = block_inputs(model.config, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, cache=None,
                          noise=noise, context_method=execution.context_method)
    layers = pipeline.own_layers(decoder.layers_of(group, None))
    x_BTD, left = run_here(decoder.functions_of(group), x_BTD, layers, inputs, execution=execution)
    return x_BTD, left.aux


def finish(model: Model, params: Params, x_BTD: jax.Array) -> jax.Array:
    """From what the last layer leaves to what the head reads."""
    return nnx.merge(model.graphdef, params).finish(x_BTD)


def look_ahead(model: Model, params: Params, hidden_BTD: jax.Array, batch: Mapping[str, jax.Array], *,
               noise: Noise | None = None, execution: Execution = Execution()) -> AheadOutput:
    """What the heads of multi-token prediction make of a forward pass over `batch`."""
    return nnx.merge(model.graphdef, params).look_ahead(hidden_BTD, batch, noise=noise, execution=execution)


def head_kernel(model: Model, params: Params) -> jax.Array:
    """The output projection (D, V) in compute precision; tensor-parallel meshes hold a share of V."""
    return nnx.merge(model.graphdef, params).head_kernel()


def logits(model: Model, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Logits (B, T, V) in float32."""
    kernel_DV = head_kernel(model, params)
    logits_BTV = jnp.einsum("BTD,DV->BTV", collectives.enter_tensor(hidden_BTD), kernel_DV,
                            preferred_element_type=jnp.float32)
    softcap = model.config.logit_softcap
    return softcap * jnp.tanh(logits_BTV / softcap) if softcap else logits_BTV
