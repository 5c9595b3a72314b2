"""The ladder below a recipe, and predictions from it."""

from __future__ import annotations

import numpy as np
import pytest

from llmjax.core import config as configs
from llmjax.core.sections import Config, ModelConfig, TrainConfig
from llmjax.models.flops import num_params
from llmjax.plan import scout
from llmjax.plan.scaling import Run

TARGET = Config(model=ModelConfig(vocab_size=1000, num_layers=8, dim=512, num_heads=8, num_kv_heads=4, head_dim=64,
                                  mlp_dim=2048), train=TrainConfig(steps=1000))  # fmt: skip


def test_rungs_are_valid_configs_that_grow_towards_the_target() -> None:
    rungs = scout.ladder(TARGET, num_rungs=3, step=2.0)
    sizes = []
    for rung in rungs:
        small = configs.resolve(configs.to_dict(TARGET), rung.overrides)
        sizes.append(num_params(small.model))
        assert sizes[-1] == rung.num_params
        assert rung.tokens == small.train.steps * small.data.batch_size * small.data.seq_len
        assert small.train == TARGET.train
        assert small.model.num_heads % small.model.num_kv_heads == 0
    assert sizes == sorted(set(sizes)) and sizes[-1] < num_params(TARGET.model)


def test_a_target_without_room_below_it_says_so() -> None:
    tiny = Config(model=ModelConfig(vocab_size=10, num_layers=1, dim=8, num_heads=1, num_kv_heads=1, head_dim=2,
                                    mlp_dim=8))  # fmt: skip
    with pytest.raises(ValueError, match=r"model\.dim=8"):
        scout.ladder(tiny)


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.7])
def test_the_truth_lies_in_a_narrow_interval_whatever_the_floor(floor: float) -> None:
    rng = np.random.default_rng(1)
    def loss(size: float) -> float:
        return floor + 20 * size**-0.18

    runs = [Run(size, size * 20, loss(size) * float(np.exp(0.003 * rng.normal()))) for size in (1e6, 2e6, 4e6)]
    found = scout.predict(runs, at=8e6)
    assert found.low <= loss(8e6) <= found.high
    assert (found.high - found.low) / 2 < 0.03 * found.value


def test_two_runs_are_no_ladder() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        scout.predict([Run(1.0, 1.0, 1.0)] * 2, at=2.0)
