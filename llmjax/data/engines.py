"""The engines by name: `embedded[:WORKERS]`, `spark[:MASTER]`, `ray[:ADDRESS][,DEVICE=N...]`, opened and closed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

from llmjax.core.errors import ConfigError
from llmjax.data.embedded import Embedded
from llmjax.data.stage import Engine, EngineName


@contextmanager
def open_engine(spec: str) -> Iterator[Engine]:
    """The engine that `--engine` names; ConfigError for an unknown one, RunError where its libraries are missing."""
    name, _, address = spec.partition(":")
    if name == "embedded":
        yield Embedded(int(address) if address.isdecimal() else 1)
    elif name == "spark":
        from llmjax.data.engine_spark import SparkEngine

        with SparkEngine(address) as spark:
            yield spark
    elif name == "ray":
        from llmjax.data.engine_ray import open_ray

        with open_ray(address) as ray:
            yield ray
    else:
        raise ConfigError(f"--engine={spec}: no such engine; there are {', '.join(get_args(EngineName))}, each with an "
                          "address behind a colon where it needs one, as in spark:local[4,4]")
