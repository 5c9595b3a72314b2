"""Money, energy and carbon: published budgets, and ranges that keep their order."""

from __future__ import annotations

import pytest

from llmjax.core.errors import ConfigError
from llmjax.plan import cost


@pytest.mark.parametrize(
    ("chip", "chip_hours", "dollars"),
    [("h100", 100_000, 432_600), ("v5p", 100_000, 420_000), ("h800", 2.788e6, 12.06e6)],
)
def test_known_budgets(chip: str, chip_hours: float, dollars: float) -> None:
    assert cost.run_cost(chip, chip_hours=chip_hours).dollars == pytest.approx(dollars, rel=1e-3)


def test_reserved_is_cheaper_and_overheads_come_on_top() -> None:
    spent = cost.run_cost("v5p", chip_hours=1000)
    assert spent.dollars_reserved is not None and spent.dollars_reserved < spent.dollars < spent.total.high
    assert spent.total.low > spent.dollars_reserved
    assert set(spent.overheads) == {"failed_runs", "restarts", "experiments", "post_training", "serving"}


def test_energy_of_gpu_hours_is_power_times_pue() -> None:
    carbon = cost.run_carbon("h100", chip_hours=1000)
    assert carbon.kwh.low == pytest.approx(1000 * 0.7 * 1.09)
    assert carbon.kg_co2eq.low == pytest.approx(carbon.kwh.low * 0.08 + 1000 / 44_676 * 164)
    assert carbon.kwh.low < carbon.kwh.high and carbon.kg_co2eq.low < carbon.kg_co2eq.high


def test_every_chip_of_the_table_has_what_the_sums_need() -> None:
    for chip in cost.table()["chips"]:
        assert cost.run_cost(chip, chip_hours=1.0).total.low > 0
        assert cost.run_carbon(chip, chip_hours=1.0).kwh.low > 0


def test_a_chip_without_prices_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'abacus'.*v5p"):
        cost.price("abacus")
