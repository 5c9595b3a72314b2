"""Options of the compiler that a config may name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from llmjax.core.errors import ConfigError

FIELD = "train.compiler_options"


def parse(text: str) -> dict[str, str]:
    """"name=value,name=value" by name; ConfigError where one is no such pair."""
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    if wrong := next((name for name, equals, value in pairs if not (name and equals and value)), None):
        raise ConfigError(f"{FIELD}={text!r}: {wrong!r} is no name=value, such as xla_enable_async_all_gather=true")
    return {name: value for name, _, value in pairs}


@contextlib.contextmanager
def refusals_explained(text: str) -> Iterator[None]:
    """Within it, an error of the compiler's that names one of these options is a ConfigError."""
    try:
        yield
    except RuntimeError as error:  # jax's own derives from it
        said = " ".join(str(error).split())
        if named := [name for name in parse(text) if name in said]:
            raise ConfigError(f"{FIELD}: {named[0]} is refused, the TPU compiler says {said[:300]}") from error
        raise
