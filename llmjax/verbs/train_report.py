"""What stands around the loop of `llmjax train`: metrics, logbook and energy on the way, results and card last."""

from __future__ import annotations

import io
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmjax.core import config as configs
from llmjax.core.files import write_json
from llmjax.core.objective_rules import predicts_from_left
from llmjax.core.processes import first_alone, whole
from llmjax.core.sections import Config, EvalConfig
from llmjax.core.task import Params
from llmjax.data.build import data_folder
from llmjax.data.tokenizer import Tokenizer
from llmjax.evals import bits
from llmjax.evals.held_out import held_out_loss
from llmjax.evals.run import find_holdout
from llmjax.models import flops
from llmjax.models.decoder import Model
from llmjax.plan import predicted
from llmjax.serve.engine import Engine
from llmjax.serve.load import prompt_ids
from llmjax.serve.sampling import SamplingParams
from llmjax.track import goodput
from llmjax.track.carbon import CarbonMeter
from llmjax.track.cards import FILE as CARD
from llmjax.track.lineage import trace
from llmjax.track.logbook import Event, Logbook
from llmjax.track.memory import device_peak_bytes
from llmjax.track.metrics import FILE as METRICS
from llmjax.track.metrics import MultiWriter, open_writers, read_metrics
from llmjax.track.progress import ProgressLine, Stages
from llmjax.track.report import write_report
from llmjax.track.run import FILE as RESULTS
from llmjax.train import loop
from llmjax.train.state import TrainState, chosen_weights


class Session:
    """One process's share of a run, from start or resume to its end or its fall."""

    def __init__(self, config: Config, workdir: Path):
        self._config, self._workdir = config, workdir
        self._first = jax.process_index() == 0  # the one process of a run that writes and speaks
        self._carbon = CarbonMeter(workdir, config.track)

    def __enter__(self) -> Session:
        remark = self._carbon.start() if self._first else ""
        if remark:
            self._enter("warning", remark)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._carbon.stop()
        if error is not None:
            self._enter("stop", f"{type(error).__name__}: {error}")

    def _enter(self, event: Event, text: str) -> None:
        if self._first:
            Logbook(self._workdir).enter(event, text)

    def train(self, run: loop.Run, state: TrainState) -> TrainState:
        """Run the loop from `state` to the last step."""
        first = int(state.step)
        hashes = {name: run.meta[name] for name in ("data_hash", "tokenizer_hash")}
        if self._first:
            trace(self._config, **hashes).save(self._workdir)
            (self._workdir / CARD).unlink(missing_ok=True)  # a run that has its card is complete
        self._enter("resume" if first else "start",
                    f"at step {first:,} of {run.last_step:,} on {_devices()}, mesh {dict(run.mesh.shape)}")
        if first >= run.last_step:
            return state
        writer = open_writers(self._workdir, self._config.track, start_step=first) if self._first else MultiWriter([])
        progress = ProgressLine(run.last_step, start_step=first, stream=None if self._first else io.StringIO())
        began = time.monotonic()
        try:
            state = loop.fit(run, state, writer=writer, progress=progress)
        finally:
            progress.close()
            writer.close()
        self._enter("end", f"step {int(state.step):,} after {time.monotonic() - began:.0f} s of this process; "
                           f"{goodput.describe(goodput.read(self._workdir))}")
        return state

    def describe(self, run: loop.Run, state: TrainState, tokenizer: Tokenizer) -> None:
        """Evaluate held-out documents, sample a completion, draw the curves, write the card; print what counts."""
        params = whole(chosen_weights(state, self._config.eval.weights))  # on the host: what follows runs on one device
        first_alone("describe", lambda: self._describe(run, int(state.step), params, tokenizer))

    def _describe(self, run: loop.Run, steps: int, params: Params, tokenizer: Tokenizer) -> None:
        config = self._config
        results: dict[str, Any] = {"steps": steps, "num_params": flops.num_params(run.model.config),
                                   "device": _devices()}
        holdout = data_folder(config.data, self._workdir) / "holdout.parquet"
        if documents := find_holdout(holdout):
            results |= self._held_out(documents, run.model, params, tokenizer)
        if config.eval.prompt:
            results["sample"] = _sample(config.eval.prompt, Engine(run.model, params, tokenizer=tokenizer), tokenizer)
        results["prediction"] = _prediction(config, self._workdir)
        write_json(self._workdir / RESULTS, results)
        self._carbon.stop()
        written = write_report(self._workdir)
        self._enter("evaluation", ", ".join(f"{name} {value:.4g}" for name, value in results.items()
                                                    if isinstance(value, float)))
        print("\n".join([*_lines(results), "written: " + ", ".join(map(str, written))]))


    def _held_out(self, documents: list[bits.Document], model: Model, params: Params,
                  tokenizer: Tokenizer) -> dict[str, Any]:
        """Bits per byte where texts are predicted from left to right, else the objective's own loss."""
        config = self._config
        if predicts_from_left(config.model):
            return _bits(documents, model, params, tokenizer, config.eval, config.eval.seq_len or config.data.seq_len)
        folder = self._workdir / "held_out"
        return {"held_out_documents": len(documents),
                "held_out_bytes": sum(len(document.text.encode()) for document in documents),
                **held_out_loss(config, model, params, documents, tokenizer=tokenizer, folder=folder)}  # fmt: skip


def enter_changes(config: Config, workdir: Path) -> None:
    """Note in the logbook which fields of a run are others than when it began."""
    if (workdir / configs.CONFIG_FILE).exists():
        for path, (old, new) in configs.changes(configs.from_workdir(workdir), config).items():
            Logbook(workdir).enter("warning", f"{path} is {new!r} from here on, it was {old!r}")


def _prediction(config: Config, workdir: Path) -> list[tuple[str, str]]:
    """What was expected of a step beside what came, as label and text."""
    rates = read_metrics(workdir / METRICS).get("tokens_per_second")
    peak = device_peak_bytes()
    return predicted.compare(predicted.predict(config, workdir),
                             tokens_per_step=config.data.batch_size * config.data.seq_len,
                             tokens_per_second=float(np.median(rates.values)) if rates else None,
                             memory_gb=peak / 1e9 if peak else None)


def _devices() -> str:
    return f"{jax.device_count()} {jax.devices()[0].device_kind}"


def _lines(results: dict[str, Any]) -> list[str]:
    """The results as a person wants to read them at the end of a run."""
    lines = []
    if "bits_per_byte" in results:
        lines.append(f"held-out bits per byte {results['bits_per_byte']:.4f} "
                     f"({results['held_out_documents']} documents)")
    if "held_out_loss" in results:
        lines.append(f"held-out loss {results['held_out_loss']:.4f} nats a target "
                     f"({results['held_out_documents']} documents)")
    if "gzip_bits_per_byte" in results:
        lines.append(f"gzip -9, file by file   {results['gzip_bits_per_byte']:.4f} "
                     f"({1 - results['bits_per_byte'] / results['gzip_bits_per_byte']:+.1%} saved)")
    if "sample" in results:
        lines.append(f"a completion:\n{textwrap.indent(results['sample'], '    ')}")
    return lines


def _bits(documents: list[bits.Document], model: Model, params: Params, tokenizer: Tokenizer,
          config: EvalConfig, seq_len: int) -> dict[str, Any]:
    """Bits per byte and perplexity of whole documents, beside a file compressor's."""
    stages = Stages("eval")
    scored = bits.score_documents(model, params, documents, tokenizer=tokenizer, seq_len=seq_len, stride=config.stride,
                                  on_batch=lambda done, total: stages("held-out", done / (total + 1)))
    results = {"held_out_documents": len(documents), "held_out_bytes": scored.num_bytes,
               "bits_per_byte": scored.bits_per_byte, "perplexity": scored.perplexity}
    if config.compare == "gzip":
        results["gzip_bits_per_byte"] = bits.compressed_bits_per_byte([d.text for d in documents], "gzip")
    stages("held-out", 1.0, f"{scored.num_bytes:,} bytes in {len(documents)} documents")
    return results


def _sample(prompt: str, engine: Engine, tokenizer: Tokenizer) -> str:
    """A completion of the prompt, nucleus-sampled so that a small model does not loop."""
    params = SamplingParams(max_new_tokens=96, temperature=0.7, top_p=0.9, seed=0)
    text = engine.generate(prompt_ids(prompt, tokenizer, engine.model.config), params).text
    return f"{prompt} -> {text}" if engine.model.config.encoder_layers else prompt + text
