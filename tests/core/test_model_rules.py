"""Sections that do not fit together: one line that names the field, its value and a way out."""

from __future__ import annotations

import re
from typing import Any

import pytest

from llmjax.core.config import resolve
from llmjax.core.errors import ConfigError

SIZES = {"vocab_size": 64, "num_layers": 2, "dim": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 24}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
MOE = {"num_experts": 8}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_kv_heads": 3}, "num_kv_heads=3: must divide model.num_heads=4; nearest: 2, 4"),
    ({"dropout": 1.0}, "dropout=1.0: less than 1"),
    ({"positions": "sinusoidal", "dim": 15}, "dim=15: there are as many sines as cosines"),
    ({"head_dim": 7}, "head_dim=7: rotary positions turn pairs, so 7 rotated dims must be an even number above 0"),
    ({"rope_fraction": 0.1}, "head_dim=8: rotary positions turn pairs, so 0 rotated dims"),
    ({"rope_fraction": 0.0}, "head_dim=8: rotary positions turn pairs, so 0 rotated dims"),
    ({"rope_fraction": 0.4}, "head_dim=8: rotary positions turn pairs, so 3 rotated dims"),
    ({"rope_fraction": 1.5}, "rope_fraction=1.5: "),
    ({"head_dim": 2, "rope_scaling": {"kind": "ntk"}}, "head_dim=2: model.rope_scaling.kind='ntk' needs at least 4"),
    ({"rope_scaling": {"kind": "llama3", "high_freq_factor": 1.0}},
     "rope_scaling.high_freq_factor=1.0: more than model.rope_scaling.low_freq_factor=1.0"),
    ({"rope_scaling": {"kind": "yarn"}, "rope_theta": 1.0}, "rope_theta=1.0: model.rope_scaling.kind='yarn'"),
    ({"rope_scaling": {"kind": "yarn", "beta_slow": 40.0}}, "rope_scaling.beta_slow=40.0: more than 0 and less than"),
    ({"positions": "alibi", "rope_scaling": {"kind": "yarn"}}, "rope_scaling.kind='yarn': with model.positions="),
    ({"attention": {"global_every": 2}}, "attention.global_every=2: there are no local layers"),
    ({"positions": "none", "attention": {"window": 4, "local_rope_theta": 9.0}}, "attention.local_rope_theta=9.0: "),
    ({"latent": LATENT, "positions": "alibi"}, "positions='alibi': latent attention has rotary ones"),
    ({"latent": LATENT, "attention": {"sinks": "learned"}}, "attention.sinks='learned': latent attention has none"),
    ({"latent": LATENT | {"qk_rope_head_dim": 3}}, "latent.qk_rope_head_dim=3: rotary positions turn pairs"),
    ({"moe": MOE | {"num_dense_layers": 2}}, "moe.num_dense_layers=2: fewer than model.num_layers=2"),
    ({"moe": MOE | {"num_groups": 3}}, "moe.num_groups=3: must divide model.moe.num_experts=8; nearest: 2, 4"),
    ({"moe": MOE | {"num_groups": 4, "top_groups": 5}}, "moe.top_groups=5: at most model.moe.num_groups=4"),
    ({"moe": MOE | {"num_groups": 4, "top_k": 3}}, "moe.top_k=3: at most the 2 experts"),
    ({"moe": MOE | {"jitter": 1.5}}, "moe.jitter=1.5: "),
    ({"multi_token": -1}, "multi_token=-1: "),
]  # fmt: skip


@pytest.mark.parametrize(("section", "line"), REFUSED, ids=[line.split(":")[0] for _, line in REFUSED])
def test_what_does_not_fit_is_named(section: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(f"model.{line}")):
        resolve({"model": SIZES | section, "data": {"seq_len": 8}})


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_an_even_part_of_a_head_may_be_rotated(fraction: float) -> None:
    model = resolve({"model": SIZES | {"rope_fraction": fraction}, "data": {"seq_len": 8}}).model
    assert model.rope_fraction == fraction
