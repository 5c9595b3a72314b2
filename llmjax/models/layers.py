"""The layers beside attention and norms: embedding and MLP.

Letters: B batch, T time, D model width, F MLP width, V vocabulary, P positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core import collectives
from llmjax.core.model_sections import ModelConfig
from llmjax.models.boundaries import made
from llmjax.models.dense import Matmul, dense
from llmjax.models.norm import recomputed
from llmjax.models.param import output_init, param, weight

SWIGLU_LIMIT, SWIGLU_SLOPE = 7.0, 1.702  # of the clamped form (OpenAI 2025)


def _swiglu_clamped(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    gate_BTF = jnp.minimum(gate_BTF, SWIGLU_LIMIT)
    up_BTF = jnp.clip(up_BTF, -SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate_BTF * jax.nn.sigmoid(SWIGLU_SLOPE * gate_BTF) * (up_BTF + 1.0)


# Of a gate and what it gates (Shazeer 2020).
GATED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "swiglu": lambda gate, up: jax.nn.silu(gate) * up,
    "swiglu_clamped": _swiglu_clamped,
    "geglu": lambda gate, up: jax.nn.gelu(gate, approximate=False) * up,
    "geglu_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
}
# Of one projection (relu2: So et al. 2021; gelu: Hendrycks and Gimpel 2016, exactly or by its tanh approximation).
PLAIN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda up: jax.nn.gelu(up, approximate=False),
    "gelu_tanh": lambda up: jax.nn.gelu(up, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda up: jnp.square(jax.nn.relu(up)),
    "silu": jax.nn.silu,
}


def activation_function(activation: str) -> Callable[..., jax.Array]:
    """Of a gate and what it gates, or of one projection."""
    return GATED.get(activation) or PLAIN[activation]


@functools.partial(recomputed, static_argnums=(2, 3))
def _activate_and_project(inputs_BTF: tuple[jax.Array, ...], down_FD: jax.Array, activation: str,
                          matmul: Matmul) -> jax.Array:
    """activation(inputs) W_down; of the inputs alone the derivative is told, what is between them is made again."""
    return dense(made(activation_function(activation)(*map(made, inputs_BTF))), down_FD, matmul=matmul)


class MLP(nnx.Module):
    """activation(x W_gate, x W_up) W_down, or activation(x W_up) W_down where nothing gates."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, mlp_dim: int):
        self.activation, self.dtype, self.matmul = config.activation, config.compute_dtype, config.matmul
        D, F, dtype = config.dim, mlp_dim, config.param_dtype
        init, zeros = nnx.initializers.normal(config.init_scale), nnx.initializers.zeros
        self.inputs = ("gate", "up") if config.activation in GATED else ("up",)
        for name in self.inputs:
            setattr(self, name, param(rngs, (D, F), axes=("embed", "mlp"), init=init, dtype=dtype))
        self.down = param(rngs, (F, D), axes=("mlp", "embed"), init=output_init(config), dtype=dtype)
        self.has_bias = config.mlp_bias == "all"
        if self.has_bias:
            for name in self.inputs:
                setattr(self, f"{name}_bias", param(rngs, (F,), axes=("mlp",), init=zeros, dtype=dtype))
            self.down_bias = param(rngs, (D,), axes=("norm",), init=zeros, dtype=dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.whole(collectives.leave_tensor(self.part(collectives.enter_tensor(x_BTD))))

    def part(self, x_BTD: jax.Array) -> jax.Array:
        """What this shard's columns add to the result, within a tensor-parallel region."""
        inputs_BTF = tuple(self._input(x_BTD, name) for name in self.inputs)
        return _activate_and_project(inputs_BTF, weight(self.down, self.dtype), self.activation, self.matmul)

    def whole(self, out_BTD: jax.Array) -> jax.Array:
        """The result, given the sum of all parts."""
        return out_BTD + weight(self.down_bias, self.dtype)[None, None] if self.has_bias else out_BTD

    def _input(self, x_BTD: jax.Array, name: str) -> jax.Array:
        y_BTF = dense(x_BTD, weight(getattr(self, name), self.dtype), matmul=self.matmul)
        return y_BTF + weight(getattr(self, f"{name}_bias"), self.dtype)[None, None] if self.has_bias else y_BTF


SinusoidOrder = Literal["alternating", "halves"]


class Embedder(nnx.Module):
    """The token table, split over the vocabulary on tensor-parallel meshes, plus positions and types of tokens."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dtype, self.scale, self.positions = config.compute_dtype, config.embedding_scale, config.positions
        init = nnx.initializers.normal(config.init_scale)
        self.table = param(rngs, (config.vocab_size, config.dim), axes=("vocab", "embed"), init=init,
                           dtype=config.param_dtype)
        if config.positions == "learned":
            self.position_table = param(rngs, (config.max_seq_len, config.dim), axes=("positions", "embed"), init=init,
                                        dtype=config.param_dtype)
        self.has_types = config.token_types > 0
        if self.has_types:
            self.type_table = param(rngs, (config.token_types, config.dim), axes=("positions", "embed"), init=init,
                                    dtype=config.param_dtype)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, types_BT: jax.Array | None = None) -> jax.Array:
        """Tokens without types are of type 0, where there are types."""
        x_BTD = self._tokens(tokens_BT)
        if self.scale != 1.0:
            x_BTD = x_BTD * self.scale
        if self.has_types:
            types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
            x_BTD = x_BTD + weight(self.type_table, self.dtype)[types_BT]
        if self.positions == "learned":
            return x_BTD + weight(self.position_table, self.dtype)[positions_BT]
        if self.positions in ("sinusoidal", "sinusoidal_halves"):
            order: SinusoidOrder = "alternating" if self.positions == "sinusoidal" else "halves"
            return x_BTD + sinusoids(positions_BT, dim=x_BTD.shape[-1], order=order).astype(x_BTD.dtype)
        return x_BTD

    def _tokens(self, tokens_BT: jax.Array) -> jax.Array:
        table_VD = weight(self.table, self.dtype)
        if collectives.manual_size("tensor") == 1:
            return table_VD[tokens_BT]
        tokens_BT = collectives.enter_tensor(tokens_BT)
        local_BT = tokens_BT - collectives.shard_index("tensor") * table_VD.shape[0]
        held_BT = (local_BT >= 0) & (local_BT < table_VD.shape[0])
        rows_BTD = table_VD[jnp.where(held_BT, local_BT, 0)] * held_BT[..., None].astype(table_VD.dtype)
        return collectives.leave_tensor(rows_BTD)  # every token is held by one shard


def sinusoids(positions_BT: jax.Array, *, dim: int, order: SinusoidOrder = "alternating") -> jax.Array:
    """Sines and cosines of each position (Vaswani et al. 2017, section 3.5), (B, T, dim) float32.

    The paper lets them alternate; its code has all sines before all cosines.
    """
    rates_P = 10_000.0 ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angles_BTP = positions_BT[:, :, None].astype(jnp.float32) * rates_P[None, None]
    pairs = [jnp.sin(angles_BTP), jnp.cos(angles_BTP)]
    if order == "halves":
        return jnp.concatenate(pairs, axis=-1)
    return jnp.stack(pairs, axis=-1).reshape(*positions_BT.shape, dim)
