"""The TPU generations in one table: memory, clocks and bandwidths, with where the figures come from.

Memory, HBM and ICI: Google Cloud's system architecture pages of v4, v5e, v5p, v6e and TPU7x. A link's bandwidth is one
way: Austin et al. 2025, "How to Scale Your Model", table of chapter 2 (45 GB/s on v4 and v5e, 90 GB/s from v5p on).
Clock: peak over FLOPs a cycle on v4 to v6e, which is also what the compiler's latency-hiding schedule states
(`cycles_per_microsecond`: 1,500 on v5e, 1,750 on v5p, 1,900 on TPU7x). Peaks in FLOP/s stand in models/flops.py.
"""

from __future__ import annotations

import dataclasses

from llmjax.models.flops import peak_flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation."""

    device_kind: str  # as jax names it
    hbm_bytes: int  # of a chip
    hbm_bandwidth: float  # bytes/s of a chip
    clock: float  # Hz
    link_bandwidth: float  # bytes/s, one link and one way
    row_cycles: float  # a matrix unit takes 16 rows of bf16 in so many cycles
    num_dims: int  # of its torus
    wrap_multiple: int  # a slice closes into a torus when its dims are multiples of this
    megacore: bool  # two TensorCores work as one device
    devices_per_chip: int = 1

    @property
    def peak_flops(self) -> float:
        """Dense bf16 peak of a chip, FLOP/s."""
        peak = peak_flops(self.device_kind)
        assert peak, f"no peak known for {self.device_kind}"
        return peak * self.devices_per_chip


CHIPS = {
    "v4": Chip("TPU v4", 32 * GIB, 1228e9, clock=1.05e9, link_bandwidth=45e9, row_cycles=16, num_dims=3,
               wrap_multiple=4, megacore=True),
    "v5e": Chip("TPU v5 lite", 16 * GIB, 819e9, clock=1.5e9, link_bandwidth=45e9, row_cycles=16, num_dims=2,
                wrap_multiple=16, megacore=False),
    "v5p": Chip("TPU v5", 95 * GIB, 2765e9, clock=1.75e9, link_bandwidth=90e9, row_cycles=16, num_dims=3,
                wrap_multiple=4, megacore=True),
    "v6e": Chip("TPU v6 lite", 32 * GIB, 1640e9, clock=1.75e9, link_bandwidth=90e9, row_cycles=8, num_dims=2,
                wrap_multiple=16, megacore=False),
    "tpu7x": Chip("TPU7x", 192 * GIB, 7380e9, clock=1.9e9, link_bandwidth=90e9, row_cycles=8, num_dims=3,
                  wrap_multiple=4, megacore=False, devices_per_chip=2),
}  # fmt: skip
