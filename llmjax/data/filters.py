"""From the curation section of a config to the stages that look at one document at a time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmjax.core.errors import ConfigError
from llmjax.core.sections import CurationConfig
from llmjax.data.registry import Source
from llmjax.data.stage import Stage, with_reasons

if TYPE_CHECKING:
    import pyarrow as pa


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
        yield from _rules(config)
    if config.perplexity_model:
        from llmjax.data.scoring import Perplexity

        yield Perplexity(config.perplexity_model, config.max_perplexity)
    if config.toxicity:
        from llmjax.data.scoring import Toxicity

        yield Toxicity(config.toxicity, config.max_toxicity)
    if config.quality_model:
        from llmjax.data.scoring import Quality

        yield Quality(config.quality_model)
    if config.pii != "keep":
        from llmjax.data.pii import PersonalData

        yield PersonalData(config.pii)


@dataclasses.dataclass(frozen=True)
class OptOut:
    """Drops documents whose id or address is on a source's list of those who opted out."""

    listed: frozenset[str] = dataclasses.field(repr=False)
    name: str = "opt_out"

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Adds no column; sets `reason` to opted_out."""
        columns = documents["id"].to_pylist(), documents["url"].to_pylist()
        return with_reasons(documents, [
            "opted_out" if {id_, url} & self.listed else None for id_, url in zip(*columns, strict=True)])  # fmt: skip


def of_source(source: Source) -> tuple[Stage, ...]:
    """What a source's registration asks for beside what the config does."""
    opt_out: tuple[Stage, ...] = (OptOut(source.opted_out),) if source.opted_out else ()
    if source.pii not in ("redact", "drop"):
        return opt_out
    from llmjax.data.pii import PersonalData

    return (*opt_out, PersonalData("drop" if source.pii == "drop" else "redact"))


def _rules(config: CurationConfig) -> Iterator[Stage]:
    """Neighbouring rule sets as one stage, so that they share the words; C4 stands alone, it rewrites texts."""
    from llmjax.data.quality import C4, RULES, Rules

    for name in names(config.rules):
        if name not in (*RULES, "c4"):
            raise ConfigError(f"data.curation.rules={config.rules!r}: {name!r} is none of {', '.join(RULES)}, c4")
    for is_c4, group in itertools.groupby(names(config.rules), "c4".__eq__):
        if is_c4:
            yield C4()
        else:
            yield Rules(tuple(RULES[name] for name in group))
