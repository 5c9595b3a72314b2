"""What devices without published figures can do, measured in two seconds: a CPU's, which share its memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.core import collectives
from llmjax.kernels.matmul import api as matmul
from llmjax.plan.speed import Machine

AXIS = "data"  # of the mesh that is probed
SQUARE = 1024  # rows and columns of a product
BLOCK = (512, 512)  # numbers of a device that are read, laid out anew and summed
NETWORK_BANDWIDTH = 1.25e9  # bytes/s, 10 Gbit/s
CHAIN = 8  # collectives of one run, so that its own start is small beside them
SECONDS = 0.3  # that a probe goes on for, so that what else the machine does for a moment is not all it sees


def measured_machine(dtype: str) -> Machine:
    """This process's devices: products, memory, transposes and sums over all of them at once."""
    devices = jax.local_devices()
    with jax.set_mesh(Mesh(devices[:1], (AXIS,))):
        product_rate = _product_rate(dtype)
    mesh = Mesh(devices, (AXIS,))
    with jax.set_mesh(mesh):
        latency, exchange = _sums(mesh)
        return Machine(
            peak_flops=product_rate / len(devices),
            memory_bandwidth=2 * _bytes() / _on_all(mesh, lambda x_MN: x_MN * 1.5 + 1.0, BLOCK),
            operand_bandwidth=_bytes() / _on_all(mesh, lambda x_MN: x_MN.T, BLOCK),
            link_bandwidth=exchange, latency=latency, dims=(jax.device_count(),), wraps=False,
        )  # fmt: skip


def _product_rate(dtype: str) -> float:
    """FLOP/s of one device that has the machine for itself."""
    alone = jax.local_device_count() == 1  # as a step multiplies
    multiply = jax.jit(lambda x_MN: matmul.einsum("MK,KN->MN", x_MN, x_MN) if alone else x_MN @ x_MN)
    return 2 * SQUARE**3 / _shortest(multiply, jnp.ones((SQUARE, SQUARE), dtype))


def _sums(mesh: Mesh) -> tuple[float, float]:
    """Seconds that a collective takes to begin and bytes/s into a device, by sums of one number and of a block."""

    def chain(x_MN: jax.Array) -> jax.Array:
        for _ in range(CHAIN):
            x_MN = collectives.sum_over(x_MN, (AXIS,)) / mesh.size
        return x_MN

    if mesh.size == 1:  # others, if there are any, are behind a network
        return 0.0, NETWORK_BANDWIDTH
    latency = _on_all(mesh, chain, (1, 1)) / CHAIN
    moved = 2 * (mesh.size - 1) / mesh.size * _bytes()
    return latency, moved / max(_on_all(mesh, chain, BLOCK) / CHAIN - latency, 1e-9)


def _bytes() -> int:
    """Of a device's block."""
    return 4 * math.prod(BLOCK)


def _on_all(mesh: Mesh, function: Callable[[jax.Array], jax.Array], shape: tuple[int, int]) -> float:
    """Seconds of a function of one device's numbers while all devices are at it."""
    spec = PartitionSpec(AXIS)
    over = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x_MN = jax.device_put(jnp.ones((mesh.size * shape[0], shape[1])), NamedSharding(mesh, spec))
    return _shortest(jax.jit(over), x_MN)


def _shortest(function: Any, x: jax.Array) -> float:
    """Seconds of the best run after the first."""
    function(x).block_until_ready()
    shortest, end = math.inf, time.perf_counter() + SECONDS
    while (began := time.perf_counter()) < end:
        function(x).block_until_ready()
        shortest = min(shortest, time.perf_counter() - began)
    return shortest
