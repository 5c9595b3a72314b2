"""The analytic model of a step's time, in seconds of one chip, with which the search ranks before anything compiles.

Matrix products at a share of the peak, attention at a lower one, every collective exposed at the bandwidth of the
torus links that its mesh axis can use: pessimistic about overlap, the same for all candidates. On CPUs what goes into
products is laid out anew, and collectives take time to begin (see `plan/probes.py`).
"""

from __future__ import annotations

import dataclasses
import math

from llmjax.models.flops import flops_per_token, num_matmul_params, num_params
from llmjax.plan.chips import Chip
from llmjax.plan.memory import FULL, Layout

PRODUCTS = 7  # of a layer: queries, keys, values, output; gate, up, down
MATMUL_EFFICIENCY, ATTENTION_EFFICIENCY = 0.85, 0.5  # of the peak, as compiled steps came out
# Forward passes a step runs again, as a share of one: matrix products, attention.
RECOMPUTED = {"none": (0.0, 0.0), "save_matmuls": (0.0, 1.0)}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the model needs to know of a slice."""

    peak_flops: float  # of a device
    memory_bandwidth: float  # bytes/s of a device
    link_bandwidth: float  # bytes/s one way
    dims: tuple[int, ...]  # of the torus
    wraps: bool
    # Where a CPU loses time and a TPU next to none: what goes into a product is laid out anew first, at so many bytes/s
    # of a device, and a collective takes so many seconds to begin.
    operand_bandwidth: float = math.inf
    latency: float = 0.0

    @classmethod
    def of(cls, chip: Chip, dims: tuple[int, ...], *, wraps: bool) -> Machine:
        """A slice of TPUs."""
        devices = chip.devices_per_chip
        return cls(chip.peak_flops / devices, chip.hbm_bandwidth / devices, chip.link_bandwidth, dims, wraps)

    def bandwidth(self, size: int) -> float:
        """Bytes/s into a device from a mesh axis, which takes as few torus axes as hold it."""
        covered, used = 1, 0
        for dim in sorted((dim for dim in self.dims if dim > 1), reverse=True):
            if covered >= size:
                break
            covered, used = covered * dim, used + 1
        return max(used, 1) * self.link_bandwidth * (2 if self.wraps else 1)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """One step."""

    compute: float
    operands: float  # laid out for products
    update: float  # of the parameters by the optimiser
    communication: float

    @property
    def total(self) -> float:
        return self.compute + self.operands + self.update + self.communication


def seconds(layout: Layout, machine: Machine) -> Seconds:
    """The model's sum for a layout."""
    return Seconds(_compute(layout, machine), _operands(layout, machine), _update(layout, machine),
                   _communication(layout, machine) + _collectives(layout) * machine.latency)


def _compute(layout: Layout, machine: Machine) -> float:
    model, tokens = layout.model, layout.tokens * layout.accumulation
    matmuls = 2 * num_matmul_params(model)  # of one forward pass, a token
    attention = flops_per_token(model, layout.seq_len * layout.sizes["context"]) / 3 - matmuls
    head = 2 * model.vocab_size * model.dim  # its logits are computed twice whatever the policy
    again, attention_again = RECOMPUTED.get(layout.remat, (1.0, 1.0))
    blocks = (matmuls - head) * (3 + again) + head * 4
    spent = blocks / MATMUL_EFFICIENCY + attention * (3 + attention_again) / ATTENTION_EFFICIENCY
    return tokens * spent / (layout.tensor * layout.sizes["stage"] * machine.peak_flops)


def _operands(layout: Layout, machine: Machine) -> float:
    """Of each product and the two of its derivative: the parameters, which only tensor and stage divide, and the
    activations as wide as the model, which tensor does not divide."""
    model, passes = layout.model, 3 * layout.accumulation * layout.width / layout.sizes["stage"]
    activations = PRODUCTS * layout.tokens * model.dim * model.num_layers
    return passes * (activations + num_params(model) / layout.tensor) / machine.operand_bandwidth


def _update(layout: Layout, machine: Machine) -> float:
    """Parameters and moments are read and written, gradients read, once a step."""
    shards = 1 if layout.shard == "nothing" else layout.sizes["fsdp"]
    held = num_params(layout.model) / (layout.tensor * layout.sizes["stage"] * shards)
    return held * (3 * FULL + 2 * layout.moments * layout.moment_bytes) / machine.memory_bandwidth


def _communication(layout: Layout, machine: Machine) -> float:
    sizes, stored = layout.sizes, num_params(layout.model) / (layout.tensor * layout.sizes["stage"])
    total, shards = 0.0, sizes["fsdp"]
    if shards > 1 and layout.shard == "parameters":
        gathers = 1 if layout.remat == "none" else 2
        moved = (gathers * layout.width + FULL) * stored * layout.accumulation * (shards - 1) / shards
        total += moved / machine.bandwidth(shards)
    reduced = sizes["slice"] * sizes["data"] * sizes["context"] * (1 if layout.shard == "parameters" else shards)
    if reduced > 1:  # the gradients of what is replicated, once a step
        kept = stored / (shards if layout.shard == "parameters" else 1)
        total += 2 * FULL * kept * (reduced - 1) / reduced / machine.bandwidth(reduced)
    if layout.tensor > 1:
        size = layout.width * layout.tokens * layout.accumulation * layout.model.dim
        share = 2 * (layout.tensor - 1) / layout.tensor
        total += _sums(layout) * size * share / machine.bandwidth(layout.tensor)
    return total


def _sums(layout: Layout) -> int:
    """Over tensor: in a layer two forward, two backward, again where the forward pass is; at the ends two."""
    return layout.model.num_layers * (4 if layout.remat == "none" else 6) + 2


def _collectives(layout: Layout) -> int:
    """Of a step, all stages: a sum is a gather and a scatter, a parameter is gathered and its gradient scattered.

    Gradients of what is replicated are one sum, and count for nothing.
    """
    gathers = (1 if layout.remat == "none" else 2) * (layout.sizes["fsdp"] > 1 and layout.shard == "parameters")
    parameters = PRODUCTS * layout.model.num_layers + 2
    a_pass = (gathers + bool(gathers)) * parameters + (2 * _sums(layout) if layout.tensor > 1 else 0)
    return a_pass * layout.accumulation


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    return sorted({d for i in range(1, math.isqrt(number) + 1) if number % i == 0 for d in (i, number // i)})
