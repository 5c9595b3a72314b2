"""Hugging Face folders, in and out: config, weights, tokenizer; which family it is, the folder or the model says.

Tensors pass one row of the family's table at a time, so that beside the model itself, which may stand sharded on a
mesh, memory holds about one of our (stacked) tensors, and of that only what this process's devices need.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from llmjax.convert import rules, safetensors
from llmjax.convert.family import Family
from llmjax.convert.operations import Shape
from llmjax.convert.quantised import Tensors, widened
from llmjax.convert.registry import family_of_folder, family_of_model
from llmjax.convert.safetensors import TensorSpec
from llmjax.convert.shards import LocalShards
from llmjax.convert.tokenizer import export_tokenizer
from llmjax.core import config as configs
from llmjax.core.errors import RunError
from llmjax.core.files import write_json
from llmjax.core.sections import Config, ModelConfig
from llmjax.core.task import Params
from llmjax.data.tokenizer import HUGGINGFACE_FILE, SENTENCEPIECE_FILE, Tokenizer
from llmjax.models import parametrisation
from llmjax.models.decoder import abstract_model
from llmjax.train.checkpoint import read_meta, restore_params, save_params

GENERATION_FILE = "generation_config.json"


def import_hf(source: Path, workdir: Path, *, mesh: jax.sharding.Mesh | None = None) -> Config:
    """Makes a workdir out of a Hugging Face folder: config, weights as step 0, tokenizer where it has one.

    On a `mesh` every tensor goes onto it as it is read.

    Raises:
        ConfigError: an architecture or a setting that we do not have; the line names it.
        RunError: files that are missing or damaged, tensors that do not fit, a workdir in use.
    """
    if (workdir / "checkpoints").exists():
        raise RunError(f"{workdir} holds a run already: import into another --workdir")
    theirs = _read_json(source / "config.json")
    family = family_of_folder(theirs)
    tensors, theirs = widened(safetensors.Reader(source), theirs)
    theirs = family.without_absent(theirs, tensors.names)
    model = family.to_ours(theirs, dtype=_precision(tensors))
    params = to_params(tensors, family=family, model=model, mesh=mesh)
    tokenizer = _import_tokenizer(source, workdir)
    config = configs.resolve({"name": workdir.name, **sections(model)})
    meta = {"tokenizer_hash": tokenizer.hash if tokenizer else "", "family": family.key,
            "generation": _generation_ids(source, theirs)}  # fmt: skip
    save_params(workdir / "checkpoints", params, meta)
    configs.save(config, workdir)  # last: from here on the workdir is whole
    return config


def export_hf(workdir: Path, out: Path, *, shard_bytes: int = safetensors.SHARD_BYTES,
              weights: Literal["last", "average"] = "last") -> None:
    """Writes the latest checkpoint of a workdir as a folder that transformers loads, with its tokenizer if any.

    The weights themselves or their moving average. An imported run goes out as the family that it came from.

    Raises:
        ConfigError: a model that no family says all of.
        RunError: no checkpoint, or `out` is in use.
    """
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty: export into another --out")
    config = configs.from_workdir(workdir).model
    meta = read_meta(workdir / "checkpoints")
    params = restore_params(workdir / "checkpoints", abstract_model(config).abstract_params(None), weights=weights)
    config, params = parametrisation.folded(config, params)
    family = family_of_model(config, preferred=meta.get("family"))
    out.mkdir(parents=True, exist_ok=True)
    write_params(out, params, family=family, model=config, shard_bytes=shard_bytes)
    ids = meta.get("generation")
    if _has_tokenizer(workdir / "tokenizer"):
        export_tokenizer(workdir / "tokenizer", out)
        ids = ids or _tokenizer_ids(Tokenizer.load(out))
    write_json(out / GENERATION_FILE, ids or {})
    none = {"bos_token_id": None, "eos_token_id": None}
    write_json(out / "config.json", family.to_theirs(config) | none | (ids or {}))


def to_params(tensors: Tensors, *, family: Family, model: ModelConfig, mesh: jax.sharding.Mesh | None = None) -> Params:
    """Our parameters from transformers' tensors, in the precision of the config.

    Raises:
        RunError: a tensor is missing, not known or of another shape.
    """
    rows, like = family.rows_of(model), rules.flatten(abstract_model(model).abstract_params(mesh))
    wanted = rules.their_shapes(rows, like)
    stored = {_full_name(name, wanted, family): name for name in tensors.names}
    rules.check_consumed(wanted, {name: tensors.spec(own).shape for name, own in stored.items()
                                  if name in wanted or not family.is_derived(name, model)})
    filled = rules.to_ours(rows, like, read=lambda name: tensors.read(stored[name]), hold=LocalShards)
    return rules.unflatten((path, shards.put()) for path, shards in filled)


def write_params(out: Path, params: Params, *, family: Family, model: ModelConfig,
                 shard_bytes: int = safetensors.SHARD_BYTES) -> None:
    """Our parameters as safetensors under transformers' names, each in the precision that it has."""
    rows, leaves = family.rows_of(model), rules.flatten(params)
    tensors = (tensor for _, tensor in rules.to_theirs(rows, leaves))
    safetensors.write_folder(out, list(_specs(rows, leaves)), tensors, shard_bytes=shard_bytes)


def sections(model: ModelConfig) -> dict[str, Any]:
    """The sections of a config around an imported model; rows of data must fit into its context."""
    seq_len = min(Config().data.seq_len, model.max_seq_len)
    return {"model": dataclasses.asdict(model), "data": {"seq_len": seq_len}}


def _precision(tensors: Tensors) -> str:
    """The dtype that most of the weights have."""
    sizes: collections.Counter[str] = collections.Counter()
    for spec in map(tensors.spec, tensors.names):
        sizes[spec.dtype.name] += math.prod(spec.shape)
    return sizes.most_common(1)[0][0]


def _specs(rows: Sequence[rules.Row], leaves: Mapping[str, Any]) -> Iterator[TensorSpec]:
    """What the files are to hold, in the order of the table."""
    for row in rules.select(rows, leaves):
        own = {path: leaves[path] for path in row.paths}
        dtype = own[row.paths[0]].dtype
        yield from (TensorSpec(name, shape, dtype) for name, shape in rules.their_shapes([row], own).items())


def _full_name(name: str, wanted: Mapping[str, Shape], family: Family) -> str:
    """A tensor's name as newer folders have it, with the prefix that some leave out."""
    for older, newer in family.older_names.items():
        name = name.replace(older, newer)
    whole = name in wanted or name.startswith(family.prefix) or name == "lm_head.weight"
    return name if whole else family.prefix + name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is missing: {path.parent} is no Hugging Face folder") from None
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}") from error
    return content


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (HUGGINGFACE_FILE, SENTENCEPIECE_FILE))


def _import_tokenizer(source: Path, workdir: Path) -> Tokenizer | None:
    if not _has_tokenizer(source):
        return None
    tokenizer = Tokenizer.load(source)
    tokenizer.save(workdir / "tokenizer")
    return tokenizer


def _generation_ids(source: Path, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that begin, end and pad a text; several may end one."""
    path = source / GENERATION_FILE
    both = {**theirs, **(_read_json(path) if path.is_file() else {})}
    return {name: both[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if both.get(name) is not None}


def _tokenizer_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
