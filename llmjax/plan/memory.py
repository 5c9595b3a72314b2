"""The analytic model of a step's memory, in bytes of one device, with which the search prunes.

What waits for the derivative follows from the remat policy; what lives while one block is differentiated was counted
in a compiled step: six arrays of the MLP's width, eight of the model's, queries, keys, values and the statistics of
attention. All of it is summed as if it lived at once, which is nearly what the compiler lays out.

Letters: D model width, F MLP width, N query heads, K key-value heads, H head dim, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from llmjax.core.config import flatten
from llmjax.core.sections import Config, ModelConfig
from llmjax.models.flops import num_params

HALF, FULL = 2, 4  # bytes of bfloat16 and float32
WIDTHS = {"float32": FULL, "bfloat16": HALF}
LANES = 128
MOMENTS = {"adamw": 2, "muon": 1}
BATCH_ARRAYS = 6  # of 4 bytes a token
LOGITS_BYTES = 2 * 128 * 2**20  # float32 logits of a chunk, and their derivative


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the mesh and the batch make of a step, the only part of a config that memory and time depend on."""

    model: ModelConfig
    sizes: Mapping[str, int]  # of the mesh axes, by the names of the config
    rows: int  # of a microbatch on one device
    seq_len: int  # of one device
    accumulation: int
    remat: str
    shard: str  # what the fsdp axis shards
    moments: int
    moment_bytes: int = FULL  # of one number on the device

    @property
    def tokens(self) -> int:
        """Of a microbatch on one device."""
        return self.rows * self.seq_len

    @property
    def tensor(self) -> int:
        return self.sizes["tensor"]


def layout_of(config: Config, sizes: Mapping[str, int]) -> Layout:
    """The layout of a config on a mesh of `sizes`."""
    spread = math.prod(sizes[axis] for axis in ("slice", "data", "fsdp", "expert"))
    return Layout(
        model=config.model, sizes=sizes, rows=max(1, config.data.batch_size // (spread * config.train.accumulation)),
        seq_len=config.data.seq_len // sizes["context"], accumulation=config.train.accumulation,
        remat=config.train.remat, shard=flatten(config).get("mesh.shard", "parameters"),
        moments=MOMENTS.get(config.optim.name, 2),
        moment_bytes=0 if config.optim.memory == "host" else WIDTHS[config.optim.moments],
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device by kind."""

    parameters: float
    optimiser: float
    batch: float
    gradients: float
    residuals: float  # what waits for the derivative
    activations: float  # of the block that is being differentiated, or of a chunk of logits where that is more
    weights: float  # gathered, and their gradients before they are scattered
    head: float  # embedding and output projection, gathered, and their gradients

    @property
    def argument(self) -> float:
        return self.parameters + self.optimiser + self.batch

    @property
    def temp(self) -> float:
        return self.gradients + self.residuals + self.activations + self.weights + self.head

    @property
    def total(self) -> float:
        return self.argument + self.temp


def memory(layout: Layout) -> Memory:
    """The model's sum for a layout."""
    model, tokens, tensor = layout.model, layout.tokens, layout.tensor
    split = tensor * layout.sizes["stage"]
    shards = layout.sizes["fsdp"]
    stored = num_params(model) / split
    block = block_params(model) / tensor
    table = model.vocab_size * model.dim / tensor
    layers = model.num_layers / layout.sizes["stage"]
    held = layout.shard == "parameters"
    gradients = FULL * stored / (shards if layout.shard in ("parameters", "gradients") else 1)
    gathered = layers if layout.remat == "none" and held and shards > 1 else 1
    return Memory(
        parameters=FULL * stored / (shards if held else 1),
        optimiser=layout.moments * layout.moment_bytes * stored / (shards if layout.shard != "nothing" else 1),
        batch=BATCH_ARRAYS * FULL * tokens * layout.accumulation,
        gradients=gradients * (2 if layout.accumulation > 1 else 1),
        residuals=HALF * tokens * layers * _waiting(layout),
        activations=max(HALF * tokens * _working(model, tensor),
                        min(LOGITS_BYTES, 2 * FULL * tokens * model.vocab_size / tensor)),
        weights=HALF * block * gathered + FULL * block,
        head=(2 * HALF + 2 * FULL) * table,
    )


def block_params(model: ModelConfig) -> float:
    """Parameters of one block."""
    tables = model.vocab_size * model.dim * (1 if model.embeddings == "tied" else 2)
    return (num_params(model) - tables) / model.num_layers


def _waiting(layout: Layout) -> float:
    """Elements a token that wait in every layer."""
    model, tensor = layout.model, layout.tensor
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim / tensor
    matmuls = 3 * model.dim + heads + 2 * model.mlp_dim / tensor
    statistics = model.num_heads / tensor * FULL / HALF
    block_input = model.dim / tensor  # between blocks tensor shards share the tokens
    return {"none": matmuls + statistics, "save_matmuls": matmuls}.get(layout.remat, block_input)


def _working(model: ModelConfig, tensor: int) -> float:
    """Elements a token that live while one block is differentiated."""
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    statistics = 2 * model.num_heads * LANES * FULL / HALF / 2
    return 8 * model.dim + (6 * model.mlp_dim + heads + statistics) / tensor
