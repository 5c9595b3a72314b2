"""Names of topologies, and topologies as libtpu describes them."""

from __future__ import annotations

import importlib.util

import pytest

from llmjax.core.errors import ConfigError, RunError
from llmjax.models.flops import peak_flops
from llmjax.plan import topology

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.mark.parametrize("name", ["v5p", "v5p:4x4", "v6e:2x2x2", "v9:2x2", "v5p:4x4x", "v5p:0x1x1", ""])
def test_a_name_that_is_none_says_what_would_fit(name: str) -> None:
    with pytest.raises(ConfigError, match="v5p:AxBxC"):
        topology.parse(name)


def test_without_libtpu_there_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'llmjax\[plan\]'"):
        topology.load("v5p:4x4x4")


@needs_libtpu
@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [("v5p:4x4x4", 64, 64), ("v4:2x2x1", 4, 4), ("v5e:4x4", 16, 16), ("v6e:8x8", 64, 64), ("tpu7x:2x2x1", 4, 8)],
)
def test_slices_have_their_chips_and_a_known_peak(name: str, chips: int, devices: int) -> None:
    loaded = topology.load(name)
    assert (loaded.num_chips, len(loaded.devices)) == (chips, devices)
    assert peak_flops(loaded.devices[0].device_kind)


@needs_libtpu
@pytest.mark.tpu_compile
def test_a_slice_that_libtpu_refuses_is_named() -> None:
    with pytest.raises(RunError, match="v5p:3x4x4"):
        topology.load("v5p:3x4x4")
