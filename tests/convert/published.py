"""Tiny models of every family as transformers makes them, for the tests against it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers

TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
             "beta_fast": 4.0, "beta_slow": 1.0}  # fmt: skip
LOCAL = {"sliding_window": 8, "query_pre_attn_scalar": 16, "head_dim": 8}


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration of transformers: its class and fields that differ from TINY's."""

    config: type
    fields: dict[str, Any]


GPT2_FIELDS = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
               "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
BLOOM_FIELDS = {"vocab_size": 96, "hidden_size": 24, "n_layer": 2, "n_head": 6, "bos_token_id": 1, "eos_token_id": 2}
NEOX_FIELDS = {name: value for name, value in TINY.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
MPT_FIELDS = {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
SPARSE = TINY | {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = SPARSE | {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "num_hidden_layers": 3, "rms_norm_eps": 1e-6,
}  # fmt: skip
LATENT_YARN = YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 1.0}
CASES = {
    "llama": Case(transformers.LlamaConfig, TINY),
    "llama, tied, llama3 rope": Case(
        transformers.LlamaConfig, TINY | {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama, one key head, biases, linear rope": Case(
        transformers.LlamaConfig, TINY | {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True,
                                          "mlp_bias": True, "rope_parameters": LINEAR_ROPE}),
    "llama, dynamic rope": Case(transformers.LlamaConfig, TINY | {
        "max_position_embeddings": 16, "rope_parameters": DYNAMIC_ROPE}),
    "llama, yarn": Case(transformers.LlamaConfig, TINY | {"rope_parameters": YARN_ROPE}),
    "mistral": Case(transformers.MistralConfig, TINY | {"sliding_window": 8}),
    "qwen2": Case(transformers.Qwen2Config, TINY | {"tie_word_embeddings": True}),
    "qwen3": Case(transformers.Qwen3Config, TINY | {"head_dim": 16}),
    "gemma2": Case(transformers.Gemma2Config, TINY | LOCAL | {"num_hidden_layers": 3, "final_logit_softcapping": 3.0,
                                                            "attn_logit_softcapping": 2.0}),
    "gemma3": Case(transformers.Gemma3TextConfig, TINY | LOCAL | {
        "num_hidden_layers": 5, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                            "full_attention": LINEAR_ROPE}}),
    "olmo2": Case(transformers.Olmo2Config, TINY),
    "olmo3": Case(transformers.Olmo3Config, TINY | {
        "num_hidden_layers": 4, "sliding_window": 8,
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                            "full_attention": YARN_ROPE}}),
    "gpt2": Case(transformers.GPT2Config, GPT2_FIELDS),
    "gpt_neox": Case(transformers.GPTNeoXConfig, NEOX_FIELDS | {"hidden_act": "gelu"}),
    "gpt_neox, sequential": Case(transformers.GPTNeoXConfig, NEOX_FIELDS | {
        "use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}),
    "bloom": Case(transformers.BloomConfig, BLOOM_FIELDS),
    "mpt": Case(transformers.MptConfig, MPT_FIELDS),
    "mixtral": Case(transformers.MixtralConfig, TINY | {"num_local_experts": 4, "sliding_window": 8}),
    "qwen3_moe": Case(transformers.Qwen3MoeConfig, SPARSE | {"num_experts": 8, "norm_topk_prob": True, "head_dim": 16}),
    "olmoe": Case(transformers.OlmoeConfig, TINY | {"num_experts": 8, "num_experts_per_tok": 3}),
    "deepseek_v2": Case(transformers.DeepseekV2Config, LATENT | {
        "q_lora_rank": None, "topk_method": "group_limited_greedy", "rope_parameters": YARN_ROPE}),
    "deepseek_v3": Case(transformers.DeepseekV3Config, LATENT | {
        "rope_parameters": LATENT_YARN, "num_nextn_predict_layers": 0}),
    "gpt_oss": Case(transformers.GptOssConfig, TINY | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8,
        "rope_parameters": YARN_ROPE | {"truncate": False}}),
}  # fmt: skip
# One of each kind of position, norm, residual and mask; the others run with the slow tests.
QUICK = ("llama, tied, llama3 rope", "gemma3", "olmo3", "gpt_neox", "bloom", "deepseek_v3")


def make(case: str, **fields: Any) -> transformers.PreTrainedModel:
    """The model of a case."""
    return make_case(dataclasses.replace(CASES[case], fields=CASES[case].fields | fields))


def make_case(case: Case) -> transformers.PreTrainedModel:
    """A model with every parameter, norms and biases included, moved off its initial value."""
    torch.manual_seed(0)
    config = case.config(**case.fields)
    # Their other implementations leave out soft-caps.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        stored = model.state_dict()
        for tensor in (*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in stored)):
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def make_llama(**fields: Any) -> transformers.PreTrainedModel:
    """A Llama."""
    return make("llama", **fields)
