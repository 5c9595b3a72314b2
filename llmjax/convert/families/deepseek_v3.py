"""DeepSeek-V3 (Liu et al. 2024): V2 with sigmoid scores, a bias that balances, and heads for further tokens."""

import dataclasses

from llmjax.convert.families import common
from llmjax.convert.families.deepseek_v2 import PARTS, ROWS, block
from llmjax.convert.family import Family
from llmjax.convert.operations import Copy, Linear
from llmjax.convert.parts import Field, Fixed, Given
from llmjax.convert.rules import Row

LAYER = common.LAYER
BALANCE = f"{LAYER}.mlp.gate.e_score_correction_bias"

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    parts=(
        *PARTS,
        Field("n_group", "moe.num_groups", 1),
        Field("topk_group", "moe.top_groups", 1),
        dataclasses.replace(common.NORMALISED, default=True),
        Field("num_nextn_predict_layers", "multi_token", 0),
        Given({"moe.score": "sigmoid", "moe.router_bias": "balancing"}),
        Fixed({"rope_interleave": True}),
    ),
    rows=(
        *ROWS,
        *block("multi_token/block"),
        *(Row(BALANCE, f"{path}/mlp/router/balance", Copy()) for path in ("blocks", "multi_token/block")),
        Row(f"{LAYER}.enorm.weight", "multi_token/token_norm/scale", Copy()),
        Row(f"{LAYER}.hnorm.weight", "multi_token/hidden_norm/scale", Copy()),
        Row(f"{LAYER}.eh_proj.weight", "multi_token/join", Linear(num_inputs=2)),
        Row(f"{LAYER}.shared_head.norm.weight", "multi_token/norm/scale", Copy()),
    ),
    derived=rf"{common.ROTARY_BUFFERS}|model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight",
    optional={"num_nextn_predict_layers": r"model\.layers\.{num_hidden_layers}\."},
)
