"""From a recipe and command-line overrides to the one frozen `Config` that everything else reads.

A recipe is a Python file with `get_config(arg)`, which returns an ml-collections ConfigDict (anything with `to_dict()`)
or a dict of sections. Every mistake in it is a ConfigError of one line: the field, the value, what would fit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import json
import math
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from llmjax.core import compiler_options, model_rules, objective_rules, optim_rules
from llmjax.core.errors import ConfigError, RunError
from llmjax.core.files import write_json
from llmjax.core.model_sections import ModelConfig
from llmjax.core.sections import AXIS_NAMES, Config, TrainConfig
from llmjax.core.stage_sections import StageConfig, complete, rate_pieces

CONFIG_FILE = "config.json"

# The least value of each size; a size missing here may be anything its type allows.
AT_LEAST: dict[str, float] = {
    **model_rules.AT_LEAST, **objective_rules.AT_LEAST, **optim_rules.AT_LEAST,
    "tokenizer.vocab_size": 260, "tokenizer.train_bytes": 1, "tokenizer.extend_by": 0,
    "tokenizer.min_bytes_per_token": 0, "tokenizer.max_fertility": 0,
    "data.seq_len": 1, "data.batch_size": 1, "data.min_bytes": 0, "data.max_bytes": 1, "data.holdout_fraction": 0,
    "data.near_duplicate_jaccard": 0, "data.near_duplicate_bloom_mb": 0,
    "data.temperature": 0.01, "data.mix_every": 0, "data.mix_rate": 0,
    "data.curation.min_language_confidence": 0, "data.curation.repeated_lines": 0, "data.curation.repeated_words": 0,
    "data.curation.max_perplexity": 0, "data.curation.quality_keep": 0, "data.curation.max_toxicity": 0,
    "data.curation.leak_share": 0, "data.curation.common_ngram": 0,
    "task.beta": 0, "task.z_loss": 0, "task.multi_token": 0,
    "train.steps": 1, "train.accumulation": 1, "train.log_every": 1, "mesh.rounds": 1,
    "checkpoint.every": 1, "checkpoint.keep": 1,
    "guard.spike_factor": 1, "guard.window": 1, "guard.warmup": 1, "guard.patience": 1, "guard.max_rollbacks": 0,
    "guard.rate_cut": 0, "guard.loss_rise": 0, "guard.plateau_steps": 0, "guard.early_stop": 0, "guard.hang_seconds": 0,
    "guard.check_every": 0, "checkpoint.keep_every": 0,
    "eval.every": 0, "eval.batches": 1, "eval.seq_len": 0, "eval.stride": 0,
    "serve.max_queue": 0, "serve.max_new_tokens": 1, "serve.grace_seconds": 0,
}  # fmt: skip
AT_MOST: dict[str, float] = {
    **model_rules.AT_MOST, **objective_rules.AT_MOST, **optim_rules.AT_MOST,
    "data.holdout_fraction": 1, "data.near_duplicate_jaccard": 1, "guard.rate_cut": 1,
    "data.curation.min_language_confidence": 1, "data.curation.quality_keep": 1, "data.curation.max_toxicity": 1,
    "data.curation.leak_share": 1, "data.curation.common_ngram": 1,
}  # fmt: skip


def load(spec: str, overrides: Mapping[str, str] | None = None) -> Config:
    """The config of a recipe `FILE` or `FILE:arg`, with overrides such as {"train.steps": "10"} on top.

    Raises ConfigError; a recipe that fails to run is one as well, with its file and line.
    """
    path, arg = _split_spec(spec)
    raw = _run_recipe(path, arg)
    name = path.stem + re.sub(r"[^A-Za-z0-9._]+", "-", f"_{arg}" if arg else "")
    return resolve({"name": name, **_as_dict(raw)}, overrides)


def resolve(raw: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Config:
    """Sections of plain values turned into a `Config`, derived values filled in; raises ConfigError."""
    config = _build(Config, raw, prefix="")
    for path, text in (overrides or {}).items():
        config = _replace(config, path, text)
    config = _read_mixture(config)
    _check_limits(config)
    _check_stages(config)
    config = _derive(config)
    _check_sizes(config)
    return config


def model_section(raw: Mapping[str, Any]) -> ModelConfig:
    """A model section alone, of plain values that fit together; raises ConfigError."""
    model: ModelConfig = _build(ModelConfig, raw, prefix="model")
    model_rules.check_model(model)
    return model


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dicts; `resolve(to_dict(c)) == c`."""
    return dataclasses.asdict(config)


def flatten(config: Config) -> dict[str, Any]:
    """Every value by its dotted path, as overrides name it."""
    return {path: _get(config, path) for path in _leaf_types(Config)}


def from_workdir(workdir: Path, overrides: Mapping[str, str] | None = None) -> Config:
    """The config that a run left in its workdir; raises RunError where there is none that can be read."""
    path = workdir / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is missing: {workdir} holds no run") from None
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}") from error
    return resolve(raw, overrides)


def changes(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ, by dotted path, less what only a command line sets or data fill in."""
    old, new = flatten(before), flatten(after)
    derived = {"train.profile", *(["model.vocab_size"] if not after.model.vocab_size else [])}
    if after.train.init_from:
        derived |= {path for path in new if path.startswith("model.")}  # the parent's weights decide
    return {path: (old[path], new[path]) for path in new if old[path] != new[path] and path not in derived}


def save(config: Config, workdir: Path) -> None:
    """Leave the resolved config in a workdir, which from then on describes itself."""
    write_json(workdir / CONFIG_FILE, to_dict(config))


# Recipes -------------------------------------------------------------------------------------------------------------


def _split_spec(spec: str) -> tuple[Path, str]:
    file, colon, arg = spec.partition(".py:")
    path = Path(file + ".py" if colon else spec)
    if not path.is_file():
        nearby = sorted(str(p) for p in path.parent.glob("*.py"))
        close = difflib.get_close_matches(str(path), nearby, n=3)
        raise ConfigError(f"--config={spec}: no such file" + (f"; near it: {', '.join(close)}" if close else ""))
    return path, arg


def _run_recipe(path: Path, arg: str) -> Any:
    try:
        with _siblings_importable(path.parent.resolve()):
            module = _import_file(path)
            if not hasattr(module, "get_config"):
                raise ConfigError(f"{path}: a recipe defines get_config(arg)")
            return module.get_config(arg) if arg else module.get_config()
    except ConfigError:
        raise
    except Exception as error:  # whatever a recipe's own code raises is a fault of the recipe
        raise ConfigError(f"{path}{_line_in(path, error)}: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    module_spec = importlib.util.spec_from_file_location(f"llmjax_recipe_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{path}: a recipe is a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _siblings_importable(folder: Path) -> Iterator[None]:
    """Let a recipe `import` the recipe beside it that it edits, and forget it again afterwards."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file and Path(file).parent == folder and "." not in name:
                del sys.modules[name]


def _line_in(path: Path, error: Exception) -> str:
    """`:line` of the last frame (or the syntax error) in the recipe itself."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f":{error.lineno}"
    line, frame = "", error.__traceback__
    while frame:
        if Path(frame.tb_frame.f_code.co_filename) == path:
            line = f":{frame.tb_lineno}"
        frame = frame.tb_next
    return line


def _as_dict(raw: Any) -> dict[str, Any]:
    return raw.to_dict() if hasattr(raw, "to_dict") else dict(raw)


# Plain values to typed fields ----------------------------------------------------------------------------------------


def _build(section: Any, raw: Any, *, prefix: str) -> Any:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{prefix}={raw!r}: a section with fields {', '.join(_hints(section))} is needed")
    values = {}
    for name, value in raw.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        hint = _hints(section).get(name)
        if hint is None:
            raise _unknown(path)
        values[name] = _value(hint, value, path=path)
    return section(**values)


def _value(hint: Any, value: Any, *, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, prefix=path)
    if (item := _item_type(hint)) is None:
        return _fit(path, value, hint)
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path}={value!r}: a list of sections with fields {', '.join(_hints(item))} is needed")
    return tuple(_build(item, entry, prefix=f"{path}.{place}") for place, entry in enumerate(value))


def _item_type(hint: Any) -> Any:
    """The section that a field may hold any number of, or None."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def _replace(node: Any, path: str, text: str, *, prefix: str = "") -> Any:
    """A copy of `node` with the field at the dotted `path` read from `text`."""
    name, _, rest = path.partition(".")
    full = f"{prefix}{name}"
    hint = _hints(node.__class__).get(name)
    if _item_type(hint):
        return dataclasses.replace(node, **{name: _replace_item(getattr(node, name), rest, text, prefix=f"{full}.")})
    if hint is None or dataclasses.is_dataclass(hint) != bool(rest):
        raise _unknown(prefix + path)
    if rest:
        return dataclasses.replace(node, **{name: _replace(getattr(node, name), rest, text, prefix=f"{full}.")})
    return dataclasses.replace(node, **{name: _fit(full, _parse(text, hint), hint)})


def _replace_item(items: tuple[Any, ...], path: str, text: str, *, prefix: str) -> tuple[Any, ...]:
    """The same for `place.field` of a tuple of sections."""
    place, _, rest = path.partition(".")
    if not (place.isdigit() and int(place) < len(items) and rest):
        raise ConfigError(f"{prefix}{path}: a place below {len(items)} and a field are needed, as in {prefix}0.FIELD")
    changed = _replace(items[int(place)], rest, text, prefix=f"{prefix}{place}.")
    return tuple(changed if number == int(place) else item for number, item in enumerate(items))


def _parse(text: str, hint: Any) -> Any:
    """The number that `text` spells where the field wants one; anything else stays text, for `_fit` to judge."""
    if hint in (int, float):
        with contextlib.suppress(ValueError):
            return hint(text)
    return text


def _fit(path: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise ConfigError(f"{path}={value!r}: one of {', '.join(map(repr, options))} is needed")
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number and math.isfinite(value):
        return float(value)
    if hint is not float and isinstance(value, hint) and not isinstance(value, bool):
        return value
    raise ConfigError(f"{path}={value!r}: {WANTED[hint]} is needed")


WANTED = {int: "an integer", float: "a finite number", str: "a string"}


def _unknown(path: str) -> ConfigError:
    """What the user may have meant: the same field of another section, then paths spelt alike, then the siblings."""
    leaves = list(_leaf_types(Config))
    last = path.rpartition(".")[2]
    near = [leaf for leaf in leaves if leaf.rpartition(".")[2] == last] or difflib.get_close_matches(path, leaves, n=3)
    if near:
        return ConfigError(f"{path}: no such field; nearest: {', '.join(near)}")
    siblings = [leaf for leaf in leaves if leaf.startswith(path.partition(".")[0] + ".")]
    return ConfigError(f"{path}: no such field; there are {', '.join(siblings or _hints(Config))}")


@functools.cache
def _hints(section: Any) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _leaf_types(section: Any, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, hint in _hints(section).items():
        path = prefix + name
        leaves |= _leaf_types(hint, f"{path}.") if dataclasses.is_dataclass(hint) else {path: hint}
    return leaves


def _get(config: Config, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


# What fits together --------------------------------------------------------------------------------------------------


def _read_mixture(config: Config) -> Config:
    """`data.mixture=@FILE` stands for what the file says, so that a run's own config says it too."""
    if not config.data.mixture.startswith("@"):
        return config
    path = Path(config.data.mixture[1:]).expanduser()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ConfigError(f"data.mixture: {path}: {error.strerror}; llmjax data mix writes one") from None
    spec = ",".join(line for line in lines if line and not line.startswith("#"))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=spec))


def _derive(config: Config) -> Config:
    """Fill in the values that stand for another field, so that no section has to look into another."""
    evaluation, optim = config.eval, config.optim
    seq_len = evaluation.seq_len or config.data.seq_len
    evaluation = dataclasses.replace(evaluation, seq_len=seq_len, stride=evaluation.stride or max(seq_len // 2, 1))
    data = objective_rules.complete_data(config.data, model=config.model, objective=config.task.objective)
    optim_rules.check_batch_rules(config)
    stages = complete(config.stages, data, rope_theta=config.model.rope_theta)
    optim = dataclasses.replace(optim, adam_learning_rate=optim.adam_learning_rate or optim.learning_rate,
                                pieces=tuple(rate_pieces(stages, config.data, noise_tokens=optim.noise_tokens)))
    train = dataclasses.replace(config.train, steps=_total_steps(config, stages))
    return dataclasses.replace(config, data=data, eval=evaluation, optim=optim, train=train, stages=stages)


def _total_steps(config: Config, stages: tuple[StageConfig, ...]) -> int:
    """train.steps, which stages replace; raises ConfigError when it was given and they take another number."""
    if not stages:
        return config.train.steps
    total, stated = sum(stage.steps for stage in stages), config.train.steps
    if stated not in (total, TrainConfig.steps):
        raise ConfigError(f"train.steps={stated}: the stages take {total} steps; leave it out, or change their tokens")
    return total


def _check_limits(config: Config) -> None:
    for path, least in AT_LEAST.items():
        if _get(config, path) < least:
            raise ConfigError(f"{path}={_get(config, path)}: at least {least} is needed")
    for path, most in AT_MOST.items():
        if _get(config, path) > most:
            raise ConfigError(f"{path}={_get(config, path)}: at most {most} fits")


def _check_stages(config: Config) -> None:
    for place, stage in enumerate(config.stages):
        path = f"stages.{place}"
        if stage.tokens < 1 or min(stage.seq_len, stage.batch_size, stage.rope_theta, stage.rate, stage.end_rate) < 0:
            raise ConfigError(f"{path}: tokens={stage.tokens} must be at least 1, and no other field below 0")
        check_multiple(f"{path}.batch_size", stage.batch_size, "train.accumulation", config.train.accumulation)
        if stage.seq_len > config.model.max_seq_len:
            raise ConfigError(f"{path}.seq_len={stage.seq_len}: at most model.max_seq_len={config.model.max_seq_len} "
                              "fits")


def _check_sizes(config: Config) -> None:
    model_rules.check_model(config.model)
    optim_rules.check_optimizer(config)
    if config.model.moe.capacity_factor and (size := config.model.moe.group_size):
        check_multiple("data.seq_len", config.data.seq_len, "model.moe.group_size", size)
    check_multiple("data.batch_size", config.data.batch_size, "train.accumulation", config.train.accumulation)
    compiler_options.parse(config.train.compiler_options)
    for path in ("data.seq_len", "eval.seq_len"):
        if _get(config, path) > config.model.max_seq_len:
            raise ConfigError(f"{path}={_get(config, path)}: at most model.max_seq_len={config.model.max_seq_len} fits")
    if config.eval.stride > config.eval.seq_len:
        raise ConfigError(f"eval.stride={config.eval.stride}: at most eval.seq_len={config.eval.seq_len} fits")
    _check_mesh(config)


def _check_mesh(config: Config) -> None:
    sizes = {axis: getattr(config.mesh, axis) for axis in AXIS_NAMES}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(f"mesh.{axis}={size}: a size is at least 1, or -1 for what is left")
    if list(sizes.values()).count(-1) > 1:
        taken, again, *_ = [axis for axis, size in sizes.items() if size == -1]
        raise ConfigError(f"mesh.{again}=-1: only one axis may take what is left, and mesh.{taken} does")


def check_multiple(path: str, value: int, part_path: str, part: int) -> None:
    """Raise ConfigError unless `part` divides `value`."""
    if value % part:
        below = value // part * part
        near = [n for n in (below, below + part) if n]
        raise ConfigError(
            f"{path}={value}: must be a multiple of {part_path}={part}; nearest: {', '.join(map(str, near))}"
        )

