"""What every test stands on: eight virtual CPU devices, no implicit rank promotion, a compilation cache that stays."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "llmjax-test-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# Commands that tests start keep what Python compiles, outside of the folders that are tested.
os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(tempfile.gettempdir()) / "llmjax-test-python"))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from llmjax.core.platform import prepare  # noqa: E402

prepare()

import jax  # noqa: E402

# Set here and not through the environment: a command that a test starts runs as it would for a user.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden` writes the files under tests/golden/ anew."""
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/ anew instead of comparing")


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """A folder of small real data sets: $LLMJAX_DATA, else ../shared/data beside the project."""
    folder = Path(os.environ.get("LLMJAX_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: set LLMJAX_DATA to a folder that holds it ({folder} does not exist)")
    return folder


@pytest.fixture(scope="session")
def command_env() -> dict[str, str]:
    """The environment for a command in a subprocess: this checkout first on the path, one device, the warm cache."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return env | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{env.get('PATH', '')}"}
