"""What people run from a shell: clean scripts, manifests that the schema takes, the right calls, restarts that end."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

TPU = Path(__file__).parents[1] / "tpu"
SCRIPTS = sorted(TPU.glob("*.sh"))
JOBSETS = sorted(TPU.glob("*.yaml"))

# The part of jobset.x-k8s.io/v1alpha2 around the jobs, whose own schema is Kubernetes'.
JOBSET_SCHEMA: dict[str, Any] = {
    "type": "object", "additionalProperties": False, "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"}, "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object", "additionalProperties": False, "required": ["replicatedJobs"],
            "properties": {
                "failurePolicy": {"type": "object", "additionalProperties": False,
                                  "properties": {"maxRestarts": {"type": "integer", "minimum": 0}}},
                "replicatedJobs": {"type": "array", "minItems": 1, "items": {
                    "type": "object", "additionalProperties": False, "required": ["name", "template"],
                    "properties": {"name": {"type": "string"}, "replicas": {"type": "integer", "minimum": 1},
                                   "template": {"type": "object"}}}},
            },
        },
    },
}  # fmt: skip


def call(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, words)), env=os.environ | {"PAUSE": "0"} | env, capture_output=True, text=True,
                          timeout=120, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    checked = call("shellcheck", script)
    assert checked.returncode == 0, checked.stdout
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_manifests_fit_the_schema(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    jsonschema.validate(manifest, JOBSET_SCHEMA)
    for job in manifest["spec"]["replicatedJobs"]:
        as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        kubernetes_validate.validate(as_job, kubernetes_validate.latest_version(), strict=True)
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        assert container["args"][:2] == ["llmjax", "train"]
    slices = manifest["spec"]["replicatedJobs"][0]["replicas"]
    assert (f"--config.mesh.slice={slices}" in container["args"]) == (slices > 1)


def test_the_schema_sees_a_misspelt_field() -> None:
    manifest = yaml.safe_load(JOBSETS[0].read_text())
    job = manifest["spec"]["replicatedJobs"][0]["template"]
    job["spec"]["template"]["spec"]["containers"][0]["comand"] = ["x"]
    as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(as_job, kubernetes_validate.latest_version(), strict=True)


@pytest.fixture
def gcloud(tmp_path: Path) -> Path:
    """A stand-in that records how it was called."""
    stub = tmp_path / "bin/gcloud"
    stub.parent.mkdir()
    stub.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$*" >> {tmp_path}/calls\n')
    stub.chmod(0o755)
    return tmp_path


def pod(gcloud: Path, *words: str, **env: str) -> str:
    env = {"NAME": "mine", "ZONE": "z", "TYPE": "v5p-128", "PATH": f"{gcloud}/bin:{os.environ['PATH']}"} | env
    done = call(TPU / "pod.sh", *words, **env)
    assert done.returncode == 0, done.stderr
    calls = gcloud / "calls"
    return done.stdout + (calls.read_text() if calls.exists() else "")


@pytest.mark.parametrize(("words", "wanted"), [
    (["create"], ["compute tpus tpu-vm create mine --accelerator-type=v5p-128 --version=v2-alpha-tpuv5 --zone=z"]),
    (["queue"], ["compute tpus queued-resources create mine --node-id=mine --accelerator-type=v5p-128"]),
    (["setup"], ["tpu-vm scp", "mine:llmjax.tar.gz --worker=all", "pip install --quiet -e llmjax 'jax[tpu]'"]),
    (["launch", "llmjax", "train", "--config=a b.py"],
     ["tpu-vm ssh mine --worker=all", "LLMJAX_COORDINATOR=auto", r"tpu/restart.sh llmjax train --config=a\ b.py"]),
    (["logs", "3"], ["ssh mine --worker=3 --command=tail -n 100 -F llmjax.log"]),
    (["stop"], ["--worker=all --command=kill -TERM $(cat llmjax.pid)"]),
    (["delete"], ["queued-resources delete mine --force --quiet --zone=z"]),
])  # fmt: skip
def test_what_gcloud_is_asked(gcloud: Path, words: list[str], wanted: list[str]) -> None:
    said = pod(gcloud, *words)
    assert all(part in said for part in wanted), said


def test_a_dry_run_asks_nothing(gcloud: Path) -> None:
    said = pod(gcloud, "launch", "llmjax", "train", DRY_RUN="1", SPOT="1")
    assert said.startswith("gcloud compute tpus tpu-vm ssh") and not (gcloud / "calls").exists()
    assert "--spot" in pod(gcloud, "create", DRY_RUN="1", SPOT="1")


def test_wrong_use_says_how(gcloud: Path) -> None:
    assert call(TPU / "pod.sh").returncode == 2
    assert "set NAME" in call(TPU / "pod.sh", "create").stderr
    for script in ("local.sh", "restart.sh", "slurm.sh"):
        done = call(TPU / script)
        assert done.returncode == 2 and "usage" in done.stderr


def fails(tmp_path: Path, statuses: list[str]) -> Path:
    """A command that ends in these ways, one after the other: a status, or a signal's name."""
    script, count = tmp_path / "command", tmp_path / "count"
    lines = "\n".join(f'{n}) {"kill -s " + s + " $$" if not s.isdigit() else "exit " + s};;'
                      for n, s in enumerate(statuses, start=1))
    script.write_text(f'#!/usr/bin/env bash\n[[ ${{LLMJAX_PROCESS_ID:-0}} = 0 ]] || {{ sleep 3; exit 0; }}\n'
                      f'echo x >> {count}\ncase $(wc -l < {count}) in\n{lines}\nesac\n')  # fmt: skip
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(("statuses", "status", "starts"), [
    (["0"], 0, 1), (["75", "75", "0"], 0, 3), (["KILL", "ABRT", "0"], 0, 3), (["75", "1", "0"], 1, 2), (["2"], 2, 1)])
def test_a_restart_loop_honours_the_status(tmp_path: Path, statuses: list[str], status: int, starts: int) -> None:
    done = call(TPU / "restart.sh", fails(tmp_path, statuses))
    assert done.returncode == status
    assert (tmp_path / "count").read_text().count("x") == starts


@pytest.mark.parametrize("words", [["restart.sh"], ["local.sh", "1"]])
def test_restarts_end(tmp_path: Path, words: list[str]) -> None:
    done = call(TPU / words[0], *words[1:], fails(tmp_path, ["75"] * 9), MAX_RESTARTS="3")
    assert done.returncode == 75 and (tmp_path / "count").read_text().count("x") == 4
    assert "giving up" in done.stderr


@pytest.mark.parametrize(("statuses", "status", "starts"), [(["KILL", "75", "1"], 1, 3), (["1"], 1, 1)])
def test_when_one_process_falls_all_start_again(
    tmp_path: Path, statuses: list[str], status: int, starts: int
) -> None:
    """The other process is waited for only where the first one ends well."""
    done = call(TPU / "local.sh", "2", fails(tmp_path, statuses), GRACE_SECONDS="0")
    assert done.returncode == status and (tmp_path / "count").read_text().count("x") == starts


def test_local_says_what_it_would_start() -> None:
    lines = call(TPU / "local.sh", "2", "llmjax", "train", DRY_RUN="1").stdout.splitlines()
    assert [line.partition("LLMJAX_NUM")[2] for line in lines] == [
        "_PROCESSES=2 LLMJAX_PROCESS_ID=0 llmjax train", "_PROCESSES=2 LLMJAX_PROCESS_ID=1 llmjax train"]  # fmt: skip
    assert "srun --kill-on-bad-exit=1 llmjax train" in call(TPU / "slurm.sh", "llmjax", "train", DRY_RUN="1").stdout
