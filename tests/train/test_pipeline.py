"""What the 1f1b schedule is for: memory that does not grow with the number of microbatches."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import pytest

from llmjax.core.mesh import make_mesh
from llmjax.core.sections import MeshConfig
from llmjax.models.decoder import abstract_model
from llmjax.models.stack import execution_of
from llmjax.plan.compile import abstract_batch
from llmjax.train.build import build_training
from llmjax.train.pretrain import make_loss
from tests.check.matrix import change

MESH = MeshConfig(stage=4, data=1)
ROWS = 4  # of a microbatch


def temp_bytes(schedule: Literal["gpipe", "1f1b"], *, num_microbatches: int) -> int:
    """Of loss and gradient on one device, as the CPU's compiler lays them out."""
    config = change(mesh=dataclasses.asdict(dataclasses.replace(MESH, schedule=schedule)),
                    data={"batch_size": ROWS * num_microbatches, "seq_len": 64},
                    train={"accumulation": num_microbatches, "remat": "full"})  # fmt: skip
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    with jax.set_mesh(mesh):
        model = abstract_model(config.model)
        training = build_training(config, model, make_loss(config.task, execution=execution_of(config)))
        step = jax.jit(training.gradients).lower(training.abstract_state(mesh), {}, abstract_batch(config, mesh))
        analysis = step.compile().memory_analysis()
    assert analysis
    return analysis.temp_size_in_bytes


@pytest.mark.slow
def test_memory_grows_with_the_microbatches_of_gpipe_and_hardly_with_those_of_1f1b() -> None:
    few, many = ({name: temp_bytes(name, num_microbatches=M) for name in ("gpipe", "1f1b")} for M in (8, 32))
    print(few, many)
    a_row = 64 * 16 * 4  # one activation of one row, bytes
    assert many["gpipe"] - few["gpipe"] > 2 * 24 * ROWS * a_row
    # What grows are the batch's six arrays of one number a token.
    assert many["1f1b"] - few["1f1b"] < ROWS * 24 * 64 * 4 * 12
    assert many["1f1b"] < 0.5 * many["gpipe"]
