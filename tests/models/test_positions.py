"""Positions of every kind and dropout against transformers' and torch's own functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.xlm.modeling_xlm import create_sinusoidal_embeddings

from llmjax.core.model_sections import ModelConfig, RopeScaling
from llmjax.models.attention import alibi_slopes
from llmjax.models.layers import sinusoids
from llmjax.models.noise import Noise, dropout
from llmjax.models.rope import RopeTables, tables

HEAD_DIM, THETA, ORIGINAL = 16, 500.0, 32
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 8.0,
        "beta_slow": 1.5}  # fmt: skip
OURS = {"original_seq_len": ORIGINAL, "factor": 4.0}
# transformers' settings and ours.
STRETCHED: dict[str, tuple[dict[str, Any], RopeScaling]] = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, RopeScaling("linear", 3.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 3.0}, RopeScaling("dynamic_ntk", 3.0, original_seq_len=ORIGINAL)),
    "llama3": ({"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0,
                "original_max_position_embeddings": ORIGINAL},
               RopeScaling("llama3", low_freq_factor=1.5, high_freq_factor=3.0, **OURS)),
    "yarn": (YARN, RopeScaling("yarn", beta_fast=8.0, beta_slow=1.5, **OURS)),
    "yarn, its attention factor given": (YARN | {"attention_factor": 0.7}, RopeScaling(
        "yarn", beta_fast=8.0, beta_slow=1.5, attention_factor=0.7, **OURS)),
    "yarn, not truncated": (YARN | {"truncate": False}, RopeScaling(
        "yarn", beta_fast=8.0, beta_slow=1.5, truncate="no", **OURS)),
}  # fmt: skip


def our_tables(scaling: RopeScaling, seq_len: int, **fields: Any) -> RopeTables:
    config = ModelConfig(head_dim=HEAD_DIM, rope_theta=THETA, rope_scaling=scaling, **fields)
    found = tables(config, jnp.arange(seq_len)[None], span="global")
    assert found is not None
    return found


def assert_same(ours: RopeTables, inverse: torch.Tensor, factor: float) -> None:
    angles = np.arange(ours.cos_BT1R.shape[1])[:, None] * inverse.numpy()
    np.testing.assert_allclose(ours.cos_BT1R[0, :, 0], np.cos(angles) * factor, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.sin_BT1R[0, :, 0], np.sin(angles) * factor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seq_len", [20, 100])
@pytest.mark.parametrize("name", STRETCHED)
def test_stretched_frequencies(name: str, seq_len: int) -> None:
    theirs, ours = STRETCHED[name]
    config = transformers.LlamaConfig(hidden_size=4 * HEAD_DIM, num_attention_heads=4, max_position_embeddings=ORIGINAL,
                                      rope_parameters={"rope_theta": THETA, **theirs})
    inverse, factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, "cpu", seq_len=seq_len)
    assert_same(our_tables(ours, seq_len), inverse, factor)


def test_ntk_by_a_fixed_factor_is_the_dynamic_one_at_the_length_where_it_has_this_base() -> None:
    config = transformers.LlamaConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_theta": THETA, "rope_type": "dynamic", "factor": 2.0})  # fmt: skip
    inverse, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=2 * ORIGINAL)  # 2 * 2 - (2 - 1) times the base
    assert_same(our_tables(RopeScaling("ntk", 3.0), 50), inverse, 1.0)


def test_a_part_of_each_head_is_rotated() -> None:
    config = transformers.GPTNeoXConfig(hidden_size=4 * HEAD_DIM, num_attention_heads=4, rope_parameters={
        "rope_theta": THETA, "rope_type": "default", "partial_rotary_factor": 0.25})  # fmt: skip
    rotary = transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXRotaryEmbedding(config)
    ours = our_tables(RopeScaling(), 20, rope_fraction=0.25)
    assert ours.cos_BT1R.shape[-1] == 2
    assert_same(ours, rotary.inv_freq, 1.0)


def test_sinusoids() -> None:
    wanted = create_sinusoidal_embeddings(30, 12, torch.empty(30, 12))
    np.testing.assert_allclose(sinusoids(jnp.arange(30)[None], dim=12)[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_heads", [1, 6, 8, 12])
def test_slopes_of_alibi(num_heads: int) -> None:
    """theirs[h, 0, k] = slope_h times k in BLOOM, times k + 1 - length in MPT."""
    bloom = build_alibi_tensor(torch.ones(1, 5), num_heads, torch.float32)
    np.testing.assert_allclose(alibi_slopes(num_heads), bloom[:, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(num_heads), -build_mpt_alibi_tensor(num_heads, 5)[:, 0, -2], rtol=1e-6)


def test_dropout_keeps_and_scales_as_torch_does() -> None:
    x_BTD = jax.random.normal(jax.random.key(0), (4, 64, 32))
    noise = Noise(jax.random.key(1), jnp.arange(4 * 64).reshape(4, 64))
    ours = np.asarray(dropout(x_BTD, noise, rate=0.3))
    theirs = torch.nn.functional.dropout(torch.tensor(np.asarray(x_BTD)), 0.3).numpy()
    both = (ours != 0.0) & (theirs != 0.0)
    np.testing.assert_allclose(ours[both], theirs[both], rtol=1e-6)
    assert np.mean(ours != 0.0) == pytest.approx(0.7, abs=0.02) == pytest.approx(np.mean(theirs != 0.0), abs=0.02)
    assert not np.array_equal(ours, np.asarray(dropout(x_BTD, noise.at(layer=1, site=0), rate=0.3)))
