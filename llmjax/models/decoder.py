"""The model: embedding, a scanned stack of blocks, a norm, a head, and an encoder where there is one.

Declared once, applied as functions.

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
from llmjax.core.collectives import ShardedWeight
from llmjax.core.model_sections import ModelConfig
from llmjax.core.task import Params
from llmjax.models import parametrisation, pipeline
from llmjax.models.auxiliary import moved
from llmjax.models.block import Aux
from llmjax.models.cache import Cache, init_cache, with_source
from llmjax.models.groups import encoder_config, layer_groups
from llmjax.models.heads import Head, HeadBias, HeadTransform
from llmjax.models.inputs import BlockInputs, Source, block_inputs
from llmjax.models.layer_stack import LayerStack
from llmjax.models.layers import Embedder
from llmjax.models.multi_token import AheadOutput, Depth, run_depths
from llmjax.models.noise import Noise, dropout
from llmjax.models.norm import Norm
from llmjax.models.param import logical_axes, sharded, stack, weight
from llmjax.models.stack import Execution, run_here

EMBEDDING_SITE = 0  # of the randomness outside of the layers
ENCODER_STREAM = 1  # of randomness


@dataclasses.dataclass(frozen=True)
class Output:
    """What a forward pass gives."""

    hidden_BTD: jax.Array  # final, ready for the head, in compute precision
    cache: Cache | None  # with the new tokens in it, where one was given
    aux: Aux  # what the layers report, stacked over those that do, summed over this device's tokens
    source_aux: Aux = dataclasses.field(default_factory=dict)  # the same of an encoder's layers


class Decoder(LayerStack):
    """A Transformer (Vaswani et al. 2017), its parts picked by the config: a decoder alone or on an encoder.

    With a bidirectional mask it is an encoder itself, whose head predicts tokens in place.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        config = parametrisation.standard(config)
        self.embedder = Embedder(config, rngs)
        if config.norm.embedding == "norm":
            self.embedding_norm = Norm(config, rngs)
        super().__init__(config, rngs)
        if config.embeddings == "untied":
            self.head = Head(config, rngs)
        if config.head_transform == "dense":
            self.head_transform = HeadTransform(config, rngs)
        if config.head_bias == "learned":
            self.head_bias = HeadBias(config, rngs)
        if config.multi_token:
            mlp = layer_groups(config)[-1].mlp
            self.multi_token = stack(functools.partial(Depth, config, mlp=mlp), rngs, config.multi_token)
        if config.encoder_layers:
            self.encoder = LayerStack(encoder_config(config), rngs)

    def __call__(self, tokens_BT: jax.Array, *, inputs: BlockInputs, positions_BT: jax.Array,
                 types_BT: jax.Array | None, cache: Cache | None, execution: Execution) -> Output:
        out = self.run(self.embed(tokens_BT, positions_BT, inputs.noise, types_BT), inputs, cache, execution=execution)
        if cache:
            cache = dataclasses.replace(cache, layers=out.caches, segment_ids_BS=inputs.kv_segment_ids_BS,
                                        length=cache.length + positions_BT.shape[1])
        return Output(self.finish(out.x_BTD), cache, out.aux)

    def encode(self, tokens_BS: jax.Array, *, positions_BS: jax.Array, segment_ids_BS: jax.Array, noise: Noise | None,
               execution: Execution) -> tuple[Source, Aux]:
        """What the encoder makes of sources, with the embeddings of the decoder, and what its layers report."""
        noise = noise and dataclasses.replace(noise, key=jax.random.fold_in(noise.key, ENCODER_STREAM))
        inputs = block_inputs(self.encoder.config, positions_BT=positions_BS, segment_ids_BT=segment_ids_BS, cache=None,
                              noise=noise, context_method=execution.context_method, watch=execution.watch)
        out = self.encoder.run(self.embed(tokens_BS, positions_BS, noise), inputs, None, execution=execution)
        return Source(self.encoder.finish(out.x_BTD), inputs.kv_segment_ids_BS), out.aux

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array, noise: Noise | None,
              types_BT: jax.Array | None = None) -> jax.Array:
        """What the first layer reads."""
        x_BTD = self.embedder(tokens_BT, positions_BT, types_BT)
        if self.config.norm.embedding == "norm":
            x_BTD = self.embedding_norm(x_BTD)
        if noise is None:
            return x_BTD
        return dropout(x_BTD, noise.at(layer=self.config.num_layers, site=EMBEDDING_SITE), rate=self.config.dropout)

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """From what the last layer leaves to what the head reads."""
        x_BTD = super().finish(x_BTD)
        if self.config.head_transform == "dense":
            x_BTD = self.head_transform(x_BTD)
        return x_BTD if self.config.logit_scale == 1.0 else x_BTD * self.config.logit_scale

    def look_ahead(self, hidden_BTD: jax.Array, batch: Mapping[str, jax.Array], *, noise: Noise | None,
                   execution: Execution) -> AheadOutput:
        """The further heads, on the hidden states of a forward pass over the batch."""
        inputs = block_inputs(self.config, positions_BT=batch["positions_BT"], segment_ids_BT=batch["segment_ids_BT"],
                              cache=None, noise=noise, context_method=execution.context_method)
        return run_depths(self.multi_token, hidden_BTD, batch, inputs=inputs, num_depths=self.config.multi_token,
                          embed=lambda tokens_BT: self.embed(tokens_BT, batch["positions_BT"], noise),
                          first_layer=self.config.num_layers + 1, execution=execution)

    def head_kernel(self) -> ShardedWeight:
        """The output projection, (D, V), to be gathered in compute precision."""
        if self.config.embeddings == "untied":
            return sharded(self.head.kernel, self.config.compute_dtype)
        return sharded(self.embedder.table, self.config.compute_dtype).transpose()

    def head_bias_V(self) -> jax.Array | None:
        """What is added to the logits, in compute precision."""
        return weight(self.head_bias.bias, self.config.compute_dtype) if self.config.head_bias == "learned" else None


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


@functools.cache
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
            cache: Cache | None = None, noise: Noise | None = None, execution: Execution = Execution(),
            source: Source | None = None, prefix_BT: jax.Array | None = None,
            types_BT: jax.Array | None = None) -> Output:
    """Run the tokens; `noise` is what training's dropout and router jitter draw from, None elsewhere.

    A decoder beside an encoder is given the `source`, or a `cache` that has seen it; a mask of prefixes the tokens that
    are of one (none by default); a model with types of tokens theirs (by default 0).
    """
    decoder = nnx.merge(model.graphdef, params)
    inputs = block_inputs(decoder.config, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, cache=cache,
                          noise=noise, context_method=execution.context_method, prefix_BT=prefix_BT, source=source,
                          watch=execution.watch)
    return decoder(tokens_BT, inputs=inputs, positions_BT=positions_BT, types_BT=types_BT, cache=cache,
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


def encode(model: Model, params: Params, tokens_BS: jax.Array, *, positions_BS: jax.Array, segment_ids_BS: jax.Array,
           noise: Noise | None = None, execution: Execution = Execution()) -> tuple[Source, Aux]:
    """Run the encoder over sources; also what its layers report."""
    decoder = nnx.merge(model.graphdef, params)
    return decoder.encode(tokens_BS, positions_BS=positions_BS, segment_ids_BS=segment_ids_BS, noise=noise,
                          execution=execution)


def forward_batch(model: Model, params: Params, batch: Mapping[str, jax.Array], *, key: jax.Array | None = None,
                  execution: Execution = Execution()) -> Output:
    """Run a batch: the encoder over its sources (B, S), where it has any, then the decoder over its tokens (B, T).

    With a `key`, the randomness of training.
    """
    def noise(letters: str) -> Noise | None:
        return Noise(key, batch[f"token_ids_{letters}"]) if key is not None and model.noisy else None

    source, source_aux = None, Aux()
    if "tokens_BS" in batch:
        source, source_aux = encode(model, params, batch["tokens_BS"], positions_BS=batch["positions_BS"],
                                    segment_ids_BS=batch["segment_ids_BS"], noise=noise("BS"), execution=execution)
    out = forward(model, params, batch["tokens_BT"], positions_BT=batch["positions_BT"],
                  segment_ids_BT=batch["segment_ids_BT"], noise=noise("BT"), execution=execution, source=source,
                  prefix_BT=batch.get("prefix_BT"), types_BT=batch.get("types_BT"))
    return dataclasses.replace(out, source_aux=source_aux)


def start_cache(model: Model, params: Params, source: Source, *, max_len: int) -> Cache:
    """A cache of `max_len` slots, none of them filled, for targets of a source."""
    cache = init_cache(model.config, batch_size=source.segment_ids_BS.shape[0], max_len=max_len)
    sources = nnx.merge(model.graphdef, params).source_caches(source.hidden_BSD)
    return with_source(cache, sources, source.segment_ids_BS)


def look_ahead(model: Model, params: Params, hidden_BTD: jax.Array, batch: Mapping[str, jax.Array], *,
               noise: Noise | None = None, execution: Execution = Execution()) -> AheadOutput:
    """What the heads of multi-token prediction make of a forward pass over `batch`."""
    return nnx.merge(model.graphdef, params).look_ahead(hidden_BTD, batch, noise=noise, execution=execution)


def head_kernel(model: Model, params: Params) -> ShardedWeight:
    """The output projection (D, V), to be gathered in compute precision; tensor-parallel meshes hold a share of V."""
    return nnx.merge(model.graphdef, params).head_kernel()


def head_bias(model: Model, params: Params) -> jax.Array | None:
    """What is added to the logits, (V,) in compute precision, or None; tensor-parallel meshes hold a share of it."""
    return nnx.merge(model.graphdef, params).head_bias_V()


def logits(model: Model, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Logits (B, T, V) in float32."""
    kernel_DV, bias_V = head_kernel(model, params).gathered(), head_bias(model, params)
    logits_BTV = jnp.einsum("BTD,DV->BTV", collectives.enter_tensor(hidden_BTD), kernel_DV,
                            preferred_element_type=jnp.float32)
    if bias_V is not None:
        logits_BTV += bias_V[None, None]
    softcap = model.config.logit_softcap
    return softcap * jnp.tanh(logits_BTV / softcap) if softcap else logits_BTV
