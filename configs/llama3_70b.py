"""Llama 3.1 70B (Grattafiori et al. 2024, table 3) on 128 TPU v5p chips, 2 M tokens a step.

    llmjax plan --config=configs/llama3_70b.py --topology=v5p:4x4x8

Hardware: v5p:4x4x8, weights and moments sharded over all 128 chips.
"""

from llama3_8b import get_config as llama3_8b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """70.6 B parameters: the 8B's vocabulary, context and rotary frequencies, wider and deeper."""
    config = llama3_8b()
    config.model.update(num_layers=80, dim=8192, num_heads=64, mlp_dim=28_672)
    config.data.batch_size = 256
    config.mesh.fsdp = 128
    config.optim.learning_rate = 1.5e-4
    return config
