"""A tiny random model and a tokenizer of bytes, for tests that need no training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from llmjax.core.sections import ModelConfig, ServeConfig
from llmjax.data.tokenizer import DEFAULT_CHAT_TEMPLATE
from llmjax.models import decoder
from llmjax.serve.engine import Engine

# Weights large enough that the most probable token changes from place to place.
CONFIG = ModelConfig(vocab_size=300, num_layers=2, dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
                     max_seq_len=256, compute_dtype="float32", init_scale=0.3)


class ByteTokenizer:
    """One token a byte, after the four special ones; the model's table is larger than this one's."""

    vocab_size, pad_id, bos_id, eos_id = 260, 0, 1, 2
    bos_token, eos_token, pad_token = "<s>", "</s>", "<pad>"
    chat_template = DEFAULT_CHAT_TEMPLATE
    token_bytes = [b""] * 4 + [bytes([byte]) for byte in range(256)]

    def encode(self, text: str, *, specials: str = "text") -> list[int]:
        return [4 + byte for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.token_bytes[i] for i in ids)


BYTES = ByteTokenizer()


def make_engine(config: ModelConfig = CONFIG, *, seed: int = 0, serve: ServeConfig = ServeConfig(),
                tokenizer: ByteTokenizer | None = BYTES) -> Engine:
    """An engine around random parameters."""
    params = decoder.init_params(config, jax.random.key(seed), None)
    return Engine(decoder.abstract_model(config), params, tokenizer=tokenizer, config=serve)


def logprobs_without_cache(engine: Engine, ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities (len(ids), V) of the token after each one, from one forward pass over all of them."""
    tokens_BT = np.asarray(ids, np.int32)[None]
    out = decoder.forward(engine.model, engine.params, tokens_BT, positions_BT=np.arange(tokens_BT.shape[1])[None],
                          segment_ids_BT=np.ones_like(tokens_BT))
    return np.asarray(jax.nn.log_softmax(decoder.logits(engine.model, engine.params, out.hidden_BTD)[0]))
