"""The harness' LM interface: encodings, windows and stops by their rules, and whole tasks from local files."""

import dataclasses
import json
import math

import numpy as np
import pytest

from llmjax.core.errors import ConfigError, RunError
from llmjax.core.sections import TokenizerConfig
from llmjax.data.tokenizer import train_tokenizer
from tests.evals.tiny import CONFIG, brute_force, tiny_model

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the [eval] extra)")

from lm_eval.api.instance import Instance

from llmjax.evals import harness

TEXT = "The cat sat on the mat, and the dog sat on the cat. " * 3

TASK_FILES = {
    "choice.yaml": """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "rolling.yaml": """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: word_perplexity}}]
""",
    "generate.yaml": """
task: tiny_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}} "
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([TEXT], TokenizerConfig(vocab_size=290), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def lm(tokenizer):
    model, params = tiny_model(dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size))
    return harness.HarnessLM(model, params, tokenizer, begin_ids=[tokenizer.bos_id])


def write_tasks(folder):
    """Three task files and their data; returns the files."""
    documents = [{"question": f"Where did number {i} sit?" * (1 + 3 * i), "text": TEXT[i:] * (1 + i % 3),
                  "choices": ["on the mat", " on the cat", "nowhere at all"], "answer": i % 3} for i in range(6)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents))
    for name, content in TASK_FILES.items():
        (folder / name).write_text(content.format(data=data))
    return [str(folder / name) for name in TASK_FILES]


def request(*args):
    return Instance(request_type="loglikelihood", doc={}, arguments=args, idx=0)


def span_logprob(lm, context: list[int], continuation: list[int]) -> float:
    """Log-probability of a continuation, by a forward pass over all of it."""
    ids = np.array(context + continuation)
    logprobs = brute_force(lm.model, lm.params, ids)
    return float(sum(logprobs[i - 1, ids[i]] for i in range(len(context), len(ids))))


def test_a_space_after_the_context_goes_to_the_continuation(lm):
    whole, context = lm.tok_encode("The cat sat"), lm.tok_encode("The cat")
    assert context[0] == lm.tokenizer.bos_id
    for given, asked in [("The cat ", "sat"), ("The cat", " sat")]:
        (logprob, _), = lm.loglikelihood([request(given, asked)])
        assert logprob == pytest.approx(span_logprob(lm, context, whole[len(context):]), abs=1e-4)


def test_without_context_the_begin_token_stands_before(lm):
    (logprob, _), = lm.loglikelihood([request("", "The cat")])
    assert logprob == pytest.approx(span_logprob(lm, [lm.tokenizer.bos_id], lm.tokenizer.encode("The cat")), abs=1e-4)


def test_a_long_context_loses_its_start(lm):
    context = (TEXT * 3).rstrip()
    (logprob, _), = lm.loglikelihood([request(context, " dog")])
    whole, before = lm.tok_encode(context + " dog"), lm.tok_encode(context)
    continuation = whole[len(before):]
    kept = (before + continuation)[-(lm.max_length + 1):-len(continuation)]
    assert len(before) > lm.max_length
    assert logprob == pytest.approx(span_logprob(lm, kept, continuation), abs=1e-4)


def test_a_continuation_longer_than_the_context_is_refused(lm):
    with pytest.raises(RunError, match="cannot be scored in a context of 64"):
        lm.loglikelihood([request("a", TEXT * 3)])


def test_rolling_counts_every_token_once(lm):
    ids = [lm.tokenizer.bos_id, *lm.tok_encode(TEXT * 3)]
    assert len(ids) > 2 * lm.max_length
    expected = 0.0
    for start in range(1, len(ids), lm.max_length):
        end = min(start + lm.max_length, len(ids))
        expected += span_logprob(lm, ids[max(0, end - lm.max_length - 1):start], ids[start:end])
    (total,) = lm.loglikelihood_rolling([request(TEXT * 3)])
    assert total == pytest.approx(expected, abs=1e-3)


def test_a_text_that_spells_the_begin_token_gets_no_other(lm):
    assert lm.tok_encode("<s>a") == lm.tokenizer.encode("<s>a")
    assert lm.tok_encode("a") == [lm.tokenizer.bos_id, *lm.tok_encode("a", add_special_tokens=False)]


def test_a_tokenizer_of_our_own_begins_texts_and_one_from_elsewhere_says_whether(lm, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    assert harness.begin_ids(lm.tokenizer, tmp_path) == [lm.tokenizer.bos_id]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "<b>": 1}, merges=[]))
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert harness.begin_ids(lm.tokenizer, tmp_path) == []
    theirs.post_processor = tokenizers.processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 1)])
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert harness.begin_ids(lm.tokenizer, tmp_path) == [1]


def test_generation_ends_before_its_stop_text(lm):
    def generate(**settings):
        return lm.generate_until([request("The cat", settings), request("", settings)])

    free = generate(max_gen_toks=20)
    assert free[0]
    stop = free[0][len(free[0]) // 2]
    stopped = generate(max_gen_toks=20, until=[stop])
    assert stopped == [text.split(stop)[0] for text in free]


def test_generation_without_room_names_the_setting(lm):
    with pytest.raises(ConfigError, match="max_gen_toks=64: the model's context is 64"):
        lm.generate_until([request("a", {"max_gen_toks": 64})])


def test_whole_tasks_from_files_and_folders(lm, tmp_path):
    files = write_tasks(tmp_path)
    by_file = harness.run_tasks(lm, files)["results"]
    by_folder = harness.run_tasks(lm, [str(tmp_path)])["results"]
    assert by_file == by_folder
    texts = [TEXT[i:] * (1 + i % 3) for i in range(6)]  # the longest take several windows
    nats = -sum(lm.loglikelihood_rolling([request(text) for text in texts]))
    num_bytes = sum(len(text.encode()) for text in texts)
    assert by_file["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / num_bytes)
    assert 0 <= by_file["tiny_choice"]["acc,none"] <= 1
    assert harness.run_tasks(lm, files[:1], limit=2)["n-samples"]["tiny_choice"]["effective"] == 2


@pytest.mark.slow  # the harness reads its 14,000 task files
def test_an_unknown_task_is_one_clear_line(lm):
    with pytest.raises(ConfigError, match="'no_such_task' is neither"):
        harness.run_tasks(lm, ["no_such_task"])
