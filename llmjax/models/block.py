"""One layer: attention and an MLP, each added to the residual stream, and between them a look at a source.

Letters: B batch, T time, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmjax.core.model_sections import ModelConfig, Span
from llmjax.models.attention import Attention, CrossAttention
from llmjax.models.cache import KVCache, SourcedCache
from llmjax.models.inputs import BlockInputs
from llmjax.models.latent_attention import LatentAttention
from llmjax.models.layers import MLP
from llmjax.models.moe import MoE
from llmjax.models.noise import Noise, dropout
from llmjax.models.norm import Norm

# Statistics and losses of one layer by the name of the part that has them, summed over this device's tokens.
Aux = dict[str, Any]

ATTENTION_SITE, MLP_SITE, ROUTER_SITE, CROSS_SITE = range(4)  # of a layer's randomness


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's share of a stack."""

    params: Any
    cache: Any  # None outside of generation
    index: jax.Array  # () its number in the whole decoder


@dataclasses.dataclass(frozen=True)
class LayerOutput:
    """What a layer leaves beside the residual stream."""

    cache: Any
    aux: Aux


jax.tree_util.register_dataclass(Layer, data_fields=["params", "cache", "index"], meta_fields=[])
jax.tree_util.register_dataclass(LayerOutput, data_fields=["cache", "aux"], meta_fields=[])


class Block(nnx.Module):
    """x + attention(x), then x + mlp(x), normed before (Xiong et al. 2020), after, or both; or the two side by side.

    With placement "sum" the norm is of the sum (Vaswani et al. 2017, section 3.1). A decoder beside an encoder attends
    to the source between the two.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, mlp: Literal["dense", "moe"]):
        self.residual, self.scale = config.residual, config.residual_scale
        self.dropout, self.placement = config.dropout, config.norm.placement
        self.attn = make_attention(config, rngs)
        self.reads_source = config.encoder_layers > 0
        if self.reads_source:
            self.cross = CrossAttention(config, rngs)
        self.mlp = make_mlp(config, rngs, kind=mlp)
        for name in ("attn", "cross", "mlp") if self.reads_source else ("attn", "mlp"):
            if self.placement in ("pre", "both"):
                setattr(self, f"{name}_norm", Norm(config, rngs))
            if self.placement in ("post", "both", "sum"):
                setattr(self, f"{name}_post_norm", Norm(config, rngs))

    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, layer: Layer, *,
                 span: Span) -> tuple[jax.Array, LayerOutput]:
        own, source = layer.cache, None
        if isinstance(layer.cache, SourcedCache):
            own, source = layer.cache.own, layer.cache.source
        normed_BTD = self._before("attn", x_BTD)
        watched: Aux = {"attention": self.attn.watch(normed_BTD, inputs, span=span)} if inputs.watch else {}
        attended_BTD, own = self.attn(normed_BTD, inputs, own, span=span)
        attended_BTD = self._after("attn", attended_BTD, inputs.noise, layer=layer.index, site=ATTENTION_SITE)
        if self.residual == "sequential":
            x_BTD = self._sum("attn", x_BTD, attended_BTD)
        if self.reads_source:
            found_BTD = self.cross.attend(self._before("cross", x_BTD), inputs, source)
            found_BTD = self._after("cross", found_BTD, inputs.noise, layer=layer.index, site=CROSS_SITE)
            x_BTD = self._sum("cross", x_BTD, found_BTD)
        out_BTD, aux = self._mlp(self._before("mlp", x_BTD), inputs, layer.index)
        out_BTD = self._after("mlp", out_BTD, inputs.noise, layer=layer.index, site=MLP_SITE)
        if self.residual == "parallel":
            x_BTD = x_BTD + attended_BTD
        cache = SourcedCache(own, source) if source else own
        return self._sum("mlp", x_BTD, out_BTD), LayerOutput(cache, aux | watched)

    def source_cache(self, source_BSD: jax.Array) -> KVCache:
        """The keys and values that cross-attention makes of a source."""
        return self.cross.source_cache(source_BSD)

    def _mlp(self, x_BTD: jax.Array, inputs: BlockInputs, index: jax.Array) -> tuple[jax.Array, Aux]:
        if isinstance(self.mlp, MLP):
            return self.mlp(x_BTD), {}
        noise = inputs.noise.at(layer=index, site=ROUTER_SITE) if inputs.noise else None
        out_BTD, sums = self.mlp(x_BTD, real_BT=inputs.real_BT, noise=noise)
        return out_BTD, {"router": sums}

    def _before(self, sublayer: str, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if self.placement in ("post", "sum") else getattr(self, f"{sublayer}_norm")(x_BTD)

    def _after(self, sublayer: str, x_BTD: jax.Array, noise: Noise | None, *, layer: jax.Array,
               site: int) -> jax.Array:
        """What a sublayer adds to the residual stream; train.remat_names knows it as attn_out or mlp_out."""
        x_BTD = checkpoint_name(x_BTD, f"{sublayer}_out")
        if self.placement in ("post", "both"):
            x_BTD = getattr(self, f"{sublayer}_post_norm")(x_BTD)
        if self.scale != 1.0:
            x_BTD = x_BTD * self.scale
        return dropout(x_BTD, noise.at(layer=layer, site=site), rate=self.dropout) if noise else x_BTD

    def _sum(self, sublayer: str, x_BTD: jax.Array, added_BTD: jax.Array) -> jax.Array:
        """The residual stream with what a sublayer adds."""
        x_BTD = x_BTD + added_BTD
        return getattr(self, f"{sublayer}_post_norm")(x_BTD) if self.placement == "sum" else x_BTD


def make_attention(config: ModelConfig, rngs: nnx.Rngs) -> Attention | LatentAttention:
    """The attention that a config asks for."""
    return LatentAttention(config, rngs) if config.latent.kv_lora_rank else Attention(config, rngs)


def make_mlp(config: ModelConfig, rngs: nnx.Rngs, *, kind: Literal["dense", "moe"]) -> MLP | MoE:
    """The MLP, or the mixture of them, of a layer of this kind."""
    return MoE(config, rngs) if kind == "moe" else MLP(config, rngs, mlp_dim=config.mlp_dim)
