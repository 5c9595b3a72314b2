"""A workdir with random weights, as `train` or `import-hf` leave one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from llmjax.core import config as configs
from llmjax.core.sections import Config, DataConfig, TokenizerConfig
from llmjax.data.tokenizer import train_tokenizer
from llmjax.models import decoder
from llmjax.train.checkpoint import save_params
from tests.serve.tiny import CONFIG

WORDS = ("def", "return", "self", "import", "from", "class", "if", "else", "for", "in", "while", "try", "except")
TEXTS = [f"{a} {b}({c}):\n    {c} = {a}\n" for a in WORDS for b in WORDS for c in WORDS[:3]]


def make_workdir(folder: Path, *, with_tokenizer: bool = True, **model: Any) -> Path:
    """Config, tokenizer and one checkpoint; `model` changes fields of the tiny model."""
    meta: dict[str, Any] = {}
    vocab_size = CONFIG.vocab_size
    if with_tokenizer:
        tokenizer = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=290), folder / "tokenizer")
        vocab_size, meta["tokenizer_hash"] = tokenizer.vocab_size, tokenizer.hash
    config = Config(name="tiny", data=DataConfig(seq_len=64),
                    model=dataclasses.replace(CONFIG, vocab_size=vocab_size, **model))
    configs.save(config, folder)
    save_params(folder / "checkpoints", decoder.init_params(config.model, jax.random.key(0), None), meta)
    return folder
