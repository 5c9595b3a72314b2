"""DeepSeek-V3 671B (DeepSeek-AI 2024, arXiv 2412.19437) on 1,024 TPU v5p chips, 12.6 M to 63 M tokens a step.

    llmjax plan --config=configs/deepseek_v3.py --topology=v5p:8x8x16

Hardware: v5p:8x8x16, sixteen shards of experts, weights and moments sharded over all 1,024 chips. Time: 180 days for
14.8 T tokens at 45 % MFU. Loss: 1.9 nats a token, by the fit of Hoffmann et al. 2022 (equation 10) for the 37 B
parameters that a token meets. Not as in the report: bfloat16 instead of FP8; balance is over the batch, not a row;
the balancing bias moves and the further head weighs 0.3 until the end. Left out: the extension to 128k.
"""

from ml_collections import ConfigDict

RAMP = [3072, 6144, 9216, 12_288]  # section 4.2: from 3,072 to 15,360 in the first 469 B tokens


def get_config() -> ConfigDict:
    """671 B parameters, of which a token meets 37 B, and one further head of 14 B; context 4,096."""
    return ConfigDict({
        "task": {"multi_token": 0.3},  # section 4.2
        "model": {  # section 4.2, model hyper-parameters
            "vocab_size": 129_280, "num_layers": 61, "dim": 7168, "num_heads": 128, "num_kv_heads": 128,
            "head_dim": 192, "mlp_dim": 18_432, "max_seq_len": 4096, "norm_eps": 1e-6, "init_scale": 0.006,
            "latent": {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
                       "v_head_dim": 128},
            "moe": {"num_experts": 256, "top_k": 8, "expert_mlp_dim": 2048, "num_shared_experts": 1,
                    "num_dense_layers": 3, "score": "sigmoid", "scaling_factor": 2.5, "num_groups": 8, "top_groups": 4,
                    "router_bias": "balancing", "bias_update_rate": 0.001, "balance_loss": 0.0001},
            "multi_token": 1,
        },
        "data": {"sources": "corpus/*.jsonl", "seq_len": 4096, "batch_size": 15_360},
        "optim": {"learning_rate": 2.2e-4, "warmup_steps": 2000, "b1": 0.9, "b2": 0.95, "weight_decay": 0.1,
                  "clip_norm": 1.0},  # section 4.2, training hyper-parameters
        "stages": [  # the same: constant, from 10 T tokens on a cosine to a tenth, then 500 B in two steps
            *[{"tokens": 469_000_000_000 // len(RAMP), "batch_size": rows, "schedule": "constant"} for rows in RAMP],
            {"tokens": 10_000_000_000_000 - 469_000_000_000, "schedule": "constant"},
            {"tokens": 4_300_000_000_000, "schedule": "cosine", "rate": 1.0, "end_rate": 0.1},
            {"tokens": 333_000_000_000, "schedule": "constant", "rate": 0.1},
            {"tokens": 167_000_000_000, "schedule": "constant", "rate": 7.3e-6 / 2.2e-4},
        ],
        "mesh": {"data": 1, "fsdp": 64, "expert": 16},
        "train": {"accumulation": 3, "remat": "full"},
        "checkpoint": {"every": 1000, "keep": 3},
    })  # fmt: skip
