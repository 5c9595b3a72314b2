"""OLMo 7B (Groeneveld et al. 2024, arXiv 2402.00838) from scratch on 64 TPU v5p chips, 4.4 M tokens a step.

    llmjax plan --config=configs/olmo_7b.py --topology=v5p:4x4x4
    llmjax train --config=configs/olmo_7b.py --config.tokenizer.path=FOLDER_OF_ITS_TOKENIZER

Hardware: v5p:4x4x4, weights and moments sharded over all 64 chips. Time: 90 days for 2.46 T tokens at 45 % MFU. Loss:
2.0 nats a token, by the fit of Hoffmann et al. 2022 (equation 10). Expectations, not measurements: no TPU was at hand.
Not as in the report: rates fall from the first step on and not from the 5,000th, under the same warm-up.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """6.89 B parameters, context 2,048."""
    return ConfigDict({
        "model": {  # table 1 and section 2.1: no biases, norms without parameters, embeddings padded to 50,304
            "vocab_size": 50_304, "num_layers": 32, "dim": 4096, "num_heads": 32, "num_kv_heads": 32, "head_dim": 128,
            "mlp_dim": 11_008, "max_seq_len": 2048, "rope_theta": 10_000.0, "norm_eps": 1e-5,
            "norm": {"kind": "layer", "scale": "none"}, "embeddings": "untied",
        },
        "data": {"sources": "dolma/*.json.gz", "seq_len": 2048, "batch_size": 2160},  # section 3.1: about 4 M tokens
        # Table 5: peak, end at a tenth of it, betas, epsilon, decay; section 3.3: warm-up and clipping.
        "optim": {"learning_rate": 3e-4, "warmup_steps": 5000, "b1": 0.9, "b2": 0.95, "eps": 1e-5, "weight_decay": 0.1,
                  "clip_norm": 1.0},
        "stages": [{"tokens": 2_460_000_000_000, "schedule": "linear", "rate": 1.0, "end_rate": 0.1}],
        "mesh": {"data": 1, "fsdp": 16, "tensor": 4},
        "train": {"accumulation": 27, "remat": "full"},
        "checkpoint": {"every": 1000, "keep": 3},
    })  # fmt: skip
