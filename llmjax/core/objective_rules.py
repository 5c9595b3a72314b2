"""Which objective goes with which model, and what follows from it for the shapes of batches."""

from __future__ import annotations

import dataclasses

from llmjax.core.errors import ConfigError
from llmjax.core.model_sections import ModelConfig
from llmjax.core.objective_sections import ObjectiveConfig, corrupted_length, longest_text
from llmjax.core.sections import Config, DataConfig

AT_LEAST: dict[str, float] = {
    "data.target_len": 0, "task.label_smoothing": 0, "task.objective.noise_density": 0.01,
    "task.objective.mean_span": 1, "task.objective.replace_by_mask": 0, "task.objective.replace_by_random": 0,
    "task.objective.middle_rate": 0, "task.objective.suffix_first": 0,
}  # fmt: skip
AT_MOST: dict[str, float] = {
    "task.label_smoothing": 0.99, "task.objective.noise_density": 0.9, "task.objective.replace_by_mask": 1,
    "task.objective.replace_by_random": 1, "task.objective.middle_rate": 1, "task.objective.suffix_first": 1,
}  # fmt: skip


def complete_data(data: DataConfig, *, model: ModelConfig, objective: ObjectiveConfig) -> DataConfig:
    """The data section with the length of targets filled in, 0 where there is no encoder."""
    if not model.encoder_layers:
        return dataclasses.replace(data, target_len=0)
    return dataclasses.replace(data, target_len=data.target_len or _target_len(data.seq_len, objective))


def _target_len(seq_len: int, objective: ObjectiveConfig) -> int:
    if objective.name != "span_corruption":
        return seq_len
    rates = {"density": objective.noise_density, "mean_span": objective.mean_span}
    return corrupted_length(max(longest_text(seq_len, **rates), 2), **rates)[1]


def check_objective(config: Config) -> None:
    """Raise ConfigError unless the model is of the kind that the objective trains."""
    objective, mask = config.task.objective, config.model.attention.mask
    fitting: tuple[str, ...]
    if config.model.encoder_layers:
        found, fitting = "model.encoder_layers", ("span_corruption", "prefix")
    else:
        found = f"model.attention.mask={mask!r}"
        fitting = {"causal": ("next_token", "fill_in_the_middle"), "bidirectional": ("masked_tokens",),
                   "prefix": ("prefix",)}[mask]  # fmt: skip
    if objective.name not in fitting:
        raise ConfigError(f"task.objective.name={objective.name!r}: with {found} "
                          f"{' or '.join(map(repr, fitting))} fits")
    if objective.replace_by_mask + objective.replace_by_random > 1:
        raise ConfigError(f"task.objective.replace_by_random={objective.replace_by_random}: with "
                          f"task.objective.replace_by_mask={objective.replace_by_mask} more than 1 together")
    for field in ("curriculum", "mix_every"):
        if objective.name != "next_token" and (value := getattr(config.data, field)):
            raise ConfigError(f"data.{field}={value!r}: with task.objective.name={objective.name!r} there is none")
    if config.model.encoder_layers and config.stages:
        raise ConfigError(f"stages: {len(config.stages)} of them: with model.encoder_layers rows have one length")
    if config.eval.prompt and mask == "bidirectional":
        raise ConfigError(f"eval.prompt={config.eval.prompt!r}: an encoder alone continues no text; '' fits")


def predicts_from_left(model: ModelConfig) -> bool:
    """Whether a model gives a text alone a probability, token by token, and so bits for each byte."""
    return not model.encoder_layers and model.attention.mask == "causal"
