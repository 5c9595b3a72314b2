"""OLMo 2 7B (OLMo team 2025, arXiv 2501.00656) from scratch on 128 TPU v5p chips, 4.2 M tokens a step.

    llmjax plan --config=configs/olmo2_7b.py --topology=v5p:4x4x8
    llmjax train --config=configs/olmo2_7b.py --config.tokenizer.path=FOLDER_OF_ITS_TOKENIZER

Hardware: v5p:4x4x8, weights and moments sharded over all 128 chips. Time: 76 days for 3.95 T tokens at 45 % MFU. Loss:
2.0 nats a token, by the fit of Hoffmann et al. 2022 (equation 10). Expectations, not measurements: no TPU was at hand.
Not as in the report: scales of norms do not decay; it averages three anneals on 50 B tokens, this is one of them.
"""

import math

from ml_collections import ConfigDict
from olmo_7b import get_config as olmo_7b

END = 0.1  # the cosine's end over its peak


def get_config() -> ConfigDict:
    """7.30 B parameters, context 4,096: OLMo 7B with RMS norms behind the sublayers, normed queries and keys."""
    config = olmo_7b()
    config.model.update({"vocab_size": 100_352, "max_seq_len": 4096, "rope_theta": 500_000.0, "norm_eps": 1e-6,
                         "norm": {"kind": "rms", "scale": "plain", "placement": "post"},
                         "attention": {"qk_norm": "full"}})  # table 1
    config.task = {"z_loss": 1e-5}
    # Table 1: epsilon, no decay of embeddings; table 3: peak rate, warm-up and batch.
    config.optim.update({"learning_rate": 3e-4, "warmup_steps": 2000, "eps": 1e-8, "decay_embeddings": "no"})
    config.data.update({"sources": "olmo-mix-1124/*.jsonl.gz,dolmino-mix-1124/*.jsonl.gz", "seq_len": 4096})
    config.mesh.update({"fsdp": 128, "tensor": 1})
    config.train.accumulation = 1
    return with_stages(config, batch_size=1024, tokens=3.9e12, horizon=5e12, anneal=50e9)


def with_stages(config: ConfigDict, *, batch_size: int, tokens: float, horizon: float, anneal: float) -> ConfigDict:
    """A cosine cut off after `tokens` of its `horizon`, then straight to zero on better data (sections 2.3 and 4)."""
    config.data.batch_size = batch_size
    config.optim.update({"schedule": "cosine", "end_fraction": END,
                         "schedule_steps": round(horizon / (batch_size * config.data.seq_len))})
    cut = END + (1 - END) * 0.5 * (1 + math.cos(math.pi * tokens / horizon))
    web, better = config.data.sources.split(",")
    config.stages = [
        {"tokens": round(tokens), "mixture": web},
        {"tokens": round(anneal), "mixture": better, "schedule": "linear", "rate": cut, "end_rate": 0.0},
    ]
    return config
