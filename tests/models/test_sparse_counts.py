"""Parameters of the published sparse models, in all and for one token, against transformers' on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from llmjax.convert.registry import FAMILIES
from llmjax.models.flops import num_matmul_params, num_params

QWEN = {"vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768}  # fmt: skip
LITE = {"hidden_size": 2048, "intermediate_size": 10_944, "num_hidden_layers": 27, "num_attention_heads": 16,
        "q_lora_rank": None, "moe_intermediate_size": 1408, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1}  # fmt: skip
# The class of transformers' config, the published sizes where they are not its defaults, and what the authors count.
PUBLISHED: dict[str, tuple[type, dict[str, Any], int | None]] = {
    "Mixtral 8x7B": (transformers.MixtralConfig, {}, 46_702_792_704),
    "Qwen3 30B-A3B": (transformers.Qwen3MoeConfig, QWEN, 30_532_122_624),
    "OLMoE 1B-7B": (transformers.OlmoeConfig, {"intermediate_size": 1024}, 6_919_161_856),
    "DeepSeek-V2-Lite": (transformers.DeepseekV2Config, LITE, 15_706_484_224),
    "DeepSeek-V3": (transformers.DeepseekV3Config, {"num_nextn_predict_layers": 0}, 671_026_404_352),
    "GPT-OSS 20B": (transformers.GptOssConfig, {"num_hidden_layers": 24, "num_local_experts": 32}, 20_914_757_184),
    "GPT-OSS 120B": (transformers.GptOssConfig, {}, 116_829_156_672),
}

QUICK = ("DeepSeek-V3", "GPT-OSS 20B")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
                                  for name in PUBLISHED])
def test_parameters_in_all_and_for_one_token(name: str) -> None:
    make, fields, published = PUBLISHED[name]
    theirs = make(**fields)
    with torch.device("meta"):
        sizes = dict(transformers.AutoModelForCausalLM.from_config(theirs).named_parameters())
    config = FAMILIES[theirs.model_type].to_ours(theirs.to_dict(), dtype="bfloat16")
    assert num_params(config) == sum(param.numel() for param in sizes.values()) == published
    chosen = config.moe.top_k / config.moe.num_experts
    active = sum(param.numel() * (chosen if ".experts." in path else 1.0) for path, param in sizes.items()
                 if param.dim() >= 2 and not path.endswith(("embed_tokens.weight", "_bias")))
    assert num_matmul_params(config) == pytest.approx(active, rel=1e-12)
