"""Which values of the optimiser's section fit, by themselves and with the model's."""

from __future__ import annotations

from llmjax.core.errors import ConfigError
from llmjax.core.roles import WIDTH_POWERS
from llmjax.core.sections import Config

AT_LEAST: dict[str, float] = {
    "optim.learning_rate": 0, "optim.adam_learning_rate": 0, "optim.warmup_steps": 0, "optim.warmup_start": 0,
    "optim.schedule_steps": 0, "optim.noise_tokens": 0, "optim.decay_fraction": 0, "optim.end_fraction": 0,
    "optim.b1": 0, "optim.b2": 0, "optim.eps": 0, "optim.weight_decay": 0, "optim.clip_norm": 0,
    "optim.muon_momentum": 0, "optim.ema_decay": 0,
}  # fmt: skip
AT_MOST: dict[str, float] = {
    "optim.warmup_start": 1, "optim.decay_fraction": 1, "optim.end_fraction": 1, "optim.b1": 1, "optim.b2": 1,
    "optim.muon_momentum": 1, "optim.ema_decay": 1,
}  # fmt: skip


def check_optimizer(config: Config) -> None:
    """Raise ConfigError for an optimiser that the model's parametrisation or the evaluation does not fit."""
    if config.model.mup.base_width and config.optim.name not in WIDTH_POWERS:
        raise ConfigError(f"optim.name={config.optim.name!r}: with model.mup.base_width={config.model.mup.base_width} "
                          f"one of {', '.join(map(repr, WIDTH_POWERS))} fits")
    if config.eval.weights == "average" and not config.optim.ema_decay:
        raise ConfigError("eval.weights='average': without optim.ema_decay 'last' fits")
    if config.guard.early_stop and not config.eval.every:
        raise ConfigError(f"guard.early_stop={config.guard.early_stop}: it needs held-out losses on the way; set "
                          "eval.every")


def check_batch_rules(config: Config) -> None:
    """Raise ConfigError for a stage whose rule needs to know the gradient's noise."""
    for place, stage in enumerate(config.stages):
        if stage.batch_rule == "surge" and not config.optim.noise_tokens:
            raise ConfigError(f"stages.{place}.batch_rule='surge': without optim.noise_tokens 'sqrt' fits")
