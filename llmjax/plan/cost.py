"""What a run costs in money, energy and carbon: chip-hours times the dated table of prices.json.

What nobody knows before a run is given as a range: power of chips that is not published, the grid behind a site,
experiments and failed runs beside the final one. Energy after Patterson et al. 2021: chip power times PUE times the
grid's intensity; the embodied share by the hours of the chip's life that the run takes (Luccioni et al. 2022).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal

from llmjax.core.errors import ConfigError

FILE = Path(__file__).parent / "prices.json"
Terms = Literal["on_demand", "reserved_1y", "reserved_3y"]

COST_METHOD = ("model: chips x step_seconds x steps at the dated prices of llmjax/plan/prices.json; "
               "overheads as ranges of shares of the final run")  # fmt: skip
CARBON_METHOD = ("model: chip-hours x power x PUE x grid intensity, plus the embodied share; ranges span what is not "
                 "published (power of most TPUs is an assumption)")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Range:
    """Lowest and highest plausible value."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Dollars of a run, the final one and all that comes with it."""

    chip: str
    chip_hours: float
    dollars_per_chip_hour: float  # on demand
    dollars: float  # the final run, on demand
    dollars_reserved: float | None  # at the three-year rate, where one is published
    overheads: dict[str, Range]  # dollars by cause, on demand
    total: Range  # with overheads; the low end is reserved where such a rate is published
    region: str
    date: str


@dataclasses.dataclass(frozen=True)
class Carbon:
    """Energy and greenhouse gases of the final run."""

    kwh: Range
    kg_co2eq_operational: Range
    kg_co2eq_embodied: Range
    kg_co2eq: Range


@functools.cache
def table() -> dict[str, Any]:
    """prices.json."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def price(chip: str, terms: Terms = "on_demand") -> float | None:
    """Dollars a chip-hour, None where no such rate is published; raises ConfigError for a chip without prices."""
    return _entry(chip)[terms]


def run_cost(chip: str, *, chip_hours: float) -> Cost:
    """What `chip_hours` of a final run cost, and what else has to be paid for it."""
    rate, reserved = price(chip), price(chip, "reserved_3y")
    assert rate is not None, "every chip has a rate on demand"
    dollars = chip_hours * rate
    shares = {name: share for name, share in table()["overheads"].items() if name != "source"}
    overheads = {name: Range(low * dollars, high * dollars) for name, (low, high) in shares.items()}
    least = 1 + sum(low for low, _ in shares.values())
    return Cost(chip, chip_hours, rate, dollars, chip_hours * reserved if reserved else None, overheads,
                total=Range(least * chip_hours * (reserved or rate), dollars + sum(r.high for r in overheads.values())),
                region=table()["region"], date=table()["date"])  # fmt: skip


def run_carbon(chip: str, *, chip_hours: float) -> Carbon:
    """Energy and carbon of `chip_hours`."""
    entry, (pue_low, pue_high) = _entry(chip), table()["pue"]
    watts, embodied = Range(*entry["watts"]), Range(*entry["embodied_kg"])
    grid, life = table()["kg_co2eq_per_kwh"], table()["lifetime_hours"]
    kwh = Range(chip_hours * watts.low / 1000 * pue_low, chip_hours * watts.high / 1000 * pue_high)
    used = Range(kwh.low * grid[0], kwh.high * grid[-1])
    made = Range(chip_hours / life * embodied.low, chip_hours / life * embodied.high)
    return Carbon(kwh, used, made, Range(used.low + made.low, used.high + made.high))


def describe(cost: Cost, carbon: Carbon) -> list[str]:
    """Two lines for a person."""
    reserved = f", {cost.dollars_reserved:,.0f} reserved for three years" if cost.dollars_reserved else ""
    return [
        f"cost           {cost.dollars:,.0f} dollars for {cost.chip_hours:,.0f} chip-hours on demand{reserved}; with "
        f"experiments, failures and what follows {cost.total.low:,.0f} to {cost.total.high:,.0f} "
        f"[prices of {cost.date}, {cost.region}]",
        f"energy         {carbon.kwh.low:,.0f} to {carbon.kwh.high:,.0f} kWh; carbon {carbon.kg_co2eq.low:,.0f} to "
        f"{carbon.kg_co2eq.high:,.0f} kg CO2eq, {carbon.kg_co2eq_embodied.low:,.0f} to "
        f"{carbon.kg_co2eq_embodied.high:,.0f} of it embodied [model]",
    ]


def _entry(chip: str) -> dict[str, Any]:
    entries = table()["chips"]
    if chip not in entries:
        raise ConfigError(f"no prices for {chip!r}; {FILE.name} has {', '.join(entries)}")
    return entries[chip]
