"""Llama 3.1 405B (Grattafiori et al. 2024, table 3) on 1,024 TPU v5p chips, 4 M to 16 M tokens a step.

    llmjax plan --config=configs/llama3_405b.py --topology=v5p:8x8x16

Hardware: v5p:8x8x16, weights and moments sharded over all 1,024 chips. Time: 5.2 years for 14.8 T tokens at 45 % MFU
(the report had 16,384 GPUs). Left out: the stages of 800 B tokens that lead to a context of 128k, and the anneal on the
last 40 M tokens with the average of its checkpoints.
"""

from llama3_8b import get_config as llama3_8b
from ml_collections import ConfigDict

# Section 3.1.2: general knowledge, mathematics and reasoning, code, other languages.
MIXTURE = {"general": 0.5, "reasoning": 0.25, "code": 0.17, "multilingual": 0.08}


def get_config() -> ConfigDict:
    """405 B parameters: the 8B's vocabulary, context and rotary frequencies, wider and deeper."""
    config = llama3_8b()
    config.model.update(num_layers=126, dim=16_384, num_heads=128, mlp_dim=53_248)
    config.data.update({"batch_size": 2048, "sources": ",".join(f"{name}/*.parquet" for name in MIXTURE),
                        "mixture": ",".join(f"{name}/*.parquet={share}" for name, share in MIXTURE.items())})
    config.mesh.update({"fsdp": 512, "tensor": 2})
    # Section 3.4.1: rates, warm-up, horizon and end of the cosine; the batch and the length of rows grow.
    config.optim.update({"learning_rate": 8e-5, "warmup_steps": 8000, "schedule_steps": 1_200_000,
                         "end_fraction": 0.01})
    config.stages = [
        {"tokens": 252_000_000, "batch_size": 1024, "seq_len": 4096},
        {"tokens": 2_870_000_000_000 - 252_000_000, "batch_size": 1024},
        {"tokens": 14_800_000_000_000 - 2_870_000_000_000},
    ]
    del config.train.steps  # the stages decide
    config.train.accumulation = 2
    return config
