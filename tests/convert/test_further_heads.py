"""DeepSeek-V3's heads of multi-token prediction against transformers' own, from a folder as it is published."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from llmjax.convert import rules
from llmjax.convert.huggingface import export_hf, import_hf
from llmjax.convert.registry import FAMILIES
from llmjax.core.mesh import single_device_mesh
from llmjax.core.sections import TaskConfig
from llmjax.models import decoder
from llmjax.serve.load import load_workdir
from llmjax.train.batch import put_batch
from llmjax.train.gradients import make_loss_and_grad
from llmjax.train.pretrain import make_loss
from tests.convert.published import make
from tests.convert.test_families import difference, their_gradients

NUM_DEPTHS, T, WEIGHT = 2, 20, 0.3


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


@dataclasses.dataclass(frozen=True)
class Both:
    """The same weights on both sides, as a folder is published, and token ids."""

    folder: Path
    theirs: transformers.PreTrainedModel
    heads: MtpModel
    model: decoder.Model
    params: dict
    tokens: np.ndarray


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("heads")
    theirs = make("deepseek_v3", num_nextn_predict_layers=NUM_DEPTHS)
    theirs.save_pretrained(folder / "hf")
    heads = MtpModel(theirs, NUM_DEPTHS).eval()
    with torch.no_grad():  # their experts come uninitialised
        for name, tensor in heads.layers.state_dict().items():
            tensor.copy_(("norm" in name) + 0.2 * torch.randn_like(tensor))
    file = folder / "hf/model.safetensors"
    save_file(load_file(file) | published(heads, theirs.config.num_hidden_layers), file, metadata={"format": "pt"})
    import_hf(folder / "hf", folder / "run")
    loaded = load_workdir(folder / "run")
    tokens = np.random.default_rng(0).integers(3, 96, (2, T + NUM_DEPTHS + 1))
    return Both(folder, theirs, heads, loaded.model, loaded.params, tokens)


def batch_of(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of one document, every target weighing one."""
    ones = np.ones((2, T), np.int32)
    return {"tokens_BT": tokens[:, :T].astype(np.int32), "targets_BT": tokens[:, 1: T + 1].astype(np.int32),
            "positions_BT": ones * np.arange(T, dtype=np.int32), "segment_ids_BT": ones,
            "weights_BT": ones.astype(np.float32)}  # fmt: skip


def their_logits(both: Both) -> Iterator[torch.Tensor]:
    """Of the model itself, then of each depth, which reads on beyond the row."""
    tokens = torch.tensor(both.tokens)
    hidden = both.theirs.model(tokens[:, :T]).last_hidden_state
    yield both.theirs.lm_head(hidden)
    for depth in range(1, NUM_DEPTHS + 1):
        hidden = both.heads.forward_layer(depth - 1, hidden, torch.arange(depth, depth + T)[None], None,
                                          input_ids=tokens[:, depth: depth + T])
        yield both.theirs.lm_head(hidden)


@pytest.mark.slow
def test_logits_of_every_depth(both: Both) -> None:
    batch = batch_of(both.tokens)

    @jax.jit
    def logits(params: dict) -> list[jax.Array]:
        out = decoder.forward(both.model, params, batch["tokens_BT"], positions_BT=batch["positions_BT"],
                              segment_ids_BT=batch["segment_ids_BT"])
        ahead = decoder.look_ahead(both.model, params, out.hidden_BTD, batch)
        return [decoder.logits(both.model, params, hidden) for hidden in (out.hidden_BTD, *ahead.hidden_KBTD)]

    with torch.no_grad():
        for depth, (ours, theirs) in enumerate(zip(logits(both.params), their_logits(both), strict=True)):
            known = T + 1 - depth  # behind these the row has no such token
            assert np.abs(ours - theirs.numpy())[:, :known].max() < 1e-4 * theirs.abs().max()


@pytest.mark.slow
def test_loss_and_every_gradient(both: Both) -> None:
    both.theirs.zero_grad(), both.heads.zero_grad()
    sums = [torch.nn.functional.cross_entropy(logits[:, : T - depth].flatten(0, 1),
                                              torch.tensor(both.tokens[:, depth + 1: T + 1]).flatten(), reduction="sum")
            for depth, logits in enumerate(their_logits(both))]  # fmt: skip
    loss = (sums[0] + WEIGHT / NUM_DEPTHS * sum(sums[1:])) / (2 * T)
    loss.backward()
    expected = their_gradients(both.theirs, both.folder)
    expected |= published_gradients(both.heads, both.theirs.config.num_hidden_layers)
    expected = {name: grad for name, grad in expected.items() if "e_score_correction_bias" not in name}

    mesh = single_device_mesh()
    with jax.set_mesh(mesh):
        params = jax.device_put(both.params, jax.tree.map(lambda x: x.sharding, both.model.abstract_params(mesh)))
        function = make_loss_and_grad(both.model, make_loss(TaskConfig(multi_token=WEIGHT)), num_microbatches=1)
        out, grads = jax.jit(function)(params, {}, put_batch(batch_of(both.tokens), mesh), jax.random.key(0))
    assert float(out.loss_sum / out.weight) == pytest.approx(loss.item(), rel=1e-5)
    rows = FAMILIES["deepseek_v3"].rows_of(both.model.config)
    ours = dict(rules.to_theirs(rows, rules.flatten(jax.device_get(grads))))
    ours = {name: grad for name, grad in ours.items() if "e_score_correction_bias" not in name}
    assert ours.keys() == expected.keys()
    worst = {name: difference(ours[name] / (2 * T), grad) for name, grad in expected.items()}
    assert max(worst.values()) < 1e-4, worst


def published_gradients(heads: MtpModel, first_layer: int) -> dict[str, torch.Tensor]:
    """Gradients of the heads under the names of a folder."""
    own = dict(heads.layers.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in own.items()}
    with torch.no_grad():
        for parameter in own.values():
            parameter.copy_(parameter.grad)
        gradients = published(heads, first_layer)
        for name, parameter in own.items():
            parameter.copy_(values[name])
    return gradients


@pytest.mark.slow
def test_the_folder_comes_back(both: Both) -> None:
    export_hf(both.folder / "run", both.folder / "out")
    file = both.folder / "hf/model.safetensors"
    out = load_file(next((both.folder / "out").glob("*.safetensors")))
    assert out.keys() == load_file(file).keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in load_file(file).items())
