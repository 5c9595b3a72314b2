"""Pairs of a chosen and a rejected answer to one prompt, as padded batches for preference optimisation.

A line of JSON holds `chosen` and `rejected`, as texts or lists of messages, with the `prompt` beside them or as their
common beginning. Texts written as "\\n\\nHuman: ...\\n\\nAssistant: ..." (HH-RLHF) are read as messages. Only what the
assistant says after the common prompt weighs.

Too long for a row: both answers lose their end, to a row at most; then the prompt loses its beginning, by the same
number of tokens on both sides, so that the two are still answers to one prompt.

Shape letters: B pairs, P = 2 (chosen, rejected), T positions.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmjax.data.chat import EncodedChat, check_messages, encode_chat
from llmjax.data.examples import Line, cached_store, encode_completion, example_id, read_lines
from llmjax.data.loader import Batch
from llmjax.data.shards import Document, TokenStore

if TYPE_CHECKING:
    from llmjax.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def preference_store(paths: Sequence[Path], tokenizer: Tokenizer, folder: Path) -> TokenStore:
    """The pairs of `paths` as a masked store in `folder`: document 2 i is chosen, 2 i + 1 rejected.

    Built again only when the files or the tokenizer changed. Pairs without a difference are left out, and counted.
    """
    return cached_store(folder, paths, tokenizer, lambda: _documents(paths, tokenizer))


class PairRows:
    """The pairs of a store, truncated and padded to `seq_len` predictions.

    int32 tokens_BPT, targets_BPT, positions_BPT, segment_ids_BPT (1, and 0 on padding), float32 weights_BPT.
    """

    def __init__(self, store: TokenStore, *, seq_len: int):
        self._store, self._seq_len = store, seq_len

    def __len__(self) -> int:
        return self._store.num_documents // 2

    def read(self, rows: np.ndarray) -> Batch:
        """The batch of these pairs, (B,) pair numbers."""
        shape = (len(rows), 2, self._seq_len)
        names = ("tokens_BPT", "targets_BPT", "positions_BPT", "segment_ids_BPT")
        batch = {name: np.zeros(shape, np.int32) for name in names} | {"weights_BPT": np.zeros(shape, np.float32)}
        for place, pair in enumerate(rows.tolist()):
            sides = [EncodedChat(self._store.tokens(2 * pair + p), self._store.mask(2 * pair + p)) for p in range(2)]
            for p, side in enumerate(truncate(sides, num_tokens=self._seq_len + 1)):
                at, size = (place, p), len(side.tokens) - 1
                batch["tokens_BPT"][at][:size] = side.tokens[:-1]
                batch["targets_BPT"][at][:size] = side.tokens[1:]
                batch["positions_BPT"][at][:size] = np.arange(size)
                batch["segment_ids_BPT"][at][:size] = 1
                batch["weights_BPT"][at][:size] = side.mask[1:]
        return batch


def truncate(sides: Sequence[EncodedChat], *, num_tokens: int) -> list[EncodedChat]:
    """Both sides in at most `num_tokens` (2 or more) tokens: answers lose their end, then the prompt its beginning."""
    prompt = min(int(np.argmax(side.mask)) for side in sides)
    answer = min(max(len(side.tokens) for side in sides) - prompt, num_tokens - 1)  # one token of prompt stays
    window = slice(max(0, prompt + answer - num_tokens), prompt + answer)
    return [EncodedChat(side.tokens[window], side.mask[window]) for side in sides]


def encode_pair(line: Line, tokenizer: Tokenizer) -> list[EncodedChat]:
    """Chosen and rejected as tokens, the masks on what follows their common prompt."""
    value = line.value
    if missing := [side for side in SIDES if side not in value]:
        raise line.error(f"{missing[0]} is missing; it has {', '.join(value) or 'no fields'}")
    try:
        if "prompt" in value:
            return [encode_completion(value["prompt"], _as_answer(value["prompt"], value[side]), tokenizer)
                    for side in SIDES]
        answers = [_as_messages(value[side]) for side in SIDES]
        if all(isinstance(answer, str) for answer in answers):
            prompt = common_prompt(*answers)
            return [encode_completion(prompt, answer[len(prompt):], tokenizer) for answer in answers]
        for answer in answers:
            check_messages(answer)
        num_common = sum(1 for _ in _common(*answers))
        return [encode_chat(answer, tokenizer, learn_from=num_common) for answer in answers]
    except ValueError as error:
        raise line.error(error) from error


def common_prompt(chosen: str, rejected: str) -> str:
    """The common beginning of two texts, up to the last border of words."""
    common = os.path.commonprefix([chosen, rejected])
    if len(common) in (len(chosen), len(rejected)):  # one goes on where the other ends: leave both an answer
        common = common[:-1]
    return re.sub(r"\s*\S*$", "", common, count=1)


def _common(chosen: list[Any], rejected: list[Any]) -> Iterator[Any]:
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            return
        yield left


def _as_answer(prompt: Any, answer: Any) -> Any:
    """A text that answers messages is what the assistant says."""
    said = isinstance(prompt, list) and isinstance(answer, str)
    return [{"role": "assistant", "content": answer}] if said else answer


def _as_messages(text: Any) -> Any:
    """Messages of a "Human: ... Assistant: ..." transcript; anything else as it is."""
    if not isinstance(text, str) or not _TURN.match(text):
        return text
    _, *turns = _TURN.split(text)
    return [{"role": _ROLES[speaker], "content": content.strip()}
            for speaker, content in zip(turns[::2], turns[1::2], strict=True)]


def _documents(paths: Sequence[Path], tokenizer: Tokenizer) -> Iterator[Document]:
    skipped = 0
    for line in read_lines(paths):
        sides = encode_pair(line, tokenizer)
        if np.array_equal(sides[0].tokens, sides[1].tokens) or not all(side.mask.any() for side in sides):
            skipped += 1
            continue
        for name, side in zip(SIDES, sides, strict=True):
            yield Document(example_id(line, name), side.tokens, side.mask)
    if skipped:
        _log.warning("%d pairs left out: chosen and rejected are the same, or one of them does not answer", skipped)
