"""The C of kernels/cpu: compiled where it can be, on processors with narrower registers too, and else left alone."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from llmjax.kernels.cpu import library


def test_without_a_compiler_all_is_left_to_xla(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    assert library.compiled_library(tmp_path / "cache") is None
    monkeypatch.setenv("CC", "false")
    assert library.compiled_library(tmp_path / "cache") is None
    (tmp_path / "file").touch()
    monkeypatch.delenv("CC")
    assert library.compiled_library(tmp_path / "file") is None
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_library_that_does_not_load_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels.so").write_bytes(b"cut short")
    monkeypatch.setattr(library, "compiled_library", lambda folder: tmp_path / "kernels.so")
    assert not library.available.__wrapped__()
    monkeypatch.setattr(library, "cache_folder", lambda: Path("~nobody-has-this-home").expanduser())
    assert not library.available.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setenv("CC", "cc '")
    assert not library.available.__wrapped__()
    monkeypatch.setattr(library, "compiled_library", lambda folder: pytest.fail("was asked to"))
    monkeypatch.setenv(library.SWITCH, "xla")
    assert not library.available.__wrapped__()


@pytest.mark.skipif(not library.available(), reason="no C compiler, or a processor it is not written for")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="vectors of half the width are x86's")
def test_narrower_registers_give_the_same(command_env: dict[str, str], root: Path, tmp_path: Path) -> None:
    """Of processors without AVX-512; compiled for one of these and run in a process of its own."""
    code = """
import sys; sys.path.insert(0, "tests/kernels")
import test_matmul, test_attention_cpu
for shape in test_matmul.SHAPES:
    for layout in test_matmul.LAYOUTS:
        test_matmul.test_products_are_those_of_numpy(shape, layout)
for sizes in test_attention_cpu.SIZES[:3]:
    test_attention_cpu.test_values_and_gradients_equal_the_reference(sizes)
print("done")
"""
    env = command_env | {"CC": "cc -mno-avx512f", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
