"""Llama 3.1 405B (Grattafiori et al. 2024, table 3) on 1,024 TPU v5p chips, 8 M tokens a step.

    llmjax plan --config=configs/llama3_405b.py --topology=v5p:8x8x16

Hardware: v5p:8x8x16, weights and moments sharded over all 1,024 chips.
"""

from llama3_8b import get_config as llama3_8b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """405 B parameters: the 8B's vocabulary, context and rotary frequencies, wider and deeper."""
    config = llama3_8b()
    config.model.update(num_layers=126, dim=16_384, num_heads=128, mlp_dim=53_248)
    config.data.batch_size = 1024
    config.mesh.fsdp = 1024
    config.optim.learning_rate = 8e-5
    return config
