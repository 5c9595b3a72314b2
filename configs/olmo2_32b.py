"""OLMo 2 32B (OLMo team 2025, arXiv 2501.00656) from scratch on 256 TPU v5p chips, 8.4 M tokens a step.

    llmjax plan --config=configs/olmo2_32b.py --topology=v5p:4x8x8
    llmjax train --config=configs/olmo2_32b.py --config.tokenizer.path=FOLDER_OF_ITS_TOKENIZER

Hardware: v5p:4x8x8, weights and moments sharded over all 256 chips. Time: 260 days for 6.16 T tokens at 45 % MFU. Loss:
1.9 nats a token, by the fit of Hoffmann et al. 2022 (equation 10). Expectations, not measurements: no TPU was at hand.
Not as in the report: it averages anneals on 100 B and 300 B tokens, this is one of 100 B.
"""

from ml_collections import ConfigDict
from olmo2_7b import get_config as olmo2_7b
from olmo2_7b import with_stages


def get_config() -> ConfigDict:
    """32.2 B parameters: the 7B, wider and deeper, five query heads sharing each key head."""
    config = olmo2_7b()
    config.model.update(num_layers=64, dim=5120, num_heads=40, num_kv_heads=8, mlp_dim=27_648)
    config.optim.learning_rate = 6e-4  # table 3
    config.mesh.fsdp = 256
    return with_stages(config, batch_size=2048, tokens=6.06e12, horizon=6.5e12, anneal=100e9)
