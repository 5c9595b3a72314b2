"""Hugging Face folders of Llama models, in and out: config, weights, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.convert import llama_config, rules, safetensors
from llmjax.convert.tables import LLAMA, LLAMA_DERIVED
from llmjax.convert.tokenizer import export_tokenizer
from llmjax.core import config as configs
from llmjax.core.errors import RunError
from llmjax.core.files import write_json
from llmjax.core.sections import Config, ModelConfig
from llmjax.core.task import Params
from llmjax.data.tokenizer import HUGGINGFACE_FILE, SENTENCEPIECE_FILE, Tokenizer
from llmjax.models.decoder import abstract_model
from llmjax.train.checkpoint import read_meta, restore_params, save_params

GENERATION_FILE = "generation_config.json"


def import_hf(source: Path, workdir: Path) -> Config:
    """Makes a workdir out of a Hugging Face folder: config, weights as step 0, tokenizer where it has one.

    Raises:
        ConfigError: an architecture or a setting that we do not have; the line names it.
        RunError: files that are missing or damaged, tensors that do not fit, a workdir in use.
    """
    if (workdir / "checkpoints").exists():
        raise RunError(f"{workdir} holds a run already: import into another --workdir")
    theirs = _read_json(source / "config.json")
    with safetensors.Reader(source) as reader:
        model = llama_config.to_ours(theirs, dtype=_stored_dtype(reader))
        params = _convert(model, {name: reader.shape(name) for name in reader.names}, reader.read)
    tokenizer = _import_tokenizer(source, workdir)
    config = configs.resolve({"name": workdir.name, **llama_config.sections(model)})
    meta = {"tokenizer_hash": tokenizer.hash if tokenizer else "", "generation": _generation_ids(source, theirs)}
    save_params(workdir / "checkpoints", params, meta)
    configs.save(config, workdir)  # last: from here on the workdir is whole
    return config


def export_hf(workdir: Path, out: Path, *, shard_bytes: int = safetensors.SHARD_BYTES) -> None:
    """Writes the latest checkpoint of a workdir as a folder that transformers loads, with its tokenizer if any.

    Raises:
        ConfigError: sizes that transformers' Llama cannot have.
        RunError: no checkpoint, or `out` is in use.
    """
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty: export into another --out")
    config = configs.from_workdir(workdir).model
    theirs = llama_config.to_theirs(config)
    params = restore_params(workdir / "checkpoints", abstract_model(config).abstract_params(None))
    out.mkdir(parents=True, exist_ok=True)
    write_params(out, params, shard_bytes=shard_bytes)
    ids = read_meta(workdir / "checkpoints").get("generation")
    if _has_tokenizer(workdir / "tokenizer"):
        export_tokenizer(workdir / "tokenizer", out)
        ids = ids or _tokenizer_ids(Tokenizer.load(out))
    write_json(out / GENERATION_FILE, ids or {})
    write_json(out / "config.json", theirs | {"bos_token_id": None, "eos_token_id": None} | (ids or {}))


def to_params(model: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Our parameters from transformers' tensors by name, in the precision of the config.

    Raises:
        RunError: a tensor is missing, not known or of another shape.
    """
    return _convert(model, {name: tensor.shape for name, tensor in tensors.items()}, tensors.__getitem__)


def write_params(out: Path, params: Params, *, shard_bytes: int = safetensors.SHARD_BYTES) -> None:
    """Our parameters as safetensors under transformers' names, in the precision they have."""
    leaves = rules.flatten(params)
    dtype = leaves["embedder/table"].dtype
    specs = [safetensors.TensorSpec(name, shape, dtype) for name, shape in rules.their_shapes(LLAMA, leaves).items()]
    tensors = (tensor for _, tensor in rules.to_theirs(LLAMA, leaves))
    safetensors.write_folder(out, specs, tensors, shard_bytes=shard_bytes)


def _convert(model: ModelConfig, found: Mapping[str, rules.Shape], read: Callable[[str], np.ndarray]) -> Params:
    like = rules.flatten(abstract_model(model).shapes)
    copies = {"lm_head.weight"} if model.embeddings == "tied" else set()  # of the embedding, in some folders
    known = {name: shape for name, shape in found.items() if name not in copies and not LLAMA_DERIVED.fullmatch(name)}
    rules.check_consumed(rules.their_shapes(LLAMA, like), known)
    return rules.unflatten(rules.to_ours(LLAMA, like, read=read))


def _stored_dtype(reader: safetensors.Reader) -> str:
    name = "model.embed_tokens.weight" if "model.embed_tokens.weight" in reader.names else reader.names[0]
    return str(reader.read(name).dtype)


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
