"""A small encoder of Python source: masked tokens, learned positions, norms of sums, as BERT (Devlin et al. 2019).

Command:   llmjax train --config=configs/tiny_bert.py
           (on eight virtual devices: JAX_NUM_CPU_DEVICES=8 and --config.mesh.fsdp=2 --config.mesh.tensor=2)
Hardware:  2 CPU cores, 3 GB
Expected:  not yet run at this size; at that of tests/test_encoder_runs.py (asyncio's files, 40 steps of 8 rows, about
           1 minute) the loss begins at 6.24 and the held-out loss ends at 4.56 nats a target, near the tokens' entropy
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; it takes no argument."""
    del arg
    return ml_collections.ConfigDict({
        "task": {"name": "pretrain", "objective": {"name": "masked_tokens"}},
        "tokenizer": {"vocab_size": 2048, "specials": "objectives"},
        "data": {"sources": "stdlib", "seq_len": 128, "batch_size": 32},
        "model": {"num_layers": 2, "dim": 128, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32, "mlp_dim": 512,
                  "positions": "learned", "token_types": 2, "embeddings": "tied", "activation": "gelu",
                  "mlp_bias": "all",
                  "attention": {"mask": "bidirectional", "bias": "all"},
                  "norm": {"kind": "layer", "bias": "learned", "placement": "sum", "embedding": "norm",
                           "final": "none"},
                  "head_transform": "dense", "head_bias": "learned", "compute_dtype": "float32"},
        "optim": {"name": "muon", "learning_rate": 0.01, "schedule": "linear", "warmup_steps": 20},
        "train": {"steps": 200},
        "checkpoint": {"every": 100},
        "eval": {"every": 50, "batches": 4},
    })
