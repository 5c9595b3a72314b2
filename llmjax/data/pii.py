"""Personal data and secrets: found by their shape and their check digits, and replaced by what they are.

E-mail and IP addresses, phone and bank account numbers, payment cards, social security numbers; private keys, tokens of
well-known services, passwords in addresses and assignments. Each pattern only runs on a text that holds what no match
can do without, so clean text costs little. Left out: names and postal addresses, which need a model.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from llmjax.data.stage import with_column, with_reasons

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["email", "ip", "phone", "iban", "card", "ssn", "secret"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A stretch [start, stop) of a text."""

    kind: Kind
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class _Pattern:
    kind: Kind
    needs: tuple[str, ...]  # strings of which a text with a match holds one
    regex: re.Pattern[str]
    check: Callable[[str], bool] = lambda found: True


@dataclasses.dataclass(frozen=True)
class PersonalData:
    """Redacts what is found, or drops texts that hold any; counts it in `pii`."""

    action: Literal["redact", "drop"] = "redact"
    name: str = "pii"

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Adds `pii`, the number of findings; rewrites `text` or sets `reason` to pii."""
        import pyarrow as pa

        texts = documents["text"].to_pylist()
        found = [find(text) for text in texts]
        documents = with_column(documents, "pii", pa.array(map(len, found), pa.int64()))
        if self.action == "drop":
            return with_reasons(documents, ["pii" if findings else None for findings in found])
        redacted = [redact(text, findings) for text, findings in zip(texts, found, strict=True)]
        return with_column(documents, "text", pa.array(redacted, pa.string()))


def find(text: str) -> list[Finding]:
    """What a text holds, in order; where two overlap, the one that begins first, then the longer."""
    found = sorted(_candidates(text), key=lambda finding: (finding.start, -finding.stop))
    kept: list[Finding] = []
    for finding in found:
        if not kept or finding.start >= kept[-1].stop:
            kept.append(finding)
    return kept


def redact(text: str, findings: Sequence[Finding]) -> str:
    """`text` with each finding as <KIND>; redacting twice changes nothing."""
    parts, at = [], 0
    for finding in findings:
        parts += [text[at:finding.start], f"<{finding.kind.upper()}>"]
        at = finding.stop
    return "".join([*parts, text[at:]])


def _candidates(text: str) -> Iterator[Finding]:
    for pattern in _patterns():
        if any(needed in text for needed in pattern.needs):
            for match in pattern.regex.finditer(text):
                if pattern.check(match[1]):
                    yield Finding(pattern.kind, match.start(1), match.end(1))


def _is_public_ip(found: str) -> bool:
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


def _has_luhn_digit(found: str) -> bool:
    digits = [int(c) for c in reversed(found) if c.isdigit()]
    doubled = [d if i % 2 == 0 else 2 * d - 9 * (d > 4) for i, d in enumerate(digits)]
    return len(digits) >= 13 and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def _is_iban(found: str) -> bool:
    """Whether the number modulo 97 is 1, letters counting from 10 (ISO 7064)."""
    packed = found.replace(" ", "")
    return 15 <= len(packed) <= 34 and int("".join(str(int(c, 36)) for c in packed[4:] + packed[:4])) % 97 == 1


def _is_phone(found: str) -> bool:
    return 9 <= sum(c.isdigit() for c in found) <= 15


def _is_random(found: str) -> bool:
    """Whether a value of an assignment looks drawn, not written: an example or a name is no secret."""
    kinds = (any(map(test, found)) for test in (str.islower, str.isupper, str.isdigit))
    return sum(kinds) >= 2 and len(set(found)) >= 8


@functools.cache
def _patterns() -> tuple[_Pattern, ...]:
    def pattern(kind: Kind, needs: str, regex: str, check: Callable[[str], bool] = lambda found: True) -> _Pattern:
        return _Pattern(kind, tuple(needs.split()), re.compile(regex), check)

    return (
        pattern("email", "@", r"(?<![\w.+%-])([A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@"
                              r"(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24})(?![\w@-])"),
        pattern("ip", ".", r"(?<![\w.])((?:\d{1,3}\.){3}\d{1,3})(?!\.?\w)", _is_public_ip),
        pattern("ip", ":", r"(?<![\w:.])([0-9A-Fa-f]{1,4}(?::{1,2}[0-9A-Fa-f]{1,4}){2,7})(?![\w:.])", _is_public_ip),
        pattern("phone", "+", r"(?<![\w.+])(\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4})"
                              r"(?![\w-])", _is_phone),
        pattern("phone", "( - .", r"(?<![\w.(-])(\([2-9]\d{2}\) ?[2-9]\d{2}[-.]\d{4}"
                                  r"|[2-9]\d{2}[-.][2-9]\d{2}[-.]\d{4})(?![\w.-]*\w)"),
        pattern("ssn", "-", r"(?<![\w-])((?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4})(?![\w-])"),
        pattern("iban", "0 1 2 3 4 5 6 7 8 9", r"\b([A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?)\b",
                _is_iban),
        pattern("card", "0 1 2 3 4 5 6 7 8 9", r"(?<![\w.-])([3-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,7})(?![\w-])",
                _has_luhn_digit),
        pattern("secret", "PRIVATE", r"(-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----[\s\S]{0,20000}?"
                                     r"-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----)"),
        pattern("secret", "AKIA ASIA", r"\b((?:AKIA|ASIA)[0-9A-Z]{16})\b"),
        pattern("secret", "ghp_ gho_ ghs_ ghu_ github_pat_", r"\b(gh[posu]_[A-Za-z0-9]{36,}|github_pat_\w{22,})\b"),
        pattern("secret", "xox", r"\b(xox[abprs]-[A-Za-z0-9-]{10,})"),
        pattern("secret", "sk- sk_live_ rk_live_", r"\b(sk-[A-Za-z0-9_-]{20,}|[sr]k_live_[A-Za-z0-9]{16,})"),
        pattern("secret", "AIza", r"\b(AIza[0-9A-Za-z_-]{35})"),
        pattern("secret", "hf_", r"\b(hf_[A-Za-z0-9]{30,})\b"),
        pattern("secret", "eyJ", r"\b(eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})"),
        pattern("secret", "://", r"[a-z][a-z0-9+.-]{1,20}://[^\s:/@]{1,64}:([^\s:/@<>]{3,64})@"),
        pattern("secret", "key KEY token TOKEN secret SECRET passw PASSW",
                r"(?i)(?:api_?key|access_?key|secret|token|passw(?:or)?d)[\"']?\s{0,3}[:=]\s{0,3}"
                r"[\"']([^\s\"'<>]{12,128})[\"']", _is_random),
    )  # fmt: skip
