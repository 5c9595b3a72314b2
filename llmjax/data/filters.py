"""From the curation section of a config to the stages that look at one document at a time."""

from __future__ import annotations

from collections.abc import Iterator

from llmjax.core.errors import ConfigError
from llmjax.core.sections import CurationConfig
from llmjax.data.stage import Stage


def filters(config: CurationConfig) -> tuple[Stage, ...]:
    """The stages that a config asks for, in order. Raises ConfigError for a rule set that there is not."""
    return tuple(_filters(config))


def names(value: str) -> list[str]:
    """The members of a comma-separated field."""
    return [name.strip() for name in value.split(",") if name.strip()]


def _filters(config: CurationConfig) -> Iterator[Stage]:
    if config.languages:
        from llmjax.data.language import Language

        yield Language(tuple(names(config.languages)), config.min_language_confidence)
    if config.rules:
        from llmjax.data.quality import RULES

        for name in names(config.rules):
            if name not in RULES:
                raise ConfigError(f"data.curation.rules={config.rules!r}: {name!r} is none of {', '.join(RULES)}")
            yield RULES[name]
    if config.pii != "keep":
        from llmjax.data.pii import PersonalData

        yield PersonalData(config.pii)
