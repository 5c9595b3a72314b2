"""`llmjax generate` as a user types it."""

from __future__ import annotations

import json
import shutil

import pytest

from llmjax.cli import main
from llmjax.serve.engine import Engine
from llmjax.serve.load import load_workdir
from llmjax.serve.sampling import SamplingParams
from tests.serve.workdirs import make_workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def engine(workdir):
    loaded = load_workdir(workdir)
    return Engine(loaded.model, loaded.params, tokenizer=loaded.tokenizer)


def generate(capsys, workdir, *flags: str) -> tuple[int, str, str]:
    status = main(["generate", f"--workdir={workdir}", *flags])
    return status, *capsys.readouterr()


def as_json(capsys, workdir, *flags: str) -> dict:
    status, out, err = generate(capsys, workdir, "--json", *flags)
    assert (status, err) == (0, "")
    return json.loads(out.splitlines()[-1])


def test_a_text_prompt_begins_a_document(capsys, workdir, engine):
    found = as_json(capsys, workdir, "--prompt=def ", "--max-new-tokens=9")
    tokenizer = engine.tokenizer
    expected = engine.generate([tokenizer.bos_id, *tokenizer.encode("def ")], SamplingParams(max_new_tokens=9))
    assert found == {"token_ids": expected.token_ids, "logprobs": expected.logprobs, "text": expected.text}
    assert len(found["token_ids"]) == 9 or found["token_ids"][-1] == tokenizer.eos_id


def test_the_text_is_printed_behind_the_prompt(capsys, workdir):
    text = as_json(capsys, workdir, "--prompt=def ", "--max-new-tokens=9")["text"]
    assert generate(capsys, workdir, "--prompt=def ", "--max-new-tokens=9") == (0, f"def {text}\n", "")


def test_a_prompt_from_a_file(capsys, workdir, tmp_path):
    (tmp_path / "prompt").write_bytes("d\u00e9f\r\n".encode())
    from_file = as_json(capsys, workdir, f"--prompt-file={tmp_path}/prompt", "--max-new-tokens=5")
    assert from_file == as_json(capsys, workdir, "--prompt=d\u00e9f\r\n", "--max-new-tokens=5")
    (tmp_path / "prompt").write_bytes(b"a\xff")
    assert generate(capsys, workdir, f"--prompt-file={tmp_path}/prompt")[0] == 1


def test_sampling_flags_reach_the_engine(capsys, workdir, engine):
    flags = ["--prompt-ids=5,6", "--max-new-tokens=12", "--temperature=1.5", "--top-k=9", "--top-p=0.8", "--seed=4"]
    params = SamplingParams(max_new_tokens=12, temperature=1.5, top_k=9, top_p=0.8, seed=4)
    assert as_json(capsys, workdir, *flags)["token_ids"] == engine.generate([5, 6], params).token_ids


def test_ids_work_without_a_tokenizer(capsys, workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    found = as_json(capsys, tmp_path / "run", "--prompt-ids=5,6", "--max-new-tokens=4")
    assert len(found["token_ids"]) == len(found["logprobs"]) == 4 and found["text"] is None
    _, out, _ = generate(capsys, tmp_path / "run", "--prompt-ids=5,6", "--max-new-tokens=4")
    assert out.splitlines()[-1] == ",".join(map(str, found["token_ids"]))
    status, _, err = generate(capsys, tmp_path / "run", "--prompt=x")
    assert status == 1 and "--prompt-ids" in err and err.count("\n") == 1


@pytest.mark.parametrize("flags, status, told", [
    (["--prompt-ids=1,x"], 2, "1,x"), (["--prompt-ids=9999"], 2, "vocabulary"),
    (["--prompt=x", "--top-p=2"], 2, "top_p=2"),
    (["--prompt=x", "--max-new-tokens=300"], 2, "max_seq_len=256"), (["--prompt-file=nowhere"], 1, "nowhere"),
])
def test_wrong_use_is_one_line(capsys, workdir, flags, status, told):
    found, out, err = generate(capsys, workdir, *flags)
    assert found == status and told in err and err.count("\n") == 1


def test_workdirs_without_weights_are_told_apart(capsys, workdir, tmp_path):
    status, _, err = generate(capsys, tmp_path / "nowhere", "--prompt=x")
    assert status == 1 and "no workdir" in err and "llmjax train" in err
    shutil.copy(workdir / "config.json", tmp_path)
    status, _, err = generate(capsys, tmp_path, "--prompt=x")
    assert status == 1 and "no checkpoint" in err and "llmjax train" in err


def test_another_tokenizer_is_refused(capsys, workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    settings = json.loads((tmp_path / "run/tokenizer/tokenizer_config.json").read_text())
    (tmp_path / "run/tokenizer/tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<pad>"}))
    status, _, err = generate(capsys, tmp_path / "run", "--prompt=x")
    assert status == 2 and "tokenizer" in err
