"""A tiny random model and a tokenizer of bytes, for tests that need no training."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core.sections import ModelConfig
from llmjax.models import decoder

CONFIG = ModelConfig(vocab_size=260, num_layers=2, dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
                     max_seq_len=64, compute_dtype="float32", init_scale=0.2)


class ByteTokenizer:
    """One token a byte, after the four special ones."""

    vocab_size, pad_id, bos_id, eos_id = 260, 0, 1, 2

    def encode(self, text: str) -> list[int]:
        return [4 + byte for byte in text.encode()]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(i - 4 for i in ids if i >= 4).decode(errors="replace")


def tiny_model(config: ModelConfig = CONFIG) -> tuple[decoder.Model, dict]:
    """The declaration and random parameters, without the seconds that compiling an initialisation takes."""
    rng = np.random.default_rng(0)
    model = decoder.abstract_model(config)
    return model, jax.tree.map(lambda leaf: jnp.asarray(config.init_scale * rng.normal(size=leaf.shape)), model.shapes)


PADDED = 128


@functools.partial(jax.jit, static_argnums=0)
def _all_logprobs(config: ModelConfig, params: dict, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    model = decoder.abstract_model(config)
    out = decoder.forward(model, params, tokens_BT, positions_BT=jnp.arange(PADDED)[None],
                          segment_ids_BT=segment_ids_BT)
    return jax.nn.log_softmax(decoder.logits(model, params, out.hidden_BTD)[0])


def brute_force(model: decoder.Model, params: dict, ids: np.ndarray) -> np.ndarray:
    """Log-probabilities (len(ids), V) of the token after each one, from a forward pass over `ids` alone."""
    tokens_BT, segment_ids_BT = np.zeros((2, 1, PADDED), np.int32)  # padded behind, so that it compiles once
    tokens_BT[0, :len(ids)], segment_ids_BT[0, :len(ids)] = ids, 1
    return np.asarray(_all_logprobs(model.config, params, tokens_BT, segment_ids_BT))[:len(ids)]
