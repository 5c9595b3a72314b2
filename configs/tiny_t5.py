"""A small encoder-decoder of Python source: span corruption, relative positions, as T5 (Raffel et al. 2020).

Command:   llmjax train --config=configs/tiny_t5.py
           (on eight virtual devices: JAX_NUM_CPU_DEVICES=8 and --config.mesh.fsdp=2 --config.mesh.tensor=2)
Hardware:  2 CPU cores, 3 GB
Expected:  not yet run at this size; at that of tests/test_encoder_runs.py (asyncio's files, 40 steps of 8 rows, about
           1 minute) the loss begins at 6.25 and the held-out loss ends at 4.16 nats a target
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; it takes no argument."""
    del arg
    return ml_collections.ConfigDict({
        "task": {"name": "pretrain", "objective": {"name": "span_corruption"}},
        "tokenizer": {"vocab_size": 2048, "specials": "objectives"},
        "data": {"sources": "stdlib", "seq_len": 256, "target_len": 64, "batch_size": 16},
        "model": {"num_layers": 2, "encoder_layers": 2, "dim": 128, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32,
                  "mlp_dim": 256, "positions": "relative", "activation": "geglu_tanh", "norm_eps": 1e-6,
                  "attention": {"scale": 1.0}, "compute_dtype": "float32"},
        "optim": {"name": "muon", "learning_rate": 0.01, "schedule": "linear", "warmup_steps": 20},
        "train": {"steps": 200},
        "checkpoint": {"every": 100},
        "eval": {"every": 50, "batches": 4},
    })
