"""The life of a corpus as a user types it: registered, built, trained on, looked at, erased; and mixed."""

import json
import random

import pytest

from llmjax.cli import main

WORDS = [a + b for a in ("fen", "mor", "tal", "wic", "bro", "hea") for b in ("ard", "ost", "ielm", "unk", "eth")]
TINY = {"tokenizer.vocab_size": 330, "data.seq_len": 64, "data.batch_size": 8, "model.num_layers": 1, "model.dim": 16,
        "model.num_heads": 2, "model.num_kv_heads": 2, "model.head_dim": 8, "model.mlp_dim": 32, "train.steps": 2,
        "train.log_every": 1, "optim.warmup_steps": 1, "checkpoint.every": 1, "track.tensorboard": "off",
        "track.carbon": "off"}  # fmt: skip
FLAGS = [f"--config.{field}={value}" for field, value in TINY.items()]


def article(rng, *, words=WORDS):
    return " ".join(rng.choices(words, k=120))


@pytest.fixture
def corpus(tmp_path):
    """Two registered sources and an exam; Ann wrote two of the letters, one of the reports has the exam in it."""
    rng = random.Random(0)
    exam = " ".join(rng.choices(WORDS, k=30))
    letters = [{"id": f"letter-{i}", "text": article(rng), "author": "Ann" if i < 2 else "Bob"} for i in range(12)]
    reports = [{"id": f"report-{i}", "text": article(rng, words=WORDS[:15]), "url": f"https://example.org/{i}"}
               for i in range(12)]  # fmt: skip
    reports[3]["text"] += f" {exam}"
    for name, records in (("letters", letters), ("reports", reports), ("exam", [{"id": "exam", "text": exam}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    terms = 'provenance = "written for this"\ncontact = "me@example.org"\nlicence = "{}"\nfiles = ["{}.jsonl"]\n'
    entries = (("source.letters", "CC0-1.0", "letters"), ("source.reports", "MIT", "reports"),
               ("holdout.exam", "CC-BY-NC-4.0", "exam"))  # fmt: skip
    (tmp_path / "sources.toml").write_text('licences = ["CC0-1.0", "MIT"]\n' + "".join(
        f"[{name}]\n{terms.format(licence, file)}" for name, licence, file in entries))
    return tmp_path


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_from_a_registry_to_a_run_and_back_to_its_documents(corpus, root, capsys):
    recipe = [f"--config={root}/configs/data/from_files.py:letters,reports", "--config.data.holdouts=exam", *FLAGS,
              f"--config.data.curation.registry={corpus}/sources.toml"]  # fmt: skip
    data, run = corpus / "runs" / "data", corpus / "runs" / "tiny"
    assert main(["data", "build", *recipe, f"--workdir={data}", "--json"]) == 0
    assert last_json(capsys)["dropped"] == {"leak": 1}
    assert all((data / name).exists() for name in ("dataset_card.md", "openlineage.jsonl", "curation.html"))

    assert main(["tokenizer", "report", f"--workdir={data}", "--config.tokenizer.min_bytes_per_token=1.5"]) == 0
    assert main(["tokenizer", "report", f"--workdir={data}", "--config.tokenizer.min_bytes_per_token=50"]) == 1
    assert "below tokenizer.min_bytes_per_token=50" in capsys.readouterr().err.splitlines()[-1]

    assert main(["train", *recipe, f"--config.data.path={data}", f"--workdir={run}"]) == 0
    assert main(["eval", f"--workdir={run}", "--tasks=bpb,memorisation", "--json"]) == 0
    results = last_json(capsys)["results"]
    assert results["bpb"]["documents"] == 1 and results["bpb"]["bits_per_byte"] > 0
    assert results["memorisation"]["samples"] == 23

    assert main(["data", "show", f"--workdir={run}", "--step=1", "--json"]) == 0
    segment = last_json(capsys)["segments"][0]
    assert main(["data", "trace", f"--workdir={data}", f"--id={segment['id']}", "--json"]) == 0
    (found,) = last_json(capsys)["documents"]
    assert (found["provenance"], found["document"]["licence"]) == ("written for this", segment["licence"])
    assert any(stage.startswith("Clean(") for stage in found["made_by"]["stages"])

    assert main(["data", "erase", f"--workdir={data}", "--author=Ann", "--json"]) == 0
    told = last_json(capsys)
    assert told["ids"] == ["letter-0", "letter-1"]
    (affected,) = told["runs"]
    assert affected["workdir"] == str(run) and affected["checkpoints"] == ["checkpoints/1", "checkpoints/2"]
    assert main(["data", "build", *recipe, f"--workdir={data}", "--config.tokenizer.vocab_size=340", "--json"]) == 0
    assert last_json(capsys)["dropped"] == {"erased": 2, "leak": 1}


@pytest.mark.slow
def test_a_mixture_by_proxies_is_one_that_training_takes(corpus, root, capsys):
    recipe = [f"--config={root}/configs/data/from_files.py:{corpus}/letters.jsonl,{corpus}/reports.jsonl", *FLAGS,
              "--config.data.holdout_fraction=0.3"]  # fmt: skip
    work = corpus / "mix"
    options = ["--rounds=2", "--round-steps=2", "--tokens=2000"]
    assert main(["data", "mix", *recipe, *options, f"--workdir={work}", "--json"]) == 0
    made = last_json(capsys)
    assert sum(made["weights"].values()) == pytest.approx(1)
    assert made["weights"].keys() == {f"{corpus}/letters.jsonl", f"{corpus}/reports.jsonl"}
    assert main(["train", *recipe, f"--config.data.path={work}/data", f"--config.data.mixture=@{made['file']}",
                 f"--workdir={corpus}/mixed"]) == 0  # fmt: skip
    assert main(["data", "mix", *recipe, *options, f"--synthetic={corpus}/letters.jsonl", "--max-synthetic=0.01",
                 f"--workdir={work}"]) == 2  # fmt: skip
    assert "synthetic" in capsys.readouterr().err.splitlines()[-1]
