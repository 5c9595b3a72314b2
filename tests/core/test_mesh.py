"""How axes are laid along the torus of the chips."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from llmjax.core.errors import ConfigError
from llmjax.core.mesh import MESH_AXES, axis_size, make_mesh, split_fsdp
from llmjax.core.sections import AXIS_NAMES, MeshConfig


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
