"""What the published recipes are held against: transformers' models, and the slices that their docstrings name.

As a program it lowers the step of recipes for their slices, one JSON line each: `python -m tests.recipes NAME ...`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

AUTO = {"T5Config": "AutoModelForSeq2SeqLM", "BertConfig": "AutoModelForMaskedLM"}  # else AutoModelForCausalLM
CONFIGS = Path(__file__).parents[1] / "configs"

LLAMA = {"vocab_size": 128_256, "num_key_value_heads": 8}
OLMO2 = {"vocab_size": 100_352}
# By recipe: the class of transformers' config, and the fields that differ from its defaults. Sizes are from the
# released configurations; the vocabularies of GPT-3 and OLMo are padded as the recipes say.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3_8b": ("LlamaConfig", LLAMA | {"intermediate_size": 14_336}),
    "llama3_70b": ("LlamaConfig", LLAMA | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
                                           "num_attention_heads": 64}),
    "llama3_405b": ("LlamaConfig", LLAMA | {"hidden_size": 16_384, "intermediate_size": 53_248,
                                            "num_hidden_layers": 126, "num_attention_heads": 128}),
    "olmo_7b": ("OlmoConfig", {}),
    "olmo2_7b": ("Olmo2Config", OLMO2),
    "olmo2_13b": ("Olmo2Config", OLMO2 | {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40,
                                          "num_attention_heads": 40}),
    "olmo2_32b": ("Olmo2Config", OLMO2 | {"hidden_size": 5120, "intermediate_size": 27_648, "num_hidden_layers": 64,
                                          "num_attention_heads": 40, "num_key_value_heads": 8}),
    "mixtral_8x7b": ("MixtralConfig", {}),
    "deepseek_v3": ("DeepseekV3Config", {}),
    "t5_base": ("T5Config", {"vocab_size": 32_128, "d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
    "bert_base": ("BertConfig", {}),
    "gpt3_175b": ("GPT2Config", {"vocab_size": 50_304, "n_positions": 2048, "n_embd": 12_288, "n_layer": 96,
                                 "n_head": 96}),
}  # fmt: skip


def topology_of(name: str) -> str:
    """The slice that a recipe's docstring plans it for."""
    found = re.search(r"--topology=(\S+)", (CONFIGS / f"{name}.py").read_text())
    assert found, f"{name} names no slice"
    return found[1]


def lower(name: str) -> dict[str, Any]:
    """A recipe's step, lowered for its slice: bytes of a chip's share of the state, and what the chip has."""
    import jax

    from llmjax.core import config as configs
    from llmjax.core.mesh import check_fits, make_mesh
    from llmjax.plan import topology
    from llmjax.plan.compile import abstract_step

    config, chips = configs.load(str(CONFIGS / f"{name}.py")), topology.load(topology_of(name))
    mesh = make_mesh(config.mesh, chips.devices)
    check_fits(config, mesh)
    with jax.set_mesh(mesh):
        step, arguments = abstract_step(config, mesh)
        module = jax.jit(step, donate_argnums=0).lower(*arguments).as_text()
    state = sum(_bytes_a_chip(leaf) for leaf in jax.tree.leaves(arguments[0]))
    return {"recipe": name, "state_bytes": state, "capacity": chips.chip.hbm_bytes, "while": module.count("while")}


def _bytes_a_chip(leaf: Any) -> int:
    """Of an array that is laid out on a mesh; scalars are not."""
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return leaf.dtype.itemsize * math.prod(shape)


def main_model(name: str) -> Any:
    """The model section of a recipe without the further heads, which published counts leave out."""
    from llmjax.core import config as configs

    return dataclasses.replace(configs.load(str(CONFIGS / f"{name}.py")).model, multi_token=0)


if __name__ == "__main__":
    from llmjax.core.platform import prepare

    prepare()
    for recipe in sys.argv[1:]:
        print(json.dumps(lower(recipe)), flush=True)
