"""The quickstart in three stages of one run: short rows of a mixture, longer rows with slower rotations, an anneal.

Command:   llmjax train --config=configs/quickstart_stages.py
           (a field of a stage: --config.stages.0.tokens=1000000; a stage's batch: llmjax data show --step=N)
Hardware:  2 CPU cores, 3 GB
Expected:  loss 5.2 nats a token at step 70 of 94; about 3 minutes (estimated from the quickstart)
"""

import ml_collections
import quickstart


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; it takes no argument. What a stage leaves out is as the other sections say."""
    config = quickstart.get_config(arg)
    config.data.update({"sources": "stdlib,stdlib_tests", "mixture": "stdlib=0.7,stdlib_tests=0.3:1"})
    config.model.rope_theta = 40_000.0
    config.optim.schedule = "constant"  # with its warm-up, in the stages that have no schedule of their own
    config.stages = [
        {"tokens": 150_000, "seq_len": 128, "batch_size": 24, "rope_theta": 10_000.0, "batch_rule": "sqrt"},
        {"tokens": 120_000},
        {"tokens": 60_000, "mixture": "stdlib", "schedule": "linear"},
    ]
    del config.train.steps  # the stages decide
    return config
