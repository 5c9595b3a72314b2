"""A workdir's model, whole on one device, ready to generate, to be evaluated or to be served."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from llmjax.core import config as configs
from llmjax.core.errors import RunError
from llmjax.core.model_sections import ModelConfig
from llmjax.core.sections import Config
from llmjax.core.task import Params
from llmjax.data.tokenizer import Tokenizer
from llmjax.models import decoder
from llmjax.train import checkpoint


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a workdir's latest checkpoint holds, and what its token ids mean."""

    config: Config
    tokenizer: Tokenizer | None  # None where weights came without one
    model: decoder.Model
    params: Params
    step: int

    def prompt_ids(self, text: str) -> list[int]:
        """A text as what is continued, behind the begin token, or as a source for an encoder, before the end token."""
        assert self.tokenizer, "text is made of tokens"
        return prompt_ids(text, self.tokenizer, self.model.config)


def prompt_ids(text: str, tokenizer: Tokenizer, model: ModelConfig) -> list[int]:
    """Token ids of a prompt for a model."""
    ids = tokenizer.encode(text)
    return [*ids, tokenizer.eos_id] if model.encoder_layers else [tokenizer.bos_id, *ids]


def load_workdir(workdir: Path, overrides: Mapping[str, str] | None = None) -> Loaded:
    """The latest checkpoint of a workdir, its config changed by `overrides` such as {"serve.max_queue": "2"}.

    Raises RunError when there is no such workdir or no checkpoint in it yet, ConfigError when an override does not fit
    the weights or the checkpoint was trained with another tokenizer.
    """
    if not workdir.is_dir():
        raise RunError(f"there is no workdir {workdir}; `llmjax train --workdir={workdir} --config=FILE` makes one")
    config = configs.from_workdir(workdir, overrides)
    folder = workdir / "checkpoints"
    step = checkpoint.whole_step(folder)
    if step is None:
        raise RunError(f"{workdir} holds no checkpoint yet; `llmjax train --workdir={workdir}` trains one")
    model = decoder.abstract_model(config.model)
    params = checkpoint.restore_params(folder, model.abstract_params(None), step, weights=config.eval.weights)
    return Loaded(config, _tokenizer(workdir, folder, step), model, params, step)


def _tokenizer(workdir: Path, folder: Path, step: int) -> Tokenizer | None:
    if not (workdir / "tokenizer").is_dir():
        return None
    tokenizer = Tokenizer.load(workdir)
    meta = checkpoint.read_meta(folder, step)
    if meta.get("tokenizer_hash"):  # imported weights were trained with a tokenizer that we did not hash
        checkpoint.check_meta(meta, tokenizer_hash=tokenizer.hash)
    return tokenizer
