"""How axes are laid along the torus of the chips."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest

from llmjax.core.errors import ConfigError
from llmjax.core.mesh import MESH_AXES, axis_size, check_fits, make_mesh, split_fsdp
from llmjax.core.sections import AXIS_NAMES, MeshConfig
from tests.check.matrix import change


@pytest.mark.parametrize(("sizes", "torus", "parts"), [
    ({"fsdp": 64}, (4, 4, 4), (4, 4, 4)),
    ({"fsdp": 16, "tensor": 4}, (4, 4, 4), (4, 4, 1)),
    ({"fsdp": 32, "tensor": 2}, (4, 4, 4), (4, 4, 2)),
    ({"fsdp": 8, "tensor": 8}, (4, 4, 4), (4, 2, 1)),
    ({"fsdp": 256}, (16, 16), (16, 16, 1)),
    ({"fsdp": 16, "data": 16}, (16, 16), (16, 1, 1)),
    ({"fsdp": 8}, (), (8, 1, 1)),
    ({"fsdp": 1, "data": 64}, (4, 4, 4), (1, 1, 1)),
])  # fmt: skip
def test_fsdp_takes_what_the_others_leave_of_the_torus(
    sizes: dict[str, int], torus: tuple[int, ...], parts: tuple[int, int, int]
) -> None:
    assert split_fsdp(dict.fromkeys(AXIS_NAMES, 1) | sizes, torus) == parts


def test_a_split_axis_counts_as_one() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2, torus="2x2x2"))
    assert tuple(mesh.axis_names) == MESH_AXES
    assert (mesh.shape["fsdp"], mesh.shape["fsdp_y"], axis_size(mesh, "fsdp")) == (2, 2, 4)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a slice."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def test_only_slice_and_stage_cross_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmjax.core.mesh.Mesh", lambda grid, *_, **__: grid)
    chips = [Chip(i, slice_index=i % 2) for i in range(8)]
    for config in (MeshConfig(slice=2, data=1, fsdp=2, tensor=2), MeshConfig(stage=4, data=1, tensor=2)):
        grid = make_mesh(config, chips).reshape(2, -1)  # type: ignore[arg-type]
        assert [{chip.slice_index for chip in row} for row in grid.tolist()] == [{0}, {1}]
    with pytest.raises(ConfigError, match="2 slices; nearest: 2"):
        make_mesh(MeshConfig(data=8), chips)  # type: ignore[arg-type]


def test_eight_devices() -> None:
    assert make_mesh(MeshConfig()).shape["data"] == len(jax.devices())


WRONG: list[tuple[dict[str, dict[str, Any]], str]] = [
    ({"mesh": {"data": 3}}, r"mesh\.data=3: sizes multiply to 3, not a fit for 8 devices; products that fit: 1, 2, 4"),
    ({"mesh": {"data": 0}}, r"mesh\.data=0: a mesh axis is at least 1"),
    ({"mesh": {"data": -1, "fsdp": -1}}, r"mesh\.fsdp=-1: only one axis may be -1, and mesh\.data is already"),
    ({"mesh": {"data": 1, "tensor": 8}}, r"model\.num_heads=4: .*mesh\.tensor=8; nearest: 8"),
    ({"mesh": {"data": 1, "expert": 8}, "moe": {"num_experts": 4}}, r"model\.moe\.num_experts=4: .*=8; nearest: 8"),
    ({"mesh": {"data": 8}}, r"data\.batch_size=16: .*mesh\.data \* train\.accumulation=32; nearest: 32"),
    ({"mesh": {"data": 1, "stage": 8}}, r"model\.num_layers=4: .*mesh\.stage=8; nearest: 8"),
    ({"mesh": {"data": 4, "stage": 2, "rounds": 2}}, r"mesh\.rounds=2: mesh\.schedule=gpipe takes 1; .*circular"),
    ({"mesh": {"data": 1, "stage": 4, "tensor": 2, "schedule": "1f1b"}, "data": {"seq_len": 12}},
     r"data\.seq_len=12: .*mesh\.tensor \* mesh\.stage=8; nearest: 8, 16"),
    ({"mesh": {"data": 2, "context": 4}, "data": {"seq_len": 36}},
     r"data\.seq_len=36: .*2 \* mesh\.context=8; nearest: 32, 40"),
    ({"mesh": {"data": 2, "context": 4, "context_method": "ulysses"}, "model": {"num_heads": 2}},
     r"model\.num_heads=2: .*mesh\.context=4; nearest: 4"),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "says"), WRONG)
def test_a_wrong_mesh_is_one_line_that_names_the_field_and_what_fits(sections: dict, says: str) -> None:
    sections = dict(sections)
    config = change(data={"batch_size": 16})
    if moe := sections.pop("moe", None):
        config = change(model={"moe": dataclasses.replace(config.model.moe, **moe)})
    config = change(config, **sections)
    with pytest.raises(ConfigError, match=says) as raised:
        check_fits(config, make_mesh(config.mesh))
    assert "\n" not in str(raised.value)
