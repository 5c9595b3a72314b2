"""Quantised folders against transformers' own widening: MXFP4 of GPT-OSS, FP8 in blocks of DeepSeek-V3."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmjax.convert.huggingface import import_hf
from llmjax.convert.quantised import MXFP4, BlockFP8
from llmjax.core.errors import ConfigError
from llmjax.models.decoder import abstract_model
from llmjax.train.checkpoint import restore_params
from tests.convert.published import make

BLOCK = 16


def packed(experts: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every byte and scales over the whole range that bfloat16 holds, at random."""
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(4, 250, (experts, outputs, inputs // 32), dtype=torch.uint8)


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    torch.manual_seed(0)
    blocks, scales = packed(3, 64, 96)
    wanted = convert_moe_packed_tensors(blocks, scales)
    ours = MXFP4().widen(blocks.numpy(), scales.numpy())
    assert ours.shape == MXFP4().shape(tuple(blocks.shape)) == tuple(wanted.shape) == (3, 96, 64)
    assert np.array_equal(ours.astype(np.float32), wanted.float().numpy())


def test_fp8_in_blocks_is_what_transformers_makes_of_it_and_the_last_tiles_may_be_cut() -> None:
    torch.manual_seed(0)
    values, scales = torch.randn(48, 32).to(torch.float8_e4m3fn), torch.rand(3, 2) + 0.1
    wanted = Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16).float().numpy()
    stored = values.view(torch.uint8).numpy().view("float8_e4m3fn")
    scheme = BlockFP8((BLOCK, BLOCK))
    assert np.array_equal(scheme.widen(stored, scales.numpy()).astype(np.float32), wanted)
    assert np.array_equal(scheme.widen(stored[:41, :30], scales.numpy()).astype(np.float32), wanted[:41, :30])


def rewrite(folder: Path, tensors: Mapping[str, torch.Tensor], quantization: dict | None) -> None:
    """A folder with other tensors, and settings of quantisation."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def imported(source: Path, workdir: Path) -> dict:
    config = import_hf(source, workdir)
    assert config.model.param_dtype == "bfloat16"
    return restore_params(workdir / "checkpoints", abstract_model(config.model).abstract_params(None))


def assert_equal(ours: dict, wanted: dict) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), ours, wanted)


def test_a_folder_in_mxfp4_is_the_folder_that_transformers_widens(tmp_path: Path) -> None:
    theirs = make("gpt_oss", hidden_size=64, intermediate_size=32).bfloat16()
    theirs.save_pretrained(tmp_path / "hf")
    wide = load_file(tmp_path / "hf/model.safetensors")
    quantised = dict(wide)
    for name in [name for name in wide if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = wide[name].shape
        blocks, scales = packed(experts, outputs, inputs)
        del quantised[name]
        quantised |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wide[name] = convert_moe_packed_tensors(blocks, scales)
    rewrite(tmp_path / "hf", wide, None)
    wanted = imported(tmp_path / "hf", tmp_path / "wide")
    rewrite(tmp_path / "hf", quantised, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert_equal(imported(tmp_path / "hf", tmp_path / "run"), wanted)


def test_a_folder_in_fp8_is_the_folder_that_transformers_widens(tmp_path: Path) -> None:
    theirs = make("deepseek_v3", hidden_size=64, intermediate_size=32, moe_intermediate_size=32).bfloat16()
    theirs.save_pretrained(tmp_path / "hf")
    wide = load_file(tmp_path / "hf/model.safetensors")
    quantised = dict(wide)
    for name in [name for name in wide if "_proj.weight" in name and not any(n % BLOCK for n in wide[name].shape)]:
        rows, columns = wide[name].shape
        values, scales = wide[name].to(torch.float8_e4m3fn), torch.rand(rows // BLOCK, columns // BLOCK) + 0.5
        quantised |= {name: values, name.replace(".weight", ".weight_scale_inv"): scales}
        wide[name] = Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16)
    assert len(quantised) > len(wide) + 20
    rewrite(tmp_path / "hf", wide, None)
    wanted = imported(tmp_path / "hf", tmp_path / "wide")
    rewrite(tmp_path / "hf", quantised, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})
    assert_equal(imported(tmp_path / "hf", tmp_path / "run"), wanted)


def test_other_schemes_are_refused_by_name(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "hf")
    rewrite(tmp_path / "hf", load_file(tmp_path / "hf/model.safetensors"), {"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="quantization_config is {'quant_method': 'gptq'"):
        import_hf(tmp_path / "hf", tmp_path / "run")
