"""What the processes of one run do together beside the step."""

from __future__ import annotations

from collections.abc import Callable


def first_alone(name: str, work: Callable[[], None]) -> None:
    """Process 0 does `work`, for example writes a file that all share; nobody goes on before it is done.

    Call it on every process, at the same point and with the same `name`.
    """
    import jax

    if jax.process_index() == 0:
        work()
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
