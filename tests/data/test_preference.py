"""Preference pairs: what weighs, what is cut, and real HH-RLHF pairs to the end."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjax.core.errors import RunError
from llmjax.data.chat import EncodedChat, encode_prompt
from llmjax.data.loader import Shuffled, serve
from llmjax.data.preference import PairRows, common_prompt, preference_store, truncate

END = 256  # closes a turn in the toy tokenizer below; 257 begins a text


class Bytes:
    """A tokenizer of UTF-8 bytes, with two special tokens."""

    vocab_size, bos_id, eos_id = 258, 257, END
    bos_token, eos_token, hash = "<s>", "</s>", "bytes"
    chat_template = ("{% for m in messages %}{{ m.role[0] }}: {{ m.content }}"
                     "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
                     "{% if add_generation_prompt %}a: {% endif %}")

    def encode(self, text: str, *, specials: str = "text") -> list[int]:
        parts = text.split("</s>") if specials == "parse" else [text]
        return list(itertools.chain.from_iterable([*part.encode(), END] for part in parts))[:-1]


def text(ids) -> str:
    return bytes(i for i in ids if i < 256).decode() + "</s>" * (END in ids)


def make(tmp_path: Path, *values, name: str = "pairs.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, values)))
    return preference_store([path], Bytes(), tmp_path / "store")


def learnt(store, document: int) -> str:
    return text(store.tokens(document)[store.mask(document)])


ASK = {"role": "user", "content": "Why?"}
SAY = {"role": "assistant", "content": "So."}
NO = {"role": "assistant", "content": "No."}
TURNS = "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: Why?\n\nAssistant: "


@pytest.mark.parametrize("value, whole, chosen, rejected", [
    ({"prompt": [ASK], "chosen": [SAY], "rejected": [NO]}, "u: Why?\na: So.\n</s>", "So.</s>", "No.</s>"),
    ({"prompt": [ASK], "chosen": "So.", "rejected": "No."}, "u: Why?\na: So.\n</s>", "So.</s>", "No.</s>"),
    ({"chosen": [ASK, SAY, ASK, SAY], "rejected": [ASK, SAY, ASK, NO]},
     "u: Why?\na: So.\nu: Why?\na: So.\n</s>", "So.</s>", "No.</s>"),
    ({"chosen": TURNS + "So.", "rejected": TURNS + "No."},
     "u: Why?\na: So.\nu: Why?\na: So.\n</s>", "So.</s>", "No.</s>"),
    ({"prompt": "Why? ", "chosen": "So.", "rejected": "No."}, "Why? So.</s>", "So.</s>", "No.</s>"),
    ({"chosen": "Why? So be", "rejected": "Why? So it"}, "Why? So be</s>", " be</s>", " it</s>"),
])
def test_formats(tmp_path, value, whole, chosen, rejected):
    store = make(tmp_path, value)
    assert store.num_documents == 2
    assert text(store.tokens(0)) == whole
    assert (learnt(store, 0), learnt(store, 1)) == (chosen, rejected)


def test_both_sides_answer_the_prompt_that_generation_sees(tmp_path):
    store = make(tmp_path, {"prompt": [ASK, SAY, ASK], "chosen": [SAY], "rejected": [NO]})
    prompt = encode_prompt([ASK, SAY, ASK], Bytes())
    for document in range(2):
        assert store.tokens(document)[:len(prompt)].tolist() == prompt.tolist()
        assert store.mask(document).argmax() == len(prompt)


@settings(max_examples=200)
@given(left=st.text("ab ", max_size=12), right=st.text("ab ", max_size=12))
def test_common_prompt_is_common_and_leaves_answers(left, right):
    prompt = common_prompt(left, right)
    assert left.startswith(prompt) and right.startswith(prompt)
    assert not (left and right) or len(prompt) < min(len(left), len(right))
    for side in (left, right):
        assert not prompt or side[len(prompt)].isspace() or prompt[-1].isspace()


def make_side(prompt: int, answer: int, first: int) -> EncodedChat:
    tokens = np.concatenate([np.arange(prompt), first + np.arange(answer)])
    return EncodedChat(tokens, tokens >= 1000)


@settings(max_examples=200)
@given(prompt=st.integers(1, 30), chosen=st.integers(1, 30), rejected=st.integers(1, 30), room=st.integers(2, 40))
def test_truncation(prompt, chosen, rejected, room):
    sides = [make_side(prompt, chosen, 1000), make_side(prompt, rejected, 2000)]
    short = truncate(sides, num_tokens=room)
    prompts = [side.tokens[~side.mask].tolist() for side in short]
    assert prompts[0] == prompts[1] == list(range(prompt))[-len(prompts[0]):] and prompts[0]
    for side, whole in zip(short, sides, strict=True):
        answer = side.tokens[side.mask]
        assert len(side.tokens) <= room
        assert answer.tolist() == whole.tokens[whole.mask][:len(answer)].tolist() and len(answer)
        assert len(answer) == min(whole.mask.sum(), room - 1)  # an answer is cut only where a row cannot hold it
    if max(len(side.tokens) for side in sides) > room:
        assert max(len(side.tokens) for side in short) == room


def test_batches(tmp_path):
    values = [{"prompt": f"ask {i} ", "chosen": "yes " * i, "rejected": "no"} for i in range(1, 8)]
    store = make(tmp_path, *values)
    batch = PairRows(store, seq_len=24).read(np.arange(7))
    assert {name: (array.shape, str(array.dtype)) for name, array in batch.items()} == {
        "tokens_BPT": ((7, 2, 24), "int32"), "targets_BPT": ((7, 2, 24), "int32"),
        "positions_BPT": ((7, 2, 24), "int32"), "segment_ids_BPT": ((7, 2, 24), "int32"),
        "weights_BPT": ((7, 2, 24), "float32")}
    tokens = store.tokens(2)  # the chosen side of the second pair
    size = len(tokens) - 1
    assert batch["tokens_BPT"][1, 0].tolist() == [*tokens[:-1].tolist()] + [0] * (24 - size)
    assert batch["targets_BPT"][1, 0].tolist() == [*tokens[1:].tolist()] + [0] * (24 - size)
    assert batch["positions_BPT"][1, 0].tolist() == [*range(size)] + [0] * (24 - size)
    assert batch["segment_ids_BPT"][1, 0].tolist() == [1] * size + [0] * (24 - size)
    assert batch["weights_BPT"][1, 0].tolist() == [0] * 6 + [1] * (size - 6) + [0] * (24 - size)
    assert text(batch["targets_BPT"][1, 1][batch["weights_BPT"][1, 1] == 1]) == "no</s>"


def test_any_start_and_process_count_give_the_same_pairs(tmp_path):
    store = make(tmp_path, *({"prompt": f"ask {i} ", "chosen": "yes", "rejected": "no"} for i in range(7)))
    stream = Shuffled(PairRows(store, seq_len=24), batch_size=4, seed=3)
    whole = list(itertools.islice(serve(stream), 5))
    again = next(serve(stream, start_step=4))
    halves = [next(serve(stream, start_step=4, process_index=p, process_count=2)) for p in range(2)]
    for name in whole[4]:
        np.testing.assert_array_equal(again[name], whole[4][name])
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), whole[4][name])


def test_pairs_without_a_difference_are_counted_out(tmp_path, caplog):
    store = make(tmp_path, {"prompt": [ASK], "chosen": [SAY], "rejected": [SAY]},
                 {"prompt": [ASK], "chosen": [SAY], "rejected": [NO]})
    assert store.num_documents == 2
    assert "1 pairs left out" in caplog.text


@pytest.mark.parametrize("value, message", [
    ({"chosen": "a"}, "line 1: rejected is missing; it has chosen"),
    ({"chosen": "a", "rejected": 3}, 'line 1: messages is "a"; a list'),
    ({"chosen": [ASK, SAY], "rejected": [ASK, {"role": "assistant"}]}, r"line 1: messages\[1\].content is missing"),
])
def test_bad_lines_are_named(tmp_path, value, message):
    with pytest.raises(RunError, match=message):
        make(tmp_path, value)


def test_real_pairs(tmp_path):
    places = [os.environ.get("LLMJAX_DATA"), Path(__file__).parents[3] / "shared/data"]
    files = [Path(place) / "preference/hh_harmless_base_test.jsonl.gz" for place in places if place]
    found = [path for path in files if path.is_file()]
    if not found:
        pytest.skip("HH-RLHF is neither in $LLMJAX_DATA nor in ../shared/data")
    store = preference_store(found[:1], Bytes(), tmp_path / "store")
    assert 4500 < store.num_documents <= 2 * 2312
    rows = PairRows(store, seq_len=256)
    batch = rows.read(np.arange(len(rows)))
    assert (batch["weights_BPT"].sum(axis=2) > 0).all()
    prompt = np.argmax(batch["weights_BPT"], axis=2).min(axis=1)
    same = np.arange(256) < prompt[:, None]
    assert (batch["tokens_BPT"][:, 0][same] == batch["tokens_BPT"][:, 1][same]).all()
