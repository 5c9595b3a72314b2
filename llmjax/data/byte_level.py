"""Byte-level BPE in its two notations: ranks of byte strings (tiktoken) and merges of printable pieces (`tokenizers`).

tiktoken joins any neighbours that spell a token, lowest rank first; `tokenizers` joins the pairs it lists, first one
first. The two agree on every text when each token's bytes, joined by ranks, meet in a pair that is listed, in the same
order: what happens inside a stretch of text that becomes a token does not depend on what stands around it.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax.core.errors import RunError

if TYPE_CHECKING:
    import tiktoken

# How text is cut before pieces are joined. Ours has no look-around and no counted repeats, so tiktoken's engine runs it
# in linear time, faster than the two below: a line break takes the punctuation before it and the indentation and word
# after it, as in `):\n    return`.
_PUNCTUATION, _LETTER = r"[^\s\p{L}\p{M}\p{N}]", r"[\p{L}\p{M}]"
WORD_PATTERN = (
    rf"(?:{_PUNCTUATION}*\n[ \t]*)+{_LETTER}*| ?{_PUNCTUATION}?{_LETTER}+| ?\p{{N}}{{1,3}}| ?{_PUNCTUATION}+|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SAME_IN_BOTH = {WORD_PATTERN, GPT2_PATTERN, LLAMA3_PATTERN}  # cut alike by both libraries' regular expressions
END_OF_TEXT = "<|endoftext|>"


@functools.cache
def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(256, 512))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_characters())}


def to_bytes(piece: str) -> bytes:
    """The bytes of a piece of a byte-level vocabulary."""
    table = _bytes_of_characters()
    return bytes(table[character] for character in piece)


def to_piece(raw: bytes) -> str:
    """The piece of a byte-level vocabulary that stands for these bytes."""
    return "".join(byte_characters()[byte] for byte in raw)


def last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts in which joining by ranks leaves `token` before its own rank; None where it leaves more."""
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        found = [ranks.get(a + b, limit) for a, b in zip(parts, parts[1:], strict=False)]
        at = min(range(len(found)), key=found.__getitem__)
        if found[at] >= limit:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1])


def definition(ranks: Mapping[bytes, int], *, pattern: str, specials: Mapping[str, int],
               ignore_merges: bool = True) -> dict[str, Any]:  # fmt: skip
    """The content of the `tokenizer.json` that gives tiktoken's ids; `ignore_merges` looks up whole words first."""
    by_rank = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    pairs = [pair for token in by_rank if (pair := last_pair(token, ranks))]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(content, index) for content, index in specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges,
            "vocab": dict(specials) | {to_piece(token): rank for token, rank in ranks.items()},
            "merges": [[to_piece(a), to_piece(b)] for a, b in pairs]},
    }  # fmt: skip


def _special(content: str, index: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **flags}


def read_tiktoken(file: Path) -> dict[str, Any]:
    """A `.tiktoken` file (lines of a base64 token and its rank) cut as Llama 3 cuts, with an end-of-text token."""
    try:
        lines = (line.split() for line in file.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise RunError(f"{file}: not lines of a base64 token and its rank ({error})") from None
    return definition(ranks, pattern=LLAMA3_PATTERN, specials={END_OF_TEXT: 1 + max(ranks.values())})


def named_tiktoken(name: str) -> dict[str, Any]:
    """An encoding that tiktoken knows by name, which it fetches when it has not yet."""
    import tiktoken

    encoding = tiktoken.get_encoding(name)
    return definition(encoding._mergeable_ranks, pattern=encoding._pat_str, specials=encoding._special_tokens)


def as_tiktoken(content: Mapping[str, Any]) -> tiktoken.Encoding | None:
    """The encoding that gives the ids of a `tokenizer.json`, several times as fast; None where they could differ."""
    import tiktoken

    pattern = _pattern(content)
    added = content.get("added_tokens") or []
    if pattern not in SAME_IN_BOTH or content.get("normalizer") or not all(token["special"] for token in added):
        return None
    specials = {token["content"]: token["id"] for token in added}
    model = content["model"]
    ranks = {to_bytes(piece): rank for piece, rank in model["vocab"].items() if piece not in specials}
    if not _joins_alike(model, ranks):
        return None
    return tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


def _pattern(content: Mapping[str, Any]) -> str | None:
    """The regular expression by which a byte-level `tokenizer.json` cuts, None for one of another kind."""
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if steps[0]["use_regex"] else None
    split, byte_level = steps if len(steps) == 2 else ({}, {"use_regex": True})
    plain = split.get("behavior") == "Isolated" and not split["invert"] and not byte_level["use_regex"]
    return split["pattern"].get("Regex") if plain else None


def _joins_alike(model: Mapping[str, Any], ranks: Mapping[bytes, int]) -> bool:
    """Whether a BPE model's merges do what joining by ranks does (see the top of this file)."""
    if model["type"] != "BPE" or model.get("dropout") or len([t for t in ranks if len(t) == 1]) != 256:
        return False
    order: dict[tuple[bytes, bytes], int] = {}
    for place, merge in enumerate(model["merges"]):
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        order[to_bytes(a), to_bytes(b)] = place
    places = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        pair = last_pair(token, ranks)
        if pair is None and model.get("ignore_merges"):
            continue  # only ever a whole word, which both look up first
        if pair not in order:
            return False
        places.append(order[pair])
    return places == sorted(places)
