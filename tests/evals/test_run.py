"""`llmjax eval` on a workdir of random weights: its numbers, its input files, its errors."""

import json
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmjax import cli
from llmjax.core.errors import RunError
from llmjax.data.shards import Document, write_store
from llmjax.evals import bits, run
from llmjax.serve.engine import Engine
from llmjax.serve.load import load_workdir
from llmjax.serve.sampling import SamplingParams
from tests.evals.test_harness import TEXT, write_tasks
from tests.evals.test_harness_peer import make_workdir

# Runs the command line where torch and transformers can neither be found nor imported.
WITHOUT_TORCH = """
import importlib.machinery, sys
finder = importlib.machinery.PathFinder
found = finder.find_spec
finder.find_spec = lambda name, *args: None if name in ("torch", "transformers") else found(name, *args)
from llmjax import cli
status = cli.main()
assert "torch" not in sys.modules
sys.exit(status)
"""

HELD_OUT = [TEXT, "A dog. " * 30, "é" * 10]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = make_workdir(tmp_path_factory.mktemp("eval") / "run")
    (workdir / "data").mkdir()
    rows = pa.table({"id": ["a", "b", "c"], "text": HELD_OUT})
    pq.write_table(rows, workdir / "data" / "holdout.parquet")
    return workdir


def evaluate(capsys, *flags):
    """Exit status, the JSON object of the last line, the lines before it, and standard error."""
    status = cli.main(["eval", *flags, "--json"])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    return status, json.loads(lines[-1])["results"] if status == 0 else None, lines[:-1], err


def test_the_holdout_is_the_default(workdir, capsys):
    status, results, lines, _ = evaluate(capsys, f"--workdir={workdir}")
    loaded = load_workdir(workdir)
    documents = [bits.Document(str(i), text) for i, text in enumerate(HELD_OUT)]
    corpus = bits.score_documents(loaded.model, loaded.params, documents, tokenizer=loaded.tokenizer, seq_len=32)
    assert status == 0
    gzip = bits.compressed_bits_per_byte(HELD_OUT)
    assert results["bpb"]["bits_per_byte"] == pytest.approx(corpus.bits_per_byte)
    assert results["bpb"]["gzip"] == pytest.approx(gzip)
    assert results["bpb"]["saved_on_gzip"] == pytest.approx(1 - corpus.bits_per_byte / gzip)
    assert results["bpb"]["bytes"] == sum(len(text.encode()) for text in HELD_OUT)
    assert len(lines) == len(results["bpb"]) and all(line.startswith("bpb") for line in lines)


def test_overrides_limit_and_perplexity(workdir, capsys):
    _, full, _, _ = evaluate(capsys, f"--workdir={workdir}", "--tasks=perplexity,bpb", "--limit=2")
    _, short, _, _ = evaluate(capsys, f"--workdir={workdir}", "--tasks=bpb", "--limit=2", "--config.eval.seq_len=8")
    assert full["bpb"]["documents"] == 2
    assert full["perplexity"]["perplexity"] == pytest.approx(
        math.exp(full["bpb"]["bits_per_byte"] * math.log(2) * full["bpb"]["bytes"] / full["bpb"]["tokens"]))
    assert short["bpb"]["bits_per_byte"] != full["bpb"]["bits_per_byte"]


def test_files_replace_the_holdout(workdir, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": "x", "text": "A dog."}) + "\n")
    _, results, _, _ = evaluate(capsys, f"--workdir={workdir}", f"--files={tmp_path}/a.txt,{tmp_path}/b.jsonl")
    assert results["bpb"]["documents"] == 2
    assert results["bpb"]["bytes"] == len(TEXT) + len("A dog.")


def test_bleu_and_rouge_of_given_and_generated_texts(workdir, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prediction": "a b c d e", "reference": "a b c d e"}) + "\n")
    flags = (f"--workdir={workdir}", "--tasks=bleu,rouge", f"--files={pairs}")
    _, results, _, _ = evaluate(capsys, *flags)
    assert results["bleu"] == {"bleu": pytest.approx(100), "pairs": 1}
    assert results["rouge"]["rougeL"] == 1
    loaded = load_workdir(workdir)
    (completion,) = run.Evaluation(loaded, workdir=workdir).complete(["The cat"])
    pairs.write_text(json.dumps({"prompt": "The cat", "reference": completion}) + "\n")
    assert evaluate(capsys, *flags)[1]["rouge"]["rouge1"] == 1


def test_memorisation_is_probed_on_the_shards_of_the_run(workdir, capsys):
    loaded, half = load_workdir(workdir), run.PROBE_TOKENS // 2
    shown = list(range(5, 5 + half))
    params = SamplingParams(max_new_tokens=half, temperature=0.0)
    learnt = [*shown, *Engine(loaded.model, loaded.params).generate(shown, params).token_ids]
    other = [*shown, *((token + 1) % 260 for token in learnt[half:])]
    documents = [Document(f"{i:032x}", np.array(ids)) for i, ids in enumerate((learnt, other, shown))]
    write_store(workdir / "data" / "shards", documents, vocab_size=loaded.model.config.vocab_size)
    flags = (f"--workdir={workdir}", "--tasks=memorisation")
    found = evaluate(capsys, *flags)[1]["memorisation"]
    assert (found["verbatim_share"], found["samples"]) == (0.5, 2)
    assert evaluate(capsys, *flags, "--limit=1")[1]["memorisation"]["samples"] == 1


@pytest.mark.parametrize(("flags", "status", "message"), [
    (["--tasks=bleu"], 2, "need --files"),
    (["--tasks="], 2, "--tasks is empty"),
    (["--limit=0"], 2, "--limit=0"),
    (["--files=nowhere.txt"], 1, "nowhere.txt"),
    (["--tasks=bleu", "--files=nowhere.jsonl"], 1, "nowhere.jsonl: no such file"),
    (["--config.eval.stride=64"], 2, "stride"),
])
def test_wrong_use_is_one_clear_line(workdir, capsys, flags, status, message):
    found, _, _, err = evaluate(capsys, f"--workdir={workdir}", *flags)
    assert found == status
    assert message in err.splitlines()[-1]


def test_no_holdout_says_what_to_name(tmp_path):
    path = tmp_path / "holdout.parquet"
    for make in (lambda: None, lambda: pq.write_table(pa.table({"id": [""], "text": [""]}).slice(1), path)):
        make()
        assert run.find_holdout(path) == []
        with pytest.raises(RunError, match="name some with --files, or keep some from training with data.holdouts or"):
            run.read_holdout(path)


@pytest.mark.slow
def test_harness_tasks_need_no_torch(workdir, tmp_path, command_env):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the [eval] extra)")
    tasks = write_tasks(tmp_path)
    flags = [f"--workdir={workdir}", f"--tasks={','.join(tasks)}", "--json"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, "eval", *flags], env=command_env, cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert results.keys() == {"tiny_choice", "tiny_rolling", "tiny_generate"}
    assert results["tiny_rolling"]["bits_per_byte"] > 0
