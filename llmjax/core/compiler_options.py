"""Options of the compiler that a config may name."""

from __future__ import annotations

from llmjax.core.errors import ConfigError

FIELD = "train.compiler_options"


def parse(text: str) -> dict[str, str]:
    """"name=value,name=value" by name; ConfigError where one is no such pair."""
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    if wrong := next((name for name, equals, value in pairs if not (name and equals and value)), None):
        raise ConfigError(f"{FIELD}={text!r}: {wrong!r} is no name=value, such as xla_enable_async_all_gather=true")
    return {name: value for name, _, value in pairs}
