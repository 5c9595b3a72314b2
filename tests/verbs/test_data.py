"""`llmjax data` and `llmjax tokenizer` as a user types them."""

import itertools
import json

import pytest

from llmjax.cli import main

SENTENCES = [f"{who} {does} {what} {when}." for who, does, what, when in itertools.product(
    ("The miller", "A sailor", "My neighbour"), ("sold", "found", "painted"), ("a boat", "the door", "two chairs"),
    ("at dawn", "in winter", "without a word"))]


@pytest.fixture
def recipe(root, tmp_path) -> list[str]:
    """Options for a corpus of 60 short documents, one of them twice."""
    texts = [" ".join(SENTENCES[(7 * i + 11 * j * j + j) % len(SENTENCES)] for j in range(12)) for i in range(59)]
    records = [{"id": str(i), "text": f"Day {i}. {text}"} for i, text in enumerate([*texts, texts[0]])]
    records[-1]["text"] = records[0]["text"]
    (tmp_path / "days.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return [f"--config={root}/configs/data/from_files.py:{tmp_path}/days.jsonl", "--config.tokenizer.vocab_size=330",
            "--config.data.holdout_fraction=0.2", "--config.data.licence=CC0-1.0", "--config.data.seq_len=32",
            "--config.data.batch_size=2", "--config.data.near_duplicate_jaccard=0.9"]


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_build_then_everything_else_needs_only_the_workdir(recipe, tmp_path, capsys):
    workdir = f"--workdir={tmp_path}/w"
    assert main(["data", "build", *recipe, workdir, "--json"]) == 0
    built = last_json(capsys)
    assert {"shards", "manifest.json", "kept.jsonl", "dropped.jsonl"} <= {p.name for p in (tmp_path / "w").iterdir()}
    assert built["documents"] == len((tmp_path / "w" / "kept.jsonl").read_text().splitlines())
    assert built["dropped"]["exact_duplicate"] == 1

    assert main(["data", "show", workdir, "--step=3", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = json.loads(lines[-1])["segments"]
    assert {segment["row"] for segment in shown} == {0, 1}
    assert len(lines) == len(shown) + 1
    assert all(f"{segment['id']} [{tmp_path}/days.jsonl, CC0-1.0]" in line
               for segment, line in zip(shown, lines[:-1], strict=True))

    assert main(["tokenizer", "report", workdir, "--json"]) == 0
    (source,) = last_json(capsys)["sources"]
    assert (source["documents"], source["unequal"]) == (built["dropped"]["held_out"], 0)


def test_build_again_uses_what_is_there_until_the_input_changes(recipe, tmp_path, capsys):
    command = ["data", "build", *recipe, f"--workdir={tmp_path}/w", "--json"]
    hashes = []
    for addition in ("", "", json.dumps({"id": "new", "text": "Something else altogether. " * 20})):
        with (tmp_path / "days.jsonl").open("a") as file:
            file.write(addition)
        assert main(command) == 0
        hashes.append(last_json(capsys)["hash"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_tokenizer_train_alone_equals_the_one_of_a_build(recipe, tmp_path, capsys):
    assert main(["tokenizer", "train", *recipe, f"--workdir={tmp_path}/t", "--json"]) == 0
    trained = last_json(capsys)["hash"]
    assert main(["data", "build", *recipe, f"--workdir={tmp_path}/w"]) == 0
    assert json.loads((tmp_path / "w" / "manifest.json").read_text())["tokenizer_hash"] == trained


@pytest.mark.parametrize(("options", "message"), [
    (["--config.data.sources=missing.txt"], "data.sources: 'missing.txt' is no file"),
    (["--config.data.min_bytes=99999"], "no document is left to train on (60 too_short)"),
])
def test_a_failing_build_ends_in_one_line(recipe, options, message, tmp_path, capsys):
    assert main(["data", "build", *recipe, *options, f"--workdir={tmp_path}/w"]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "w" / "manifest.json").exists()


@pytest.mark.parametrize(("verb", "option", "message"), [
    ("build", "--config.data.path=elsewhere", "data.path='elsewhere': names data to use"),
    ("show", "--config.task.name=sft", "task.name='sft': data show follows"),
])
def test_what_makes_no_sense_is_wrong_use(recipe, tmp_path, capsys, verb, option, message):
    assert main(["data", verb, *recipe, option, f"--workdir={tmp_path}/w"]) == 2
    assert message in capsys.readouterr().err


def test_show_without_data_says_what_to_do(root, tmp_path, capsys):
    assert main(["data", "show", f"--config={root}/configs/data/from_files.py", f"--workdir={tmp_path}/empty"]) == 1
    assert "run llmjax data build" in capsys.readouterr().err
