"""The analytic model of a step's memory, in bytes of one device, with which the search prunes.

What waits for the derivative follows from the remat policy; while one block is differentiated there are four arrays of
the MLP's width, six of the model's, queries, keys, values and the statistics of attention. All of it is summed as if it
lived at once, which is nearly what the compiler lays out: these counts are of thirteen compiled steps. Beside a decoder
an encoder is a second stack, of source tokens; what it makes of them every layer of the decoder reads.

Letters: D model width, F MLP width, N query heads, K key-value heads, H head dim, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal

from llmjax.core.config import flatten
from llmjax.core.sections import Config, ModelConfig, OptimConfig
from llmjax.models.experts import ROOM
from llmjax.models.flops import declared, num_params
from llmjax.optim.held import held_shapes

FULL = 4  # bytes of float32
WIDTHS = {"float32": FULL, "bfloat16": 2, "float16": 2}
LANES = 128
BATCH_ARRAYS = 6  # of 4 bytes a token
LOGITS_BYTES = 2 * 128 * 2**20  # float32 logits of a chunk, and their derivative
EXPERT_ARRAYS = 7  # of the room for rows, as wide as model and experts: in compiled steps of Mixtral and DeepSeek-V3


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the mesh and the batch make of a step, the only part of a config that memory and time depend on."""

    model: ModelConfig
    sizes: Mapping[str, int]  # of the mesh axes, by the names of the config
    rows: int  # of a microbatch on one device
    seq_len: int  # of one device; with an encoder, of its sources
    accumulation: int
    remat: str
    shard: str  # what the fsdp axis shards
    moments: float  # numbers that the optimiser keeps a parameter
    moment_bytes: int = FULL  # of one number on the device
    target_len: int = 0  # with an encoder: of one device's targets

    @property
    def tokens(self) -> int:
        """Of a microbatch on one device."""
        return self.rows * self.seq_len

    @property
    def decoder_tokens(self) -> int:
        """Those that the decoder works on."""
        return self.rows * (self.target_len or self.seq_len)

    @property
    def width(self) -> int:
        """Bytes of a number in compute precision."""
        return WIDTHS[self.model.compute_dtype]

    @property
    def tensor(self) -> int:
        return self.sizes["tensor"]


def layout_of(config: Config, sizes: Mapping[str, int]) -> Layout:
    """The layout of a config on a mesh of `sizes`."""
    spread = math.prod(sizes[axis] for axis in ("slice", "data", "fsdp", "expert"))
    target_len = config.data.target_len or config.data.seq_len
    return Layout(
        model=config.model, sizes=sizes, rows=max(1, config.data.batch_size // (spread * config.train.accumulation)),
        seq_len=config.data.seq_len // sizes["context"], accumulation=config.train.accumulation,
        remat=config.train.remat, shard=flatten(config).get("mesh.shard", "parameters"),
        moments=moments_a_parameter(config.model, config.optim),
        moment_bytes=0 if config.optim.memory == "host" else WIDTHS[config.optim.moments],
        target_len=target_len if config.model.encoder_layers else 0,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device by kind."""

    parameters: float
    optimiser: float
    batch: float
    gradients: float  # as they were added up, and as the update reads them
    residuals: float  # what waits for the derivative
    activations: float  # of the block that is being differentiated, or of a chunk of logits where that is more
    weights: float  # gathered, and their gradients before they are scattered
    head: float  # embedding or output projection, gathered, and its gradient

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
    model, tensor = layout.model, layout.tensor
    split = tensor * layout.sizes["stage"]
    shards = layout.sizes["fsdp"]
    experts = expert_params(model) * (1 - 1 / layout.sizes["expert"])  # that other shards of experts hold
    stored = (num_params(model) - experts) / split
    stacks = _stacks(layout)
    block = (max(stack.params for stack in stacks) - experts / model.num_layers) / tensor
    table = model.vocab_size * model.dim / tensor
    held = layout.shard == "parameters"
    gradients = 2 * FULL * stored / (shards if layout.shard in ("parameters", "gradients") else 1)
    all_gathered = layout.remat == "none" and held and shards > 1
    return Memory(
        parameters=FULL * stored / (shards if held else 1),
        optimiser=layout.moments * layout.moment_bytes * stored / (shards if layout.shard != "nothing" else 1),
        batch=BATCH_ARRAYS * FULL * sum(stack.tokens for stack in stacks) * layout.accumulation,
        gradients=gradients * (2 if layout.accumulation > 1 else 1),
        residuals=layout.width * sum(stack.tokens * stack.layers * stack.waiting + stack.outputs for stack in stacks),
        activations=max(layout.width * max(stack.tokens * stack.working for stack in stacks),
                        min(LOGITS_BYTES, 2 * FULL * layout.decoder_tokens * model.vocab_size / tensor)),
        weights=layout.width * (sum(stack.params * stack.layers for stack in stacks) / tensor if all_gathered
                                else block) + layout.width * block,
        head=(layout.width + FULL) * table,
    )


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Layers that are alike, and what they work on."""

    layers: float  # of one stage
    tokens: int
    params: float  # of one block
    waiting: float  # elements a token that wait in every layer
    working: float  # elements a token that live while one block is differentiated
    outputs: float = 0.0  # elements that what the last layer leaves, and its derivative, keep


def _stacks(layout: Layout) -> list[_Stack]:
    model, stages = layout.model, layout.sizes["stage"]
    own, beside = _waiting(layout), _cross_heads(layout) if model.encoder_layers else 0.0
    working = _working(layout)
    stacks = [_Stack(model.num_layers / stages, layout.decoder_tokens, block_params(model),
                     waiting=own + (beside if layout.remat in ("none", "save_matmuls") else 0.0),
                     working=working + beside)]  # fmt: skip
    if model.encoder_layers:
        stacks.append(_Stack(model.encoder_layers / stages, layout.tokens, block_params(model, stack="encoder"),
                             waiting=own, working=working, outputs=2 * layout.tokens * model.dim / layout.tensor))
    return stacks


@functools.lru_cache(maxsize=64)
def block_params(model: ModelConfig, *, stack: Literal["decoder", "encoder"] = "decoder") -> float:
    """Parameters of one block, on average over the layers."""
    sizes = [one.size for one in declared(model) if "layers" in one.axes and one.path[0] != "multi_token"
             and (one.path[0] == "encoder") == (stack == "encoder")]  # fmt: skip
    return sum(sizes) / (model.encoder_layers if stack == "encoder" else model.num_layers)


@functools.lru_cache(maxsize=64)
def expert_params(model: ModelConfig) -> int:
    """Parameters that an expert axis splits."""
    return sum(one.size for one in declared(model) if "expert" in one.axes)


@functools.lru_cache(maxsize=64)
def moments_a_parameter(model: ModelConfig, optim: OptimConfig) -> float:
    """Numbers that the optimiser keeps, over those of the parameters."""
    held = [shape for one in declared(model) for shape in held_shapes(optim, one.axes, one.shape)]
    return sum(map(math.prod, held)) / sum(one.size for one in declared(model))


def _waiting(layout: Layout) -> float:
    """Elements a token that wait in every layer."""
    model, tensor = layout.model, layout.tensor
    statistics = model.num_heads / tensor * FULL / layout.width
    everything = 3 * model.dim + (_heads(model) + 2 * model.mlp_dim) / tensor + statistics
    # Block input; queries, keys, values and output; gate and up. No derivative needs what comes of down.
    saved = 2 * model.dim + ((model.num_heads + 2 * model.num_kv_heads) * model.head_dim + 2 * model.mlp_dim) / tensor
    block_input = model.dim / tensor  # between blocks tensor shards share the tokens
    waiting = {"none": everything, "save_matmuls": saved, "offload": 0.0}  # the last waits in host memory
    return waiting.get(layout.remat, block_input)


def _working(layout: Layout) -> float:
    """Elements a token that live while one block is differentiated."""
    model, tensor = layout.model, layout.tensor
    statistics = 2 * model.num_heads * LANES * FULL / layout.width / 2
    mlp: float = 4 * model.mlp_dim
    if model.moe.num_experts:
        room = min(layout.sizes["expert"], ROOM) * model.moe.top_k  # rows of a shard of the experts
        mlp = EXPERT_ARRAYS * room * ((model.moe.expert_mlp_dim or model.mlp_dim) + model.dim)
    return 6 * model.dim + (mlp + _heads(model) + statistics) / tensor


def _heads(model: ModelConfig) -> float:
    """Elements a token of queries, keys, values and what attention makes of them."""
    return (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim


def _cross_heads(layout: Layout) -> float:
    """The same of attention to the sources, whose keys and values are spread over the target tokens."""
    model, sources = layout.model, layout.tokens / layout.decoder_tokens
    return 2 * (model.num_heads + sources * model.num_kv_heads) * model.head_dim / layout.tensor
