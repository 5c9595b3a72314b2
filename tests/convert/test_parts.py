"""Parts of the decoder that no family here has, against models of transformers that do, through a table they share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from llmjax.convert import safetensors
from llmjax.convert.huggingface import to_params
from llmjax.convert.registry import FAMILIES
from llmjax.core.mesh import single_device_mesh
from llmjax.core.model_sections import AttentionConfig
from llmjax.models.decoder import abstract_model
from tests.convert.published import GPT2_FIELDS, TINY, Case, make_case
from tests.convert.test_families import NUM_ROWS, SEQ_LEN, Pair, check_loss_and_gradients

# The family whose table fits, the model of transformers, and what of our section differs from that of the family.
PARTS: dict[str, tuple[str, Case, dict[str, Any]]] = {
    "scales of embedding, residual, scores and logits": ("llama", Case(transformers.GraniteConfig, TINY | {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 4.0}),
        {"embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 0.25, "attention": AttentionConfig(scale=0.3)}),
    "no positions": ("llama", Case(transformers.SmolLM3Config, TINY | {
        "no_rope_layers": [0, 0], "pad_token_id": 0, "tie_word_embeddings": False}), {"positions": "none"}),
    "exact GeGLU": ("llama", Case(transformers.LlamaConfig, TINY | {"hidden_act": "gelu"}), {"activation": "geglu"}),
    "exact GELU": ("gpt2", Case(transformers.GPT2Config, GPT2_FIELDS | {"activation_function": "gelu"}),
                   {"activation": "gelu"}),
    "ReLU": ("gpt2", Case(transformers.GPT2Config, GPT2_FIELDS | {"activation_function": "relu"}),
             {"activation": "relu"}),
    "squared ReLU": ("gpt2", Case(transformers.GPT2Config, GPT2_FIELDS | {"activation_function": "relu2"}),
                     {"activation": "relu2"}),
}  # fmt: skip
QUICK = ("scales of embedding, residual, scores and logits",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
                                  for name in PARTS])
def test_loss_and_every_gradient(name: str, tmp_path: Path) -> None:
    family_name, case, fields = PARTS[name]
    theirs, family = make_case(case), FAMILIES[family_name]
    theirs.save_pretrained(tmp_path / "hf")
    plain = (TINY if family_name == "llama" else GPT2_FIELDS) | {"model_type": family_name}
    config = dataclasses.replace(family.to_ours(plain, dtype="float32"), **fields)
    params = to_params(safetensors.Reader(tmp_path / "hf"), family=family, model=config)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (NUM_ROWS, SEQ_LEN + 1))
    pair = Pair(name, tmp_path, theirs, family, abstract_model(config), params, tokens)
    check_loss_and_gradients(pair, single_device_mesh())
