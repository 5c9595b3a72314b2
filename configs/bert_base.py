"""BERT base (Devlin et al. 2019, arXiv 1810.04805): masked tokens of books and Wikipedia, by an encoder.

    llmjax plan --config=configs/bert_base.py --topology=v5p:2x2x1
    llmjax train --config=configs/bert_base.py --config.tokenizer.path=FOLDER_OF_ITS_TOKENIZER

Hardware: v5p:2x2x1, a batch of 256 rows over its 4 chips. Time: 10 hours for 43 B tokens at 45 % MFU, an expectation:
no TPU was at hand. Loss: 1.38 nats a masked token, the perplexity of 3.99 in the paper's table 6. Not as in the paper:
masked tokens are the only objective, without next sentences (as in RoBERTa, Liu et al. 2019, section 4.2).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """109.5 M parameters; rows of 128 tokens for nine tenths of the steps, then of 512."""
    return ConfigDict({
        # Section 3.1 and appendix A.1: 15 %, of which 80 % become the mask and 10 % any token.
        "task": {"objective": {"name": "masked_tokens", "noise_density": 0.15, "replace_by_mask": 0.8,
                               "replace_by_random": 0.1}},
        "model": {  # section 3: L = 12, H = 768, A = 12
            "vocab_size": 30_522, "num_layers": 12, "dim": 768, "num_heads": 12, "num_kv_heads": 12, "head_dim": 64,
            "mlp_dim": 3072, "max_seq_len": 512, "positions": "learned", "token_types": 2, "activation": "gelu",
            "attention": {"mask": "bidirectional", "bias": "all"}, "mlp_bias": "all", "norm_eps": 1e-12,
            "norm": {"kind": "layer", "bias": "learned", "placement": "sum", "embedding": "norm", "final": "none"},
            "embeddings": "tied", "head_transform": "dense", "head_bias": "learned", "dropout": 0.1,
        },
        "tokenizer": {"vocab_size": 30_000, "specials": "objectives"},
        "data": {"sources": "books/*.jsonl,wikipedia/*.jsonl", "seq_len": 512, "batch_size": 256},
        # Appendix A.2: rate, warm-up, linear fall, betas, decay, a million steps.
        "optim": {"learning_rate": 1e-4, "schedule": "linear", "warmup_steps": 10_000, "b1": 0.9, "b2": 0.999,
                  "eps": 1e-6, "weight_decay": 0.01, "clip_norm": 1.0},
        "stages": [{"tokens": 900_000 * 256 * 128, "seq_len": 128}, {"tokens": 100_000 * 256 * 512}],
        "mesh": {"data": 4},
        "checkpoint": {"every": 10_000, "keep": 3},
    })  # fmt: skip
