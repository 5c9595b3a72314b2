"""Every objection is raised by a run that deserves it, and by none that does not."""

from __future__ import annotations

import dataclasses

import pytest

from llmjax.core.sections import Config, ModelConfig
from llmjax.plan.objections import Claim, claim_of, needed_mfu, objections

H100 = 989e12
SOUND = Claim(num_params=8e9, tokens=160e9, unique_tokens=160e9, chips=64, peak_flops=459e12, seconds=10 * 86_400,
              seq_len=8192, rope_theta=500_000.0, tensor=4, chips_per_slice=64, packing="masked",
              checkpoint_bytes=96e9)  # fmt: skip


def test_nothing_is_said_against_a_sound_run() -> None:
    assert objections(SOUND) == ()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mfu", {"seconds": 86_400 / 2}),
        ("epochs", {"unique_tokens": 30e9}),
        ("sizing", {"tokens": 1e9, "unique_tokens": None}),
        ("sizing", {"tokens": 2e12, "unique_tokens": None, "seconds": None}),
        ("rope", {"rope_theta": 10_000.0}),
        ("rope", {"rope_context": 4096.0}),
        ("tensor", {"tensor": 128}),
        ("packing", {"packing": "unmasked"}),
        ("checkpoint", {"checkpoint_bytes": 16e9}),
    ],
)
def test_each_mistake_is_named_and_alone(name: str, change: dict) -> None:
    assert [objection.name for objection in objections(dataclasses.replace(SOUND, **change))] == [name]


def test_saying_why_takes_the_objection_back() -> None:
    small = dataclasses.replace(SOUND, tokens=2e12, unique_tokens=None, seconds=None, sized_for="serving")
    assert objections(small) == ()


def test_a_run_that_needs_257_percent() -> None:
    claim = Claim(num_params=70e9, tokens=15e12, chips=1900, peak_flops=H100, seconds=60 * 86_400, flops=2.5e25,
                  sized_for="inference")
    assert needed_mfu(claim) == pytest.approx(2.57, abs=0.005)
    (objection,) = objections(claim)
    assert "257% MFU" in objection.text


def test_what_a_config_claims() -> None:
    config = Config(model=ModelConfig(vocab_size=1000, rope_theta=10.0))
    claim = claim_of(config, num_params=100, chips=4, peak_flops=1e12, flops=1e12, seconds=2.0)
    assert claim.tokens == 1000 * 8 * 512 and claim.flops == 4e15
    assert {objection.name for objection in objections(claim)} == {"rope", "sizing"}
    assert needed_mfu(claim) == pytest.approx(0.5)
