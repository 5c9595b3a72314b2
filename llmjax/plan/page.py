"""The plan as one HTML page that needs nothing beside it: no scripts, no images; bars are boxes of a width."""

from __future__ import annotations

import dataclasses

from llmjax.plan.chips import GIB
from llmjax.plan.report import METHODS, Plan

COLOURS = ("#2b6cb0", "#63a4e0", "#b7d4f0", "#dd8a3c", "#8f9bab")

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{{ plan.name }} on {{ plan.topology }} – llmjax plan</title>
<style>
:root { color-scheme: light; --ink: #22272e; --soft: #5b6673; --line: #d5dae1; --accent: #2b6cb0; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p, small { color: var(--soft); margin: .4rem 0; }
.figures { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin: 1.2rem 0; }
.figures div { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.figures b { display: block; font-size: 1.35rem; font-weight: 650; color: var(--accent); }
.figures span { font-size: .85rem; color: var(--soft); }
.objection { border-left: .3rem solid #c0392b; padding: .3rem .8rem; margin: .5rem 0; background: #fdf3f2; }
.stack { display: flex; height: 2.2rem; border: 1px solid var(--line); border-radius: .4rem; overflow: hidden; }
.stack i { display: block; height: 100%; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none; margin: .6rem 0; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .4rem; }
.bars { display: grid; grid-template-columns: minmax(8rem, 20rem) 1fr 5rem; gap: .35rem .8rem; align-items: center;
  font-size: .92rem; }
.bars i { display: block; height: 1rem; border-radius: .2rem; min-width: 2px; }
.bars b { font-weight: 500; text-align: right; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; overflow-wrap: normal; }
.wide th, .wide td { white-space: nowrap; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .8rem .35rem 0; text-align: left; vertical-align: top; }
th { font-weight: 500; color: var(--soft); }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
code { font-size: .88em; }
@media (max-width: 560px) {
  .bars { grid-template-columns: 1fr 4.5rem; }
  .bars span { grid-column: 1 / -1; margin-bottom: -.3rem; }
  .wide td, .wide th { padding-right: .6rem; }
}
</style>
</head>
<body>
<h1>{{ plan.name }} on {{ plan.topology }}</h1>
<p>{{ plan.chips }} chips, {{ mesh }}, remat {{ plan.remat }}, {{ plan.accumulation }} microbatch(es);
{{ "{:,}".format(plan.num_params) }} parameters, {{ "{:,}".format(plan.tokens_per_step) }} tokens a step. Nothing here
was measured on a chip: each figure names its source below.</p>
{% for objection in plan.objections -%}
<p class="objection"><b>{{ objection.name }}</b>: {{ objection.text }}</p>
{% endfor -%}
<div class="figures">
{% for label, value in figures -%}
<div><b>{{ value }}</b><span>{{ label }}</span></div>
{% endfor -%}
</div>
<h2>Memory of a chip</h2>
<div class="stack" role="img" aria-label="{{ memory_label }}">
{% for part in memory -%}
<i style="width:{{ part.share }}%;background:{{ part.colour }}" title="{{ part.name }}"></i>
{% endfor -%}
</div>
<ul class="key">
{% for part in memory -%}
<li><i style="background:{{ part.colour }}"></i>{{ part.name }} {{ part.value }}</li>
{% endfor -%}
</ul>
<p>{{ memory_label }}</p>
<h2>Where a step's time goes</h2>
<div class="bars">
{% for bar in time -%}
<span>{{ bar.name }}</span><i style="width:{{ bar.share }}%;background:{{ bar.colour }}"></i><b>{{ bar.value }}</b>
{% endfor -%}
</div>
<p>Blue: compute, by the compiler's estimates. Orange: communication that computation does not cover.</p>
<h2>Collectives of a step</h2>
<div class="wide"><table>
<thead><tr><th>kind</th><th>mesh axis</th><th>dtype</th><th class="n">count</th><th class="n">GB</th>
<th class="n">on the wire, s</th><th class="n">exposed, s</th><th>async</th></tr></thead><tbody>
{% for c in plan.collectives -%}
<tr><td>{{ c.kind }}</td><td>{{ c.axis }}</td><td>{{ c.dtype }}</td><td class="n">{{ c.count }}</td>
<td class="n">{{ "%.3f" % (c.bytes / 1e9) }}</td><td class="n">{{ "%.4f" % c.seconds }}</td>
<td class="n">{{ "%.4f" % c.exposed_seconds }}</td><td>{{ "yes" if c.asynchronous else "no" }}</td></tr>
{% endfor -%}
</tbody></table></div>
<h2>Cost, energy, failures</h2>
<table><tbody>
{% for label, value in money -%}
<tr><th scope="row">{{ label }}</th><td>{{ value }}</td></tr>
{% endfor -%}
</tbody></table>
<h2>Parameters on the mesh</h2>
<div class="wide"><table>
<thead><tr><th>parameter</th><th>shape</th><th>mesh axis of each dim</th><th class="n">MB a device</th></tr></thead>
<tbody>
{% for row in plan.parameters -%}
<tr><td><code>{{ row.path }}</code></td><td>{{ row.shape | join(" x ") }}</td><td>{{ row.sharding }}</td>
<td class="n">{{ "%.2f" % (row.bytes_per_device / 1e6) }}</td></tr>
{% endfor -%}
</tbody></table></div>
<h2>Where the figures come from</h2>
<table><tbody>
{% for label, value in methods.items() -%}
<tr><th scope="row">{{ label.replace("_", " ") }}</th><td>{{ value }}</td></tr>
{% endfor -%}
<tr><th scope="row">unknown</th><td>input, host and stragglers</td></tr>
<tr><th scope="row">versions</th><td>{% for name, version in plan.versions.items() %}{{ name }} {{ version }}{{
", " if not loop.last }}{% endfor %}; compiled in {{ "%.0f" % plan.compile_seconds }} s</td></tr>
</tbody></table>
</body>
</html>
"""


@dataclasses.dataclass(frozen=True)
class Bar:
    """A box of a width in percent."""

    name: str
    value: str
    share: float
    colour: str


def html_page(plan: Plan) -> str:
    """The page as text; every value is escaped."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True)
    hbm = plan.hbm_bytes_per_chip
    return environment.from_string(TEMPLATE).render(
        plan=plan, methods=METHODS, figures=_figures(plan), memory=_memory(plan), time=_time(plan), money=_money(plan),
        mesh=", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device",
        memory_label=f"{hbm.total / GIB:.1f} of {hbm.capacity / GIB:.0f} GiB")  # fmt: skip


def _figures(plan: Plan) -> list[tuple[str, str]]:
    hbm = plan.hbm_bytes_per_chip
    return [
        ("seconds a step", f"{plan.step_seconds:.3f}"),
        ("estimated MFU", f"{plan.estimated_mfu:.1%}"),
        ("tokens a second", f"{plan.tokens_per_second:,.0f}"),
        ("GiB a chip", f"{hbm.total / GIB:.1f} of {hbm.capacity / GIB:.0f}"),
        ("bound by", plan.bound),
        ("days", f"{plan.failures.days:.1f}"),
        ("dollars on demand", f"{plan.cost.dollars:,.0f}"),
    ]


def _memory(plan: Plan) -> list[Bar]:
    capacity = plan.hbm_bytes_per_chip.capacity
    return [Bar(name, f"{size / GIB:.2f} GiB", round(100 * size / capacity, 3), colour)
            for (name, size), colour in zip(plan.hbm_by_kind.items(), COLOURS, strict=False)]


def _time(plan: Plan) -> list[Bar]:
    """The longest op groups, the rest together, then what each collective exposes."""
    parts = [(op.name, op.seconds, COLOURS[0]) for op in plan.ops[:10]]
    rest = sum(op.seconds for op in plan.ops[10:])
    parts += [("other compute", rest, COLOURS[2])] if rest else []
    parts += [(f"{c.kind} over {c.axis}", c.exposed_seconds, COLOURS[3]) for c in plan.collectives
              if c.exposed_seconds > 1e-3 * plan.step_seconds]  # fmt: skip
    longest = max((seconds for _, seconds, _ in parts), default=1.0)
    return [Bar(name, f"{seconds:.3f} s", round(100 * seconds / longest, 2), colour) for name, seconds, colour in parts]


def _money(plan: Plan) -> list[tuple[str, str]]:
    cost, carbon, expected = plan.cost, plan.carbon, plan.failures
    reserved = f"; {cost.dollars_reserved:,.0f} reserved for three years" if cost.dollars_reserved else ""
    return [
        ("final run", f"{cost.dollars:,.0f} dollars for {cost.chip_hours:,.0f} chip-hours at "
                      f"{cost.dollars_per_chip_hour:.2f}{reserved}"),
        ("with all around it", f"{cost.total.low:,.0f} to {cost.total.high:,.0f} dollars: failed runs, restarts, "
                               "experiments, post-training, serving"),
        ("energy", f"{carbon.kwh.low:,.0f} to {carbon.kwh.high:,.0f} kWh"),
        ("carbon", f"{carbon.kg_co2eq.low:,.0f} to {carbon.kg_co2eq.high:,.0f} kg CO2eq, of which embodied "
                   f"{carbon.kg_co2eq_embodied.low:,.0f} to {carbon.kg_co2eq_embodied.high:,.0f}"),
        ("failures", f"{expected.expected:.1f} expected in {expected.days:.1f} days; saving every "
                     f"{expected.interval_steps:,} steps leaves {expected.goodput:.1%} of the time for training, as "
                     f"configured {expected.goodput_as_configured:.1%}"),
        ("prices", f"{cost.region}, {cost.date}"),
    ]  # fmt: skip
