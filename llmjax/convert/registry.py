"""Which family a folder or a model section belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmjax.convert.families.bert import BERT
from llmjax.convert.families.bloom import BLOOM
from llmjax.convert.families.deepseek_v2 import DEEPSEEK_V2
from llmjax.convert.families.deepseek_v3 import DEEPSEEK_V3
from llmjax.convert.families.gemma import GEMMA2, GEMMA3
from llmjax.convert.families.gpt2 import GPT2
from llmjax.convert.families.gpt_neox import GPT_NEOX
from llmjax.convert.families.gpt_oss import GPT_OSS
from llmjax.convert.families.llama import LLAMA
from llmjax.convert.families.marian import MARIAN
from llmjax.convert.families.mistral import MISTRAL
from llmjax.convert.families.mixtral import MIXTRAL
from llmjax.convert.families.mpt import MPT
from llmjax.convert.families.olmo import OLMO2, OLMO3
from llmjax.convert.families.olmoe import OLMOE
from llmjax.convert.families.qwen import QWEN2, QWEN3
from llmjax.convert.families.qwen_moe import QWEN3_MOE
from llmjax.convert.families.t5 import SWITCH, T5, T5_V1_1
from llmjax.convert.family import Family
from llmjax.core.errors import ConfigError
from llmjax.core.model_sections import ModelConfig

# In the order in which an export tries them where the run does not say which family it came from.
FAMILIES = {family.key: family for family in (
    LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, OLMO3, GEMMA2, GEMMA3, GPT2, GPT_NEOX, BLOOM, MPT,
    MIXTRAL, QWEN3_MOE, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3, GPT_OSS,
    T5, T5_V1_1, SWITCH, MARIAN, BERT)}  # fmt: skip


def family_of_folder(theirs: Mapping[str, Any]) -> Family:
    """The family that a config.json names, by its model type or its architecture."""
    for family in FAMILIES.values():
        if family.is_of(theirs):
            return family
    raise ConfigError(f"config.json: model_type is {theirs.get('model_type')!r}, architectures are "
                      f"{theirs.get('architectures') or []}; known are {', '.join(FAMILIES)}")


def family_of_model(model: ModelConfig, *, preferred: str | None = None) -> Family:
    """The family that says all of a model section: the preferred one if it does, else the first that does."""
    order = sorted(FAMILIES.values(), key=lambda family: family.key != preferred)
    misfits = {family.key: family.misfits(model) for family in order}
    fitting = [name for name, faults in misfits.items() if not faults]
    if not fitting:
        alike = [name for name in misfits if FAMILIES[name].sparse == bool(model.moe.num_experts)]
        nearest = min(alike, key=lambda name: len(misfits[name]))
        raise ConfigError(f"no family of transformers says all of this model; the nearest, {nearest}, lacks "
                          f"{', '.join(misfits[nearest])}")
    return FAMILIES[fitting[0]]
