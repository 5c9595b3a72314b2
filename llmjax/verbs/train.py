"""`llmjax train`: data, tokenizer, training, evaluation and the card of a run, from a config to a finished workdir."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from llmjax.core import config as configs
from llmjax.core.errors import ConfigError
from llmjax.core.objective_rules import check_objective, complete_data
from llmjax.core.sections import Config
from llmjax.verbs.common import add_run_arguments, open_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmjax.core.task import Params, Task
    from llmjax.data.tokenizer import Tokenizer
    from llmjax.models.decoder import Model
    from llmjax.train.loop import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.description = "Train what the config says. The same command goes on after a stop, from the last checkpoint."
    parser.epilog = "example: llmjax train --config=configs/quickstart.py --config.train.steps=100"
    add_run_arguments(parser)
    parser.add_argument("--profile", metavar="STEPS", default="",
                        help="trace these steps, FIRST:LAST, into <workdir>/profile for TensorBoard or Perfetto")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Train, evaluate and describe; returns the exit status."""
    config, workdir = open_run(args, overrides)
    config = _with_profile(config, args.profile)
    if _finished(workdir, config):
        print(f"{workdir} has finished its {config.train.steps:,} steps; next: {_next_command(config, workdir)}")
        print(workdir)
        return 0
    from llmjax.core.platform import join_processes, keep_compiled
    from llmjax.core.processes import first_alone

    keep_compiled(workdir / "compiled")
    join_processes()
    from llmjax.train.fault import restart_on_sigterm

    with restart_on_sigterm():  # the loop has its own way
        _train(config, workdir)
    first_alone("end", lambda: print(f"next: {_next_command(config, workdir)}\n{workdir}"))
    return 0


def _train(config: Config, workdir: Path) -> None:
    """All that a run does, from its data to its card."""
    tokenizer, config = _tokenizer(config, workdir)

    from llmjax.core.processes import first_alone
    from llmjax.train import loop
    from llmjax.verbs import train_report

    def leave_what_it_is() -> None:
        train_report.enter_changes(config, workdir)
        configs.save(config, workdir)
        tokenizer.save(workdir / "tokenizer")

    with train_report.Session(config, workdir) as session:
        prepared = prepare(config, workdir, tokenizer)
        with prepared.checkpointer:
            state = loop.start(prepared)
            first_alone("config", leave_what_it_is)  # not earlier: a run that is refused leaves the workdir as it was
            state = session.train(prepared, state)
        session.describe(prepared, state, tokenizer)


def _next_command(config: Config, workdir: Path) -> str:
    return f"llmjax generate --workdir={workdir} --prompt={shlex.quote(config.eval.prompt or 'def ')}"


def _with_profile(config: Config, steps: str) -> Config:
    named = re.fullmatch(r"(\d+):(\d+)", steps)
    if steps and not (named and int(named[1]) <= int(named[2])):
        raise ConfigError(f"--profile={steps}: name the first and the last step to trace, for example --profile=5:8")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, profile=steps)) if steps else config


def _finished(workdir: Path, config: Config) -> bool:
    """Whether the run that is asked for is complete; a complete run of another config is refused, by its fields.

    More steps than it has taken are no other run: it goes on. The card is written last, and first removed when a run
    goes on, so it alone says what is complete.
    """
    if not (workdir / "card.md").exists():
        return False
    before = configs.from_workdir(workdir)
    changes = configs.changes(before, config)
    if config.train.steps > before.train.steps:
        return False
    if changes:
        named = ", ".join(f"{path}={old!r}, not {new!r}" for path, (old, new) in list(changes.items())[:4])
        raise ConfigError(f"{workdir} has finished with {named}: name another --workdir, or give it more train.steps")
    return True


def _tokenizer(config: Config, workdir: Path) -> tuple[Tokenizer, Config]:
    """The run's tokenizer and the config with what follows from it or from the parent run."""
    from llmjax.core.processes import first_alone
    from llmjax.data.build import build, data_folder
    from llmjax.data.tokenizer import Tokenizer
    from llmjax.track.progress import Stages

    parent = config.train.init_from
    model = configs.from_workdir(Path(parent)).model if parent else config.model  # the weights decide
    config = dataclasses.replace(config, model=model, data=complete_data(config.data, model=model,
                                                                         objective=config.task.objective))
    if config.task.name == "pretrain":
        check_objective(config)
        folder = data_folder(config.data, workdir)
        tokenizer_config = dataclasses.replace(config.tokenizer, path=parent or config.tokenizer.path)
        first_alone("data", lambda: build(config.data, tokenizer_config, folder, progress=Stages("data")))
        tokenizer = Tokenizer.load(folder)
    elif parent:
        tokenizer = Tokenizer.load(Path(parent))
    else:
        raise ConfigError(f"train.init_from is empty: task.name={config.task.name!r} starts from a trained workdir")
    model = dataclasses.replace(model, vocab_size=model.vocab_size or tokenizer.vocab_size)
    if model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's "
                          f"{tokenizer.vocab_size}; set it to 0 for the tokenizer's size")
    return tokenizer, dataclasses.replace(config, model=model)


def prepare(config: Config, workdir: Path, tokenizer: Tokenizer) -> Run:
    """Mesh, model, task and checkpoints of a run; jax starts here."""
    import jax

    from llmjax.core.mesh import check_fits, make_mesh
    from llmjax.data.build import data_folder
    from llmjax.models.decoder import abstract_model, init_params
    from llmjax.track.lineage import versions
    from llmjax.track.logbook import Logbook
    from llmjax.train.checkpoint import Checkpointer, restore_params
    from llmjax.train.loop import Run

    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    data_hash = _data_hash(data_folder(config.data, workdir))  # before anything reads what may be damaged
    model = abstract_model(config.model)

    def parent_params() -> dict:
        return restore_params(Path(config.train.init_from) / "checkpoints", model.abstract_params(mesh), mesh=mesh)

    def fresh_params() -> dict:
        return init_params(config.model, jax.random.key(config.train.seed), mesh)

    with jax.set_mesh(mesh):
        task = _make_task(config, workdir, tokenizer, model, parent_params)
    checkpointer = Checkpointer(workdir / "checkpoints", **dataclasses.asdict(config.checkpoint),
                                say=functools.partial(Logbook(workdir).enter, "warning") if not jax.process_index()
                                else lambda text: None)
    return Run(config, model, mesh, task, workdir, checkpointer,
               initial_params=parent_params if config.train.init_from else fresh_params,
               meta={"tokenizer_hash": tokenizer.hash, "data_hash": data_hash,
                     "config": configs.to_dict(config), "versions": versions()})


def _data_hash(folder: Path) -> str:
    """The hash of a data folder whose files are the ones that were written; empty where there is none."""
    import jax

    from llmjax.data.manifest import FILE, Manifest

    if not (folder / FILE).exists():
        return ""
    manifest = Manifest.load(folder)
    manifest.verify(part=jax.process_index(), parts=jax.process_count())
    return manifest.hash


def _make_task(config: Config, workdir: Path, tokenizer: Tokenizer, model: Model,
               parent_params: Callable[[], Params]) -> Task:
    """The batches, loss and frozen arrays that the task's name stands for."""
    import jax

    from llmjax.data.build import data_folder
    from llmjax.data.objective_rows import settings_of
    from llmjax.post import dpo, sft
    from llmjax.train import pretrain
    from llmjax.train.batch import RowShare, row_share

    share = dataclasses.asdict(row_share(jax.sharding.get_mesh()))
    if config.task.name == "sft":
        return sft.make_task(config, workdir=workdir, tokenizer=tokenizer, **share)
    if config.task.name == "dpo":
        return dpo.make_task(config, workdir=workdir, tokenizer=tokenizer, reference=parent_params(), **share)
    data = data_folder(config.data, workdir)
    objective = settings_of(config, tokenizer)
    task = pretrain.make_task(config, data=data, workdir=workdir, objective=objective, **share)
    if config.data.mix_every:
        from llmjax.train import online_mixing

        mix = online_mixing.make_hook(config, model, data=data, workdir=workdir, share=RowShare(**share))
        task = dataclasses.replace(task, hooks=(*task.hooks, mix))
    if not config.eval.every:
        return task
    from llmjax.verbs.held_out import make_hook

    hook = make_hook(config, model, data=data, tokenizer=tokenizer, workdir=workdir)
    return dataclasses.replace(task, hooks=(*task.hooks, hook))
