"""Chat templates render as in `transformers`, and the loss falls on what the assistant says."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from llmjax.core.errors import RunError
from llmjax.data.chat import encode_chat, encode_prompt, render
from llmjax.data.examples import chat_store
from llmjax.data.loader import PackedRows, Shuffled, serve
from llmjax.data.pack import pack_plan
from llmjax.data.tokenizer import DEFAULT_CHAT_TEMPLATE, Tokenizer

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
INST = ("{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}"
        "{% endif %}{% endfor %}")
GENERATION = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
THINKING = CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")  # the prompt says more than the message
LAST_ONLY = ("{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}"
             "{% endfor %}")

CHAT = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": " four \u00e9"},
        {"role": "user", "content": "four"}, {"role": "assistant", "content": "five"}]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A byte-level tokenizer as `transformers` has it, with a few merges that cross spaces and letters."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("f", "i"), ("fi", "v"), ("\u0120", "f"), ("o", "u"), ("ou", "r")]
    pieces = [*alphabet, *("".join(merge) for merge in merges)]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


def load(hugging_face, template: str) -> Tokenizer:
    folder, _ = hugging_face
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    return Tokenizer.load(folder)


def said(chat, tokenizer) -> list[str]:
    """The runs of learnt tokens as text, special tokens included."""
    names = {tokenizer.eos_id: "</s>"} | {tokenizer.encode(t, specials="parse")[0]: t for t in ("<|im_end|>",)}
    runs = []
    for learnt, group in itertools.groupby(zip(chat.tokens.tolist(), chat.mask.tolist(), strict=True), lambda x: x[1]):
        if learnt:
            ids = [token for token, _ in group]
            tail = "".join(names[i] for i in ids if i in names)
            runs.append(tokenizer.decode([i for i in ids if i not in names]) + tail)
    return runs


@pytest.mark.parametrize("template", [CHATML, INST, GENERATION, THINKING, LAST_ONLY, DEFAULT_CHAT_TEMPLATE])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", [CHAT, CHAT[:1], CHAT[:3]])
def test_renders_like_transformers(hugging_face, template, prompt, chat):
    tokenizer = load(hugging_face, template)
    wanted = hugging_face[1].apply_chat_template(chat, chat_template=template, tokenize=False,
                                                 add_generation_prompt=prompt)
    assert render(chat, tokenizer, add_generation_prompt=prompt) == wanted


@pytest.mark.parametrize("template, wanted", [
    (CHATML, [" four \u00e9<|im_end|>", "five<|im_end|>"]),
    (GENERATION, [" four \u00e9<|im_end|>", "five<|im_end|>"]),
    (THINKING, [" four \u00e9<|im_end|>", "five<|im_end|>"]),
    (INST, [" four \u00e9</s>", " five</s>"]),
    (DEFAULT_CHAT_TEMPLATE, [" four \u00e9</s>", "five</s>"]),
    ("{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant> "
     "{% endif %}", [" four \u00e9\n", "five\n"]),
])
def test_loss_on_what_the_assistant_says(hugging_face, template, wanted):
    tokenizer = load(hugging_face, template)
    chat = encode_chat(CHAT, tokenizer)
    assert said(chat, tokenizer) == wanted
    assert said(encode_chat(CHAT, tokenizer, learn_from=2), tokenizer) == wanted[1:]


def test_tokens_and_mask_equal_transformers_between_special_tokens(hugging_face):
    """Its mask comes from the same generation blocks; its tokens from the whole text, ours from pieces of it."""
    chat = [CHAT[0], {"role": "assistant", "content": "five"}, CHAT[2], CHAT[3]]
    wanted = hugging_face[1].apply_chat_template(chat, chat_template=GENERATION, tokenize=True, return_dict=True,
                                                 return_assistant_tokens_mask=True)
    got = encode_chat(chat, load(hugging_face, GENERATION))
    assert got.tokens.tolist() == wanted["input_ids"]
    assert got.mask.astype(int).tolist() == wanted["assistant_masks"]


@pytest.mark.parametrize("template", [CHATML, INST, GENERATION, DEFAULT_CHAT_TEMPLATE])
def test_a_prompt_is_a_prefix_of_what_was_trained(hugging_face, template):
    tokenizer = load(hugging_face, template)
    whole = encode_chat(CHAT, tokenizer)
    for turn in (1, 3):
        prompt = encode_prompt(CHAT[:turn], tokenizer)
        assert whole.tokens[:len(prompt)].tolist() == prompt.tolist()
        assert whole.mask[len(prompt)] and not whole.mask[len(prompt) - 1]


def test_prompts_of_templates_that_rewrite_history_are_the_whole_text(hugging_face):
    tokenizer = load(hugging_face, LAST_ONLY)
    wanted = hugging_face[1].apply_chat_template(CHAT, chat_template=LAST_ONLY, add_generation_prompt=True,
                                                 return_dict=False)
    assert encode_prompt(CHAT, tokenizer).tolist() == wanted
    with pytest.raises(ValueError, match="{% generation %}"):
        encode_chat(CHAT, tokenizer)


def test_templates_cannot_reach_out(hugging_face):
    for template in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(ValueError, match="does not take these messages"):
            render(CHAT, load(hugging_face, template))


def test_template_says_what_it_refuses(hugging_face):
    with pytest.raises(ValueError, match="roles must alternate"):
        render(CHAT[1:], load(hugging_face, INST))


def test_helpers_of_templates_in_the_wild(hugging_face):
    template = "{{ {'a': '<\u00e9>'} | tojson }}{{ strftime_now('%Y') | length }}"
    template += "{% for i in [1, 2] %}{% break %}{% endfor %}"
    assert render(CHAT, load(hugging_face, template)) == '{"a": "<\u00e9>"}4'


def write(path: Path, *values) -> Path:
    text = "\n".join(value if isinstance(value, str) else json.dumps(value) for value in values) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.jsonl.gz"])
def test_examples_to_batches(hugging_face, tmp_path, name):
    tokenizer = load(hugging_face, DEFAULT_CHAT_TEMPLATE)
    path = write(tmp_path / name, {"messages": CHAT}, "", {"prompt": "ask", "completion": "tell"},
                 {"prompt": CHAT[:1], "completion": CHAT[1:2]}, {"messages": CHAT[:1]})
    store = chat_store([path], tokenizer, tmp_path / "store")
    assert store.num_documents == 3
    plain = [tokenizer.bos_id, *tokenizer.encode("ask"), *tokenizer.encode("tell"), tokenizer.eos_id]
    assert store.tokens(1).tolist() == plain
    assert store.mask(1).tolist() == [False] * 4 + [True] * (len(plain) - 4)
    assert said(encode_chat(CHAT[:2], tokenizer), tokenizer) == [" four \u00e9</s>"]
    plan = pack_plan(store.lengths, seq_len=128, seed=0, method="best_fit")
    batch = next(serve(Shuffled(PackedRows(store, plan), batch_size=plan.num_rows, seed=0)))
    learnt = sum(int(store.mask(i)[1:].sum()) for i in range(3))
    assert batch["weights_BT"].sum() == learnt
    targets = batch["targets_BT"][batch["weights_BT"] == 1]
    assert sorted(targets) == sorted(np.concatenate([store.tokens(i)[1:][store.mask(i)[1:]] for i in range(3)]))


def test_the_store_is_kept_until_its_sources_change(hugging_face, tmp_path):
    tokenizer = load(hugging_face, DEFAULT_CHAT_TEMPLATE)
    path = write(tmp_path / "chat.jsonl", {"messages": CHAT})
    made = [chat_store([path], tokenizer, tmp_path / "store").folder.stat().st_ino for _ in range(2)]
    assert made[0] == made[1]
    write(path, {"messages": CHAT}, {"messages": CHAT[:2]})
    assert chat_store([path], tokenizer, tmp_path / "store").num_documents == 2
    other = load(hugging_face, CHATML)
    assert said(encode_chat(CHAT, other), other)[0].endswith("<|im_end|>")
    assert chat_store([path], other, tmp_path / "store").tokens(0).tolist() == encode_chat(CHAT, other).tokens.tolist()


@pytest.mark.parametrize("value, message", [
    ("{", "line 2: not JSON"),
    ("[1]", "line 2: a JSON list, an object is needed"),
    ({"text": "a"}, "line 2: neither messages nor prompt and completion; it has text"),
    ({"messages": []}, r"line 2: messages is \[\]"),
    ({"messages": [{"role": "user"}]}, r"line 2: messages\[0\].content is missing"),
    ({"messages": [{"role": "user", "content": 3}]}, r"line 2: messages\[0\].content is 3; a string"),
    ({"prompt": "a", "completion": 3}, "line 2: messages is \"a\"; a list"),
])
def test_bad_lines_are_named(hugging_face, tmp_path, value, message):
    path = write(tmp_path / "chat.jsonl", {"messages": CHAT}, value)
    with pytest.raises(RunError, match=message) as error:
        chat_store([path], load(hugging_face, CHATML), tmp_path / "store")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_broken_files(hugging_face, tmp_path):
    tokenizer = load(hugging_face, CHATML)
    with pytest.raises(RunError, match="none.jsonl cannot be read: No such file"):
        chat_store([tmp_path / "none.jsonl"], tokenizer, tmp_path / "store")
    path = write(tmp_path / "cut.jsonl.gz", {"messages": CHAT})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunError, match="cut.jsonl.gz cannot be read"):
        chat_store([path], tokenizer, tmp_path / "store")
