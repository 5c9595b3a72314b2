"""What the processes of one run do together beside the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def first_alone(name: str, work: Callable[[], object]) -> None:
    """Process 0 does `work`, for example writes a file that all share; nobody goes on before it is done.

    Call it on every process, at the same point and with the same `name`.
    """
    import jax

    if jax.process_index() == 0:
        work()
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agreed(value: bool) -> bool:
    """What process 0 says, on every process: clocks differ, and all have to go the same way."""
    import jax

    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def whole(tree: Any) -> Any:
    """Host copies of arrays, whole on every process wherever their shards lie; call it on every process.

    An array that lies on this process's devices alone stays its own.
    """
    import jax
    from jax.experimental import multihost_utils

    def fetch(leaf: Any) -> Any:
        local = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        return jax.device_get(leaf) if local else multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)
