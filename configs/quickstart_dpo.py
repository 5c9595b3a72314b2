"""Teach the fine-tuned quickstart model to prefer a function's own body to its words in disorder (DPO).

Command:   llmjax train --config=configs/quickstart_dpo.py
           (any pairs: --config.data.sources=pairs.jsonl, lines with "chosen" and "rejected", texts or messages)
Needs:     runs/quickstart_sft, the policy to start from and the frozen reference
Hardware:  2 CPU cores, 3 GB
Expected:  DPO loss 0.2 (0.69 at the start), the chosen answer preferred in every pair, after about 2 minutes
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; it takes no argument. The model is the parent's."""
    del arg
    return ml_collections.ConfigDict({
        "task": {"name": "dpo", "beta": 0.1},
        "data": {"sources": "corpus", "seq_len": 256, "batch_size": 8},
        "optim": {"learning_rate": 5e-5, "schedule": "linear", "warmup_steps": 10, "weight_decay": 0.0},
        "train": {"steps": 60, "init_from": "runs/quickstart_sft"},
        "checkpoint": {"every": 30},
    })
