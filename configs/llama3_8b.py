"""Llama 3.1 8B (Grattafiori et al. 2024, table 3) from scratch on 64 TPU v5p chips, 1 M tokens a step.

    llmjax plan --config=configs/llama3_8b.py --topology=v5p:4x4x4
    llmjax train --config=configs/llama3_8b.py --config.data.sources='corpus/*.jsonl' \\
        --config.tokenizer.path=FOLDER_OF_THE_LLAMA_3_TOKENIZER

Hardware: v5p:4x4x4, weights and moments sharded over all 64 chips; the compiler lays out 13 of the 95 GiB a chip.
Time: 3.1 s a step at 59 % MFU by the compiler's estimates, so 8 days for 220 B tokens; with train.remat=save_matmuls
2.8 s in 54 GB; a little less with the overlap options of benchmarks/plan_table.py as train.compiler_options, where
libtpu takes them. Loss: 2.1 nats a token, by the fit of Hoffmann et al. 2022 (equation 10). Both are expectations, not
measurements: no TPU was at hand.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """8.03 B parameters, context 8,192, rotary frequencies stretched for 128k later on."""
    return ConfigDict({
        "model": {
            "vocab_size": 128_256,
            "num_layers": 32,
            "dim": 4096,
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "mlp_dim": 14_336,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "kind": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_seq_len": 8192,
            },
            "norm_eps": 1e-5,
            "embeddings": "untied",
            "max_seq_len": 131_072,
            "compute_dtype": "bfloat16",
            "param_dtype": "float32",
        },
        "data": {"seq_len": 8192, "batch_size": 128},
        "mesh": {"data": 1, "fsdp": 64},
        "optim": {
            "learning_rate": 3e-4,
            "schedule": "cosine",
            "warmup_steps": 2000,
            "end_fraction": 0.1,
            "b2": 0.95,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
        },
        "train": {"steps": 210_000, "remat": "full"},
        "checkpoint": {"every": 1000, "keep": 3},
    })  # fmt: skip
