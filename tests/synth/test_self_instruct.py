"""Self-Instruct: what is asked, parsed, let in and refused; resuming; collapse; teachers of both kinds."""

import json
import random
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
from rouge_score import rouge_scorer

from llmjax.cli import main
from llmjax.core.errors import ConfigError, RunError
from llmjax.serve.sampling import SamplingParams
from llmjax.synth import novelty
from llmjax.synth.novelty import Example, Pool
from llmjax.synth.self_instruct import generate, parse, prompt, read_seeds
from llmjax.synth.settings import Settings
from llmjax.synth.teachers import open_teacher

SEEDS = [Example(f"Explain how a {thing} works for a child.", "", f"A {thing} moves.") for thing in (
    "clock", "boat", "kite", "lamp", "wheel", "pump", "bell", "loom", "mill", "lens")]  # fmt: skip
WORDS = ("sort", "name", "river", "count", "green", "letters", "tell", "about", "winter", "rhyme", "short", "story",
         "stone", "bread", "seven", "market")  # fmt: skip


class Inventive:
    """A teacher that makes new instructions out of words, and sometimes none."""

    def __init__(self, name: str, *, words: int = len(WORDS)):
        self.name, self._words, self.prompts = name, WORDS[:words], []

    def complete(self, prompts, params):
        self.prompts += prompts
        rng = random.Random(params.seed)
        return [self._answer(rng) for _ in prompts]

    def _answer(self, rng):
        if rng.random() < 0.2:
            return "no form at all"
        words = " ".join(rng.choices(self._words, k=8))
        return f" {words.capitalize()}.\nInput: {rng.choice(('', 'a list'))}\nOutput: answering {words}\n\n### Instr"


def run(out: Path, *teachers, **changes):
    settings = Settings(**{"count": 12, "batch": 4, "window": 32, "max_similarity": 0.7} | changes)
    return generate(SEEDS, teachers or (Inventive("a"),), out, settings=settings)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


@hypothesis.given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), min_size=2, max_size=4))
@hypothesis.settings(max_examples=60, deadline=None)
def test_similarity_is_the_rouge_l_of_the_reference_library(texts):
    first, *others = (" ".join(words) for words in texts)
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    expected = max(scorer.score(other, first)["rougeL"].fmeasure for other in others)
    assert Pool(others).similarity(first) == pytest.approx(expected, abs=1e-12)


def test_what_is_asked_is_what_is_parsed():
    text = prompt(SEEDS[:2])
    assert text.endswith("### Instruction:")
    answers = text.split("### Instruction:")[1:-1]
    assert [parse(f"{answer}\n### Instruction: cut off") for answer in answers] == SEEDS[:2]
    assert parse(" Do it.\nOutput: done") is None


@pytest.mark.parametrize(("example", "fault"), [
    (Example("Name three rivers of Europe.", "", "Rhine, Rhone, Tagus"), None),
    (Example("Go.", "", "gone"), "length"), (Example("Name three rivers.", "", "  "), "no_output"),
    (Example("- name three rivers", "", "x"), "punctuation"), (Example("Draw a map of Rome.", "", "x"), "impossible"),
    (Example("Repeat what I say.", "me", "me"), "output_is_input"),
    (Example("Name a river.", "", "Name a river."), "output_is_instruction"),
    (Example("Write a long poem.", "", "la la la " * 20), "repetitive"),
])  # fmt: skip
def test_validity(example, fault):
    assert novelty.fault(example) == fault


def test_only_new_and_valid_examples_are_written(tmp_path):
    report = run(tmp_path / "out.jsonl")
    records = lines(tmp_path / "out.jsonl")
    assert len(records) == report.accepted == 12
    assert report.rejected["unparsed"] > 0
    pool = Pool([seed.instruction for seed in SEEDS])
    for record in records:
        assert pool.similarity(record["instruction"]) < 0.7
        assert novelty.fault(Example(record["instruction"], record["input"], record["output"])) is None
        assert record["messages"][1]["content"] == record["output"] and record["text"].endswith(record["output"])
        pool.add(record["instruction"])
    assert [record["id"] for record in records] == [f"synthetic-{i}" for i in range(12)]


def test_teachers_take_turns_and_are_named(tmp_path):
    report = run(tmp_path / "out.jsonl", Inventive("a"), Inventive("b"), count=24)
    assert set(report.by_teacher) == {"a", "b"}
    assert min(report.by_teacher.values()) >= 6
    assert {record["author"] for record in lines(tmp_path / "out.jsonl")} == {"a", "b"}


def test_one_of_two_teachers_may_not_write_nearly_all(tmp_path):
    mute = Inventive("mute")
    mute._answer = lambda rng: "nothing"
    with pytest.raises(RunError, match=r"data synth: a wrote 100% of .* more than --max-teacher=0.8"):
        run(tmp_path / "out.jsonl", Inventive("a"), mute, max_teacher=0.8, least_accepted=0.0)
    assert len(lines(tmp_path / "out.jsonl")) == 12


def test_a_file_is_gone_on_with_even_when_its_last_line_is_half(tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run(whole, count=20)
    turns = [record["turn"] for record in lines(whole)]
    first_of_turn = [i for i, turn in enumerate(turns) if turn == turns[12]][0]
    text = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(text[:first_of_turn]) + text[first_of_turn][:9])
    run(cut, count=20)
    assert [record["id"] for record in lines(cut)] == [record["id"] for record in lines(whole)]
    assert lines(cut)[:first_of_turn] == lines(whole)[:first_of_turn]


def test_collapse_stops_with_what_there_is(tmp_path):
    with pytest.raises(RunError, match=r"generation collapses: .* examples in .* stay"):
        run(tmp_path / "out.jsonl", Inventive("poor", words=2), count=100)
    assert 0 < len(lines(tmp_path / "out.jsonl")) < 100


def test_fewer_and_fewer_phrases_are_an_alarm():
    seeds = novelty.health([seed.instruction for seed in SEEDS], candidates=10)
    same = novelty.health(["tell me about the river"] * 20, candidates=20)
    limits = {"least_accepted": 0.1, "least_distinct": 0.5}
    assert "word pairs are different" in novelty.alarm(same, seeds, **limits)
    few = novelty.health(["tell me about the river"], candidates=20)
    assert "5.0% of the latest candidates were new" in novelty.alarm(few, seeds, **limits)
    assert novelty.alarm(seeds, seeds, **limits) is None


def test_prompts_show_mostly_people(tmp_path):
    teacher = Inventive("a")
    run(tmp_path / "out.jsonl", teacher, count=12)
    human = [sum(seed.instruction in text for seed in SEEDS) for text in teacher.prompts]
    assert set(human[:4]) == {8} and set(human[-4:]) == {6}


def test_seed_tasks_of_the_paper_are_read(data_dir):
    seeds = read_seeds(data_dir / "instruct" / "self_instruct_seed_tasks.jsonl")
    assert len(seeds) == 175
    assert seeds[1].input == "Night : Day :: Right : Left"
    assert sum(novelty.fault(seed) is None for seed in seeds) > 150


def test_an_address_needs_a_model_and_an_answer():
    with pytest.raises(ConfigError, match="name the model behind a #"):
        open_teacher("http://127.0.0.1:1/v1")
    teacher = open_teacher("http://127.0.0.1:1/v1#tiny")
    assert teacher.name == "tiny"
    with pytest.raises(RunError, match="does not answer"):
        teacher.complete(["a"], SamplingParams())


def test_the_command_with_an_endpoint(tmp_path, capsys):
    import http.server
    import threading

    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            rng = random.Random(len(asked))
            text = Inventive("x")._answer(rng).split("\n###")[0]
            reply = json.dumps({"choices": [{"text": text}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps(vars(seed)) + "\n" for seed in SEEDS))
    url = f"http://127.0.0.1:{server.server_port}/v1#small"
    options = [f"--seeds={seeds}", f"--teacher={url}", f"--out={tmp_path}/o.jsonl", "--count=5", "--json"]
    assert main(["data", "synth", *options]) == 0
    server.shutdown()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["by_teacher"] == {"small": 5}
    path, body = asked[0]
    assert path == "/v1/completions" and body["model"] == "small" and body["stop"] == ["\n###"]
