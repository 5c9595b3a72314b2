"""Which platform a bare machine, a machine with libtpu and one with chips are given."""

import os

import pytest

from llmjax.core import platform


@pytest.mark.parametrize(
    ("files", "installed", "chosen"),
    [
        ([], [], "cpu"),
        ([], ["libtpu"], "cpu"),  # the plan extra on a machine without a chip
        (["/dev/accel0"], ["libtpu"], "tpu,cpu"),
        (["/dev/vfio/0"], ["libtpu"], "tpu,cpu"),
        (["/dev/vfio/0"], [], "cpu"),
        (["/dev/nvidia0"], ["libtpu"], "cpu"),
        (["/dev/nvidia0"], ["libtpu", "jax_cuda12_plugin"], "cuda,cpu"),
    ],
)
def test_an_accelerator_counts_when_it_is_present_and_supported(
    files: list[str], installed: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fnmatch

    monkeypatch.setattr(platform.glob, "glob", lambda pattern: fnmatch.filter(files, pattern))
    monkeypatch.setattr(platform.importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert platform.detect_platforms() == chosen


def test_an_empty_choice_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(platform, "detect_platforms", lambda: "chosen")
    platform.prepare()
    assert os.environ["JAX_PLATFORMS"] == "chosen"


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here")
    platform.prepare(num_virtual_devices=4)
    assert os.environ["JAX_PLATFORMS"] == "tpu"
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=here --xla_force_host_platform_device_count=4"


def test_the_cpu_compiles_at_a_lower_level_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    platform.prepare()
    assert os.environ["XLA_FLAGS"] == "--xla_backend_optimization_level=1"
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    platform.prepare()
    assert os.environ["XLA_FLAGS"] == "--xla_backend_optimization_level=3"
