"""The report of a run: one HTML page that needs nothing beside it, readable on a phone and on a desk."""

from __future__ import annotations

import base64
from pathlib import Path

from llmjax.core.files import write_atomic
from llmjax.track import cards, goodput, plots
from llmjax.track.progress import duration
from llmjax.track.run import Facts, short

FILE = "report.html"
LOSS = "loss.png"

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} – llmjax</title>
<style>
:root { color-scheme: light; --ink: #22272e; --soft: #5b6673; --line: #d5dae1; --accent: #2b6cb0; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; color: var(--soft); }
.figures { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin: 1.2rem 0; }
.figures div { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.figures b { display: block; font-size: 1.35rem; font-weight: 650; color: var(--accent); }
.figures span { font-size: .85rem; color: var(--soft); }
img { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem .35rem 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--soft); }
tbody th { width: 34%; }
pre { background: #f5f7f9; border-radius: .5rem; padding: .8rem; font-size: .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 0; }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p>{{ what }}</p>
<div class="figures">
{% for label, value in figures -%}
<div><b>{{ value }}</b><span>{{ label }}</span></div>
{% endfor -%}
</div>
{% if wide -%}
<h2>Loss</h2>
<picture>
<source media="(max-width: 600px)" srcset="data:image/png;base64,{{ narrow }}">
<img alt="Training and held-out loss and the learning rate over the steps" src="data:image/png;base64,{{ wide }}">
</picture>
{% endif -%}
{% for title, rows in sections if rows -%}
<h2>{{ title }}</h2>
<table><tbody>
{% for label, value in rows -%}
<tr><th scope="row">{{ label }}</th><td>{{ value }}</td></tr>
{% endfor -%}
</tbody></table>
{% endfor -%}
{% if sources -%}
<h2>Data</h2>
<div class="wide"><table>
<thead><tr><th>source</th><th>licence</th><th>documents</th><th>tokens</th></tr></thead>
<tbody>
{% for s in sources -%}
<tr><td>{{ s.name }}</td><td>{{ s.licence }}</td><td>{{ "{:,}".format(s.documents) }}</td>\
<td>{{ "{:,}".format(s.tokens) }}</td></tr>
{% endfor -%}
</tbody></table></div>
{% endif -%}
{% if sample -%}
<h2>A sample, drawn once and not picked</h2>
<pre>{{ sample }}</pre>
{% endif -%}
<h2>Logbook</h2>
<pre>{{ logbook }}</pre>
</body>
</html>
"""


def html_report(facts: Facts) -> str:
    """report.html as text; every value is escaped."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True)
    logbook = facts.workdir / "logbook.md"
    return environment.from_string(TEMPLATE).render(
        name=facts.config.name, what=cards.WHAT[facts.config.task.name], figures=_figures(facts),
        wide=_inline(facts, "wide"), narrow=_inline(facts, "narrow"), sections=_sections(facts),
        sources=facts.manifest.get("sources", []), sample=facts.results.get("sample", ""),
        logbook=logbook.read_text(encoding="utf-8") if logbook.exists() else "")


def write_report(workdir: Path) -> list[Path]:
    """Draw loss.png and write card.md and report.html from what the workdir holds; returns the paths written."""
    facts = Facts.load(workdir)
    picture = workdir / LOSS
    picture.write_bytes(plots.loss_curve(facts.metrics, title=_title(facts)))
    write_atomic(workdir / FILE, html_report(facts))
    return [picture, workdir / FILE, cards.write_card(facts)]  # the card last: a run that has one is complete


def _title(facts: Facts) -> str:
    size = facts.results.get("num_params")
    return f"{facts.config.name}, {short(size)} parameters" if size else facts.config.name


def _inline(facts: Facts, width: plots.Width) -> str:
    return base64.b64encode(plots.loss_curve(facts.metrics, title=_title(facts), width=width)).decode()


def _figures(facts: Facts) -> list[tuple[str, str]]:
    """The few numbers that come first, as label and value."""
    results, figures = facts.results, []
    if "held_out_loss" in results:
        figures.append(("held-out loss, nats a target", f"{results['held_out_loss']:.4f}"))
    if "bits_per_byte" in results:
        figures.append(("held-out bits per byte", f"{results['bits_per_byte']:.4f}"))
    if "gzip_bits_per_byte" in results:
        figures.append(("bits per byte of gzip -9", f"{results['gzip_bits_per_byte']:.4f}"))
    if "loss" in facts.metrics:
        figures.append(("last training loss", f"{facts.metrics['loss'].last:.4f}"))
    figures.append(("steps", f"{facts.config.train.steps:,}"))
    if "num_params" in results:
        figures.append(("parameters", short(results["num_params"])))
    if "seconds" in results:
        figures.append(("training time", duration(results["seconds"])))
    if facts.footprint:
        figures.append(("energy", f"{facts.footprint.kwh * 1000:.3g} Wh"))
    return figures


def _sections(facts: Facts) -> list[tuple[str, list[tuple[str, str]]]]:
    results = [(name.replace("`", ""), value.replace("*", "")) for name, value in cards.result_rows(facts.results)]
    used = facts.footprint
    energy = [("energy", f"{used.kwh * 1000:.3g} Wh"), ("carbon", f"{used.kg_co2eq * 1000:.3g} g CO2eq"),
              ("measured", duration(used.seconds)), ("method", used.method)] if used else []
    return [("Results", results), ("Model", cards.model_rows(facts)), ("Training", cards.training_rows(facts)),
            ("Predicted and measured", facts.results.get("prediction", [])),
            ("Where the time went", goodput.rows(facts.workdir)), ("Energy and carbon", energy),
            ("Provenance", cards.lineage_rows(facts))]
