"""T5 base (Raffel et al. 2020, arXiv 1910.10683): the baseline of sections 3.1 and 3.2, span corruption on C4.

    llmjax plan --config=configs/t5_base.py --topology=v5p:2x2x1
    llmjax train --config=configs/t5_base.py --config.tokenizer.path=FOLDER_OF_ITS_TOKENIZER

Hardware: v5p:2x2x1, a batch of 128 rows over its 4 chips. Time: 15 hours for 34 B tokens at 45 % MFU, an expectation:
no TPU was at hand. Loss: 1.68 nats a target token of held-out C4 (Shazeer 2020, arXiv 2002.05202, table 1, the same
without dropout). Not as in the paper: all matrices begin at one size (model.init_scale), where T5 gives each its own.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """222.9 M parameters: twelve layers each of encoder and decoder."""
    dim = 768
    return ConfigDict({
        "task": {"objective": {"name": "span_corruption", "noise_density": 0.15, "mean_span": 3.0}},  # section 3.1.4
        "model": {  # section 3.1.2 for sizes, 2.1 for positions, norms and dropout; vocabulary padded to 32,128
            "vocab_size": 32_128, "num_layers": 12, "encoder_layers": 12, "dim": dim, "num_heads": 12,
            "num_kv_heads": 12, "head_dim": 64, "mlp_dim": 3072, "max_seq_len": 512, "positions": "relative",
            "relative_buckets": 32, "relative_max_distance": 128, "activation": "relu", "norm_eps": 1e-6,
            "attention": {"scale": 1.0}, "embeddings": "tied", "logit_scale": dim**-0.5, "dropout": 0.1,
        },
        "tokenizer": {"kind": "unigram", "vocab_size": 32_000, "specials": "objectives"},  # section 2.2.1
        "data": {"sources": "c4/*.json.gz", "seq_len": 512, "batch_size": 128},  # section 3.1.3
        # Section 3.1.3: 0.01 for 10,000 steps, then 1 / sqrt(step), of Adafactor's relative steps; 2^19 steps.
        "optim": {"name": "adafactor", "learning_rate": 0.01, "schedule": "inverse_sqrt", "warmup_steps": 10_000,
                  "warmup_start": 1.0, "weight_decay": 0.0, "clip_norm": 0.0},
        "mesh": {"data": 4},
        "train": {"steps": 2**19},
        "checkpoint": {"every": 5000, "keep": 3},
    })  # fmt: skip
