"""Fine-tune the quickstart's model to write the function that a docstring asks for.

Command:   llmjax train --config=configs/quickstart_sft.py
           (any conversations: --config.data.sources=chat.jsonl, lines of {"messages": [{"role", "content"}, ...]})
Needs:     runs/quickstart, whose model, tokenizer and corpus it takes; another run: --config.train.init_from=WORKDIR
Hardware:  2 CPU cores, 3 GB
Expected:  loss 3.9 nats an answer token (4.3 at the start) after about 1.5 minutes
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; it takes no argument. The model is the parent's."""
    del arg
    return ml_collections.ConfigDict({
        "task": {"name": "sft"},
        "data": {"sources": "corpus", "seq_len": 256, "batch_size": 16},
        "optim": {"learning_rate": 3e-4, "schedule": "linear", "warmup_steps": 10, "weight_decay": 0.0},
        "train": {"steps": 60, "init_from": "runs/quickstart"},
        "checkpoint": {"every": 30},
    })
