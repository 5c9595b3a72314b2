"""DeepSeek-V3's heads of multi-token prediction against transformers' own, from a folder as it is published."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from llmjax.convert.huggingface import export_hf, import_hf
from llmjax.models import decoder
from llmjax.serve.load import load_workdir
from tests.convert.published import make

NUM_DEPTHS, T = 2, 20


def published(heads: MtpModel, first_layer: int) -> dict[str, torch.Tensor]:
    """Tensors of the heads under the names of a folder: layers behind the last one, each expert apart."""
    tensors = {}
    for name, tensor in heads.state_dict().items():
        if not name.startswith("layers."):
            continue
        depth, rest = name.removeprefix("layers.").split(".", 1)
        rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        layer = f"model.layers.{first_layer + int(depth)}"
        if ".experts." not in rest:
            tensors[f"{layer}.{rest}"] = tensor.clone()
            continue
        parts = ("gate", "up") if "gate_up" in rest else ("down",)
        for expert, whole in enumerate(tensor):
            for part, piece in zip(parts, whole.chunk(len(parts)), strict=True):
                tensors[f"{layer}.mlp.experts.{expert}.{part}_proj.weight"] = piece.clone()
    return tensors


@pytest.mark.slow
def test_every_depth_and_the_folder(tmp_path: Path) -> None:
    theirs = make("deepseek_v3", num_nextn_predict_layers=NUM_DEPTHS)
    theirs.save_pretrained(tmp_path / "hf")
    heads = MtpModel(theirs, NUM_DEPTHS).eval()
    with torch.no_grad():
        for name, tensor in heads.state_dict().items():
            if name.startswith("layers."):
                tensor.add_(0.1 * torch.randn_like(tensor))
    file = tmp_path / "hf/model.safetensors"
    save_file(load_file(file) | published(heads, theirs.config.num_hidden_layers), file, metadata={"format": "pt"})
    import_hf(tmp_path / "hf", tmp_path / "run")
    loaded = load_workdir(tmp_path / "run")

    tokens = np.random.default_rng(0).integers(3, 96, (2, T + NUM_DEPTHS + 1))
    ones = np.ones((2, T), np.int32)
    batch = {"tokens_BT": tokens[:, :T], "targets_BT": tokens[:, 1: T + 1], "positions_BT": ones * np.arange(T),
             "segment_ids_BT": ones, "weights_BT": ones.astype(np.float32)}  # fmt: skip

    @jax.jit
    def logits(params: dict) -> list[jax.Array]:
        out = decoder.forward(loaded.model, params, batch["tokens_BT"], positions_BT=batch["positions_BT"],
                              segment_ids_BT=batch["segment_ids_BT"])
        ahead = decoder.look_ahead(loaded.model, params, out.hidden_BTD, batch)
        return [decoder.logits(loaded.model, params, hidden_BTD) for hidden_BTD in ahead.hidden_KBTD]

    with torch.no_grad():
        hidden = theirs.model(torch.tensor(tokens[:, :T])).last_hidden_state
        for depth, ours_BTV in enumerate(logits(loaded.params), start=1):
            reads = torch.tensor(tokens[:, depth: depth + T])
            hidden = heads.forward_layer(depth - 1, hidden, torch.arange(depth, depth + T)[None], None, input_ids=reads)
            expected = theirs.lm_head(hidden).numpy()[:, : T + 1 - depth]  # behind these the row has no such token
            assert np.abs(ours_BTV[:, : T + 1 - depth] - expected).max() < 1e-4 * np.abs(expected).max()

    export_hf(tmp_path / "run", tmp_path / "out")
    out = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert out.keys() == load_file(file).keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in load_file(file).items())
