"""OLMo 2 13B (OLMo team 2025, arXiv 2501.00656) from scratch on 128 TPU v5p chips, 8.4 M tokens a step.

    llmjax plan --config=configs/olmo2_13b.py --topology=v5p:4x4x8
    llmjax train --config=configs/olmo2_13b.py --config.tokenizer.path=FOLDER_OF_ITS_TOKENIZER

Hardware: v5p:4x4x8, weights and moments sharded over all 128 chips. Time: 180 days for 5.1 T tokens at 45 % MFU. Loss:
1.95 nats a token, by the fit of Hoffmann et al. 2022 (equation 10). Expectations, not measurements: no TPU was at hand.
Not as in the report: it averages anneals on 100 B and 300 B tokens, this is one of 100 B. Its table 3 gives the peak
rate used here; the configuration released with the code has 3e-4, from which the released anneal would not follow.
"""

from ml_collections import ConfigDict
from olmo2_7b import get_config as olmo2_7b
from olmo2_7b import with_stages


def get_config() -> ConfigDict:
    """13.7 B parameters: the 7B, wider and deeper."""
    config = olmo2_7b()
    config.model.update(num_layers=40, dim=5120, num_heads=40, num_kv_heads=40, mlp_dim=13_824)
    config.optim.learning_rate = 9e-4  # table 3
    config.train.accumulation = 2
    return with_stages(config, batch_size=2048, tokens=5e12, horizon=5e12, anneal=100e9)
