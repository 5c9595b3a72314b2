"""The package as it is installed: kernels behind their link, light imports, versions that go together."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "tensorflow", "transformers", "google.cloud", "boto3", "huggingface_hub", "jax", "numpy")


def test_kernels_are_one_package_reached_through_the_link(root: Path) -> None:
    link = root / "llmjax" / "kernels"
    assert link.is_symlink() and link.resolve() == root / "kernels"
    assert not (root / "kernels" / "__init__.py").exists()
    from llmjax.kernels.attention import api

    assert Path(api.__file__).resolve().is_relative_to(root / "kernels")


def test_importing_llmjax_loads_nothing_heavy(command_env: dict[str, str]) -> None:
    code = f"import llmjax, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=command_env, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_top_level_holds_what_it_should_and_nothing_else(root: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    visible = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    assert visible <= {
        "setup.py", "llmjax", "configs", "tpu", "kernels", "tests", "notebooks", "README.md", "LICENSE",
        "CHANGELOG.md", "benchmarks",
    }  # fmt: skip


def test_the_changelog_speaks_of_this_version(root: Path) -> None:
    import llmjax

    assert re.search(rf"^## {re.escape(llmjax.__version__)}\b", (root / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["--wheel", "--sdist"])
def test_what_is_built_carries_the_kernels(kind: str, root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    source.mkdir()
    subprocess.run(["cp", "-a", "--parents", *files, source], cwd=root, check=True)
    command = {"--wheel": ["bdist_wheel"], "--sdist": ["sdist", "--formats=zip"]}[kind]
    subprocess.run([sys.executable, "setup.py", "-q", *command], cwd=source, check=True, capture_output=True)
    import zipfile

    (built,) = (source / "dist").iterdir()
    names = zipfile.ZipFile(built).namelist()
    for wanted in ("llmjax/kernels/attention/api.py", "llmjax/core/config.py", "llmjax/verbs/common.py"):
        assert any(name.endswith(wanted) for name in names), wanted
    assert not any(name.startswith("tests/") for name in names)
