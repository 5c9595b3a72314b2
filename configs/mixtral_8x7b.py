"""Mixtral 8x7B (Jiang et al. 2024, arXiv 2401.04088, table 1) on 256 TPU v5p chips, 4 M tokens a step.

    llmjax plan --config=configs/mixtral_8x7b.py --topology=v5p:4x8x8

Hardware: v5p:4x8x8, eight shards of experts, weights and moments sharded over all 256 chips. Time: 34 days for 2 T
tokens at 45 % MFU. Loss: 2.0 nats a token, by the fit of Hoffmann et al. 2022 (equation 10) for the 12.9 B parameters
that a token meets. The report says nothing of the training: all but the model is Llama 3.1 8B's, the weight of the
balancing loss that of the released configuration.
"""

from llama3_8b import get_config as llama3_8b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """46.7 B parameters, of which a token meets 12.9 B."""
    config = llama3_8b()
    config.model.update({"vocab_size": 32_000, "rope_theta": 1e6, "max_seq_len": 32_768,
                         "moe": {"num_experts": 8, "top_k": 2, "balance_loss": 0.02}})
    del config.model.rope_scaling
    config.data.batch_size = 512
    config.mesh.update({"fsdp": 32, "expert": 8})
    config.train.steps = 480_000
    return config
