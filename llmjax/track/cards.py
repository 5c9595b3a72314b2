"""The model card: what was made, from what, how, how good it is, what it cost and what it must not be used for.

After Mitchell et al. 2019, "Model Cards for Model Reporting"; the head is the metadata block of the Hugging Face Hub.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from llmjax.core.files import write_atomic
from llmjax.core.sections import Config, ModelConfig
from llmjax.track.lineage import versions
from llmjax.track.progress import duration
from llmjax.track.run import Facts, short

FILE = "card.md"

TEMPLATE = """\
---
library_name: llmjax
pipeline_tag: text-generation
tags: [llmjax, {{ task }}]
---
# {{ config.name }}

{{ what }}

## Model

| | |
|---|---|
{% for name, value in model_rows -%}
| {{ name }} | {{ value }} |
{% endfor %}
## Data

{% if parent -%}
The weights began as those of [{{ parent.name }}]({{ config.train.init_from }}/card.md), whose card names its data.

{% endif -%}
{% if manifest -%}
| source | licence | documents | bytes | tokens |
|---|---|---:|---:|---:|
{% for s in manifest.sources -%}
| {{ s.name }} | {{ s.licence }} | {{ count(s.documents) }} | {{ count(s.bytes) }} | {{ count(s.tokens) }} |
{% endfor -%}
{% for s in manifest.holdout -%}
| {{ s.name }}, held out | {{ s.licence }} | {{ count(s.documents) }} | {{ count(s.bytes) }} | |
{% endfor %}
{% for s in provenance -%}
- {{ s.name }}: {{ s.provenance }}
{% endfor -%}
{% if manifest.dropped %}
Left out of training: {% for reason, number in manifest.dropped.items() %}{{ count(number) }} {{ reason
}}{{ ", " if not loop.last }}{% endfor %}.
{% endif -%}
{% else -%}
No manifest lies with this run; the config names `{{ config.data.path or config.data.sources }}`.
{% endif %}
## Training

| | |
|---|---|
{% for name, value in training_rows -%}
| {{ name }} | {{ value }} |
{% endfor %}
![Loss over the steps](loss.png)

## Results

{% if result_rows -%}
| | |
|---|---|
{% for name, value in result_rows -%}
| {{ name }} | {{ value }} |
{% endfor -%}
{% else -%}
Nothing was measured on held-out documents.
{% endif -%}
{% if results.sample %}
A sample, drawn once and not picked:

{{ fenced }}
{% endif %}
## Energy and carbon

{% if footprint -%}
{{ "%.3g" | format(footprint.kwh * 1000) }} Wh and {{ "%.3g" | format(footprint.kg_co2eq * 1000) }} g CO2eq over \
{{ duration(footprint.seconds) }} that were measured. Method: {{ footprint.method }}.
{%- else -%}
Not measured.
{%- endif %}

## Use

```
llmjax {{ use }}
llmjax eval --workdir={{ workdir }}
llmjax export-hf --workdir={{ workdir }} --out=exported
```

## Limits

{{ limits }}

## Provenance

| | |
|---|---|
{% for name, value in lineage_rows -%}
| {{ name }} | {{ value }} |
{% endfor -%}
"""

WHAT = {
    "pretrain": "A decoder-only language model, trained from scratch to predict the next token of its corpus.",
    "sft": "A decoder-only language model, fine-tuned on conversations with the loss on the assistant's turns alone.",
    "dpo": "A decoder-only language model, tuned towards preferred answers with direct preference optimisation.",
}
LIMITS = {
    "pretrain": "It continues text and was not taught to follow instructions.",
    "sft": "It answers in the manner of its examples; nothing was done to make the answers true or harmless.",
    "dpo": "It prefers what its pairs prefer; nothing was done to make the answers true or harmless.",
}
ALWAYS = ("What it writes can be wrong, biased, insecure or copied from its training data. Evaluation covers only what "
          "stands under Results. Check the licences under Data before passing on the model or its output.")


def model_card(facts: Facts) -> str:
    """card.md as text."""
    import jinja2

    config = facts.config
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    provenance = [source for source in facts.manifest.get("sources", []) if source["provenance"] != source["name"]]
    use = f"generate --workdir={facts.workdir} --prompt={shlex.quote(config.eval.prompt or 'def ')}"
    return environment.from_string(TEMPLATE).render(
        config=config, task=config.task.name, what=WHAT[config.task.name], manifest=facts.manifest,
        results={"sample": ""} | facts.results, footprint=facts.footprint, workdir=facts.workdir, use=use,
        parent=facts.lineage and facts.lineage.parent, provenance=provenance, model_rows=model_rows(facts),
        training_rows=training_rows(facts), result_rows=result_rows(facts.results), lineage_rows=lineage_rows(facts),
        limits=f"{LIMITS[config.task.name]} {ALWAYS}", count=lambda number: f"{number:,}", duration=duration,
        fenced=fenced(facts.results.get("sample", "")))


def write_card(facts: Facts) -> Path:
    """Write card.md into the workdir."""
    path = facts.workdir / FILE
    write_atomic(path, model_card(facts))
    return path


def fenced(text: str) -> str:
    """A Markdown code block that holds `text` whatever it contains."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def model_rows(facts: Facts) -> list[tuple[str, Any]]:
    """Sizes, as name and value."""
    model = facts.config.model
    rows = [("parameters", short(facts.results["num_params"]))] if "num_params" in facts.results else []
    return rows + [
        ("layers, width, MLP width", f"{model.num_layers}, {model.dim}, {model.mlp_dim}"),
        ("query heads, key/value heads, head width", f"{model.num_heads}, {model.num_kv_heads}, {model.head_dim}"),
        ("vocabulary", f"{model.vocab_size:,} pieces, embeddings {model.embeddings}"),
        ("longest context", f"{model.max_seq_len:,} tokens"),
        ("precision", f"{model.compute_dtype} compute, {model.param_dtype} parameters"),
        ("architecture", architecture(model)),
    ]


def architecture(model: ModelConfig) -> str:
    """The parts of a decoder in words."""
    attention, moe = model.attention, model.moe
    heads = "grouped-query" if model.num_kv_heads != model.num_heads else "multi-head"
    parts = [
        {"rms": "RMSNorm", "layer": "LayerNorm"}[model.norm.kind],
        f"{model.positions} positions",
        f"{'latent' if model.latent.kv_lora_rank else heads} attention",
        f"windows of {attention.window} tokens" if attention.window else "",
        model.activation,
        f"{moe.num_experts} experts of which {moe.top_k} a token" if moe.num_experts else "",
    ]
    return ", ".join(part for part in parts if part)


def training_rows(facts: Facts) -> list[tuple[str, Any]]:
    """How it was trained, as name and value."""
    config, results = facts.config, facts.results
    rows = [("steps", f"{config.train.steps:,} of {config.data.batch_size} rows of {config.data.seq_len} tokens"),
            ("optimiser", _optimiser(config)), ("seed", config.train.seed)]
    if "tokens" in results:
        rows.append(("tokens learnt from", short(results["tokens"])))
    if "device" in results:
        rows.append(("device", results["device"]))
    if "seconds" in results:
        rows.append(("time", duration(results["seconds"])))
    if "tokens_per_second" in facts.metrics:
        rows.append(("speed at the end", f"{facts.metrics['tokens_per_second'].last:,.0f} tokens/s"))
    return rows


def _optimiser(config: Config) -> str:
    optim = config.optim
    return (f"{optim.name}, learning rate {optim.learning_rate:g} ({optim.schedule}, {optim.warmup_steps} warm-up "
            f"steps), weight decay {optim.weight_decay:g}, clipping at {optim.clip_norm:g}")


def result_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured on held-out documents, as name and value."""
    rows = []
    if "held_out_loss" in results:
        rows.append(("held-out loss, nats a target", f"**{results['held_out_loss']:.4f}**"))
    if "bits_per_byte" in results:
        rows.append(("bits per byte", f"**{results['bits_per_byte']:.4f}**"))
    if "gzip_bits_per_byte" in results:
        gain = 1 - results["bits_per_byte"] / results["gzip_bits_per_byte"]
        rows.append(("bits per byte of `gzip -9`", f"{results['gzip_bits_per_byte']:.4f} "
                     f"(the model is {abs(gain):.1%} {'below' if gain > 0 else 'above'})"))
    if "perplexity" in results:
        rows.append(("perplexity of a token", f"{results['perplexity']:.3f}"))
    if "held_out_documents" in results:
        rows.append(("over", f"{results['held_out_documents']:,} whole documents, "
                     f"{results['held_out_bytes']:,} bytes"))
    return rows


def lineage_rows(facts: Facts) -> list[tuple[str, str]]:
    """Hashes and versions, as name and value."""
    lineage = facts.lineage
    if lineage is None:
        return [("versions", _listed(versions()))]
    rows = [("config", lineage.config_hash), ("data", lineage.data_hash), ("tokenizer", lineage.tokenizer_hash),
            ("commit of llmjax", lineage.commit), ("versions", _listed(lineage.versions)),
            ("descends from", ", ".join(parent.name for parent in lineage.generations[1:]))]
    return [(name, value) for name, value in rows if value]


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())
