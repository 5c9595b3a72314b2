"""The report on this machine."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from llmjax import cli
from llmjax.verbs import doctor


def test_it_names_versions_devices_and_what_brings_an_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "serve", doctor.Extra(("starlette", "no_such_module"), "a server"))
    assert cli.main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    assert "without no_such_module: a server; pip install 'llmjax[serve]'" in out
    report = json.loads(out.splitlines()[-1])
    assert report["flax with jax"] == "works"
    assert report["jax"] == importlib.metadata.version("jax") and report["devices"].startswith("8 x cpu")


def test_a_library_that_training_needs_and_lacks_fails_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CORE", ("jax", "no-such-distribution"))
    assert cli.main(["doctor"]) == 1
    assert "no-such-distribution  missing; pip install llmjax" in capsys.readouterr().out


def test_every_extra_it_knows_is_one_of_setup_py() -> None:
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    assert all(f'"{extra}": ' in setup for extra in doctor.EXTRAS)


def test_a_flax_that_does_not_fit_its_jax_fails_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "flax"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('jax has no such attribute')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert cli.main(["doctor"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("flax with jax"))
    assert "broken (ImportError: jax has no such attribute); pip install 'jax" in line
