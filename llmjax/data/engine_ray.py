"""Curation on Ray Data, for stages that run on accelerators: a unit is a row of a data set, a task may ask for devices.

Finding duplicates needs no accelerator and is done where the driver is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax.core.errors import ConfigError, RunError
from llmjax.data.embedded import Embedded
from llmjax.data.stage import Item, Result

if TYPE_CHECKING:
    import pyarrow as pa


# Nothing is reported to anyone; a busy machine may take minutes to start Ray's processes.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_agent_register_timeout_ms": "300000"}


class RayEngine:
    """A Ray cluster, one of this machine's own without an address; a context manager that lets go of it."""

    def __init__(self, address: str = "", *, resources: dict[str, float] | None = None):
        """`resources`: what each task occupies, for example {"TPU": 4} or {"num_gpus": 1}."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError:
            raise RunError("--engine=ray needs Ray Data: pip install 'llmjax[ray]'") from None
        package = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
        ray.init(address=address or None, runtime_env={"env_vars": {"PYTHONPATH": paths}}, include_dashboard=False,
                 log_to_driver=False)
        self._ray = ray
        _refuse_missing(resources or {}, ray.cluster_resources())
        self._options = _options(resources or {})

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """`function` of each item, in the order of the items."""
        import ray.data

        ray.data.DataContext.get_current().execution_options.preserve_order = True
        rows = [{"place": place, "item": item} for place, item in enumerate(items)]
        if not rows:
            return
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            lambda row: {"place": row["place"], "result": [function(row["item"])]}, **self._options)
        for row in dataset.iter_rows():
            yield row["result"][0]

    def duplicates(self, signatures: Sequence[Path], *, threshold: float) -> pa.Table:
        """As the embedded engine."""
        return Embedded().duplicates(signatures, threshold=threshold)


def open_ray(spec: str) -> RayEngine:
    """The engine that `ADDRESS,NAME=AMOUNT,...` stands for; ConfigError for devices that are not named so."""
    address, *devices = spec.split(",")
    try:
        resources = {name: float(amount) for name, amount in (device.split("=") for device in devices)}
    except ValueError:
        raise ConfigError(f"--engine=ray:{spec}: devices are named as in ray:,num_gpus=1 or ray:ADDRESS,TPU=4"
                          ) from None
    return RayEngine(address, resources=resources)


def _refuse_missing(resources: dict[str, float], available: dict[str, float]) -> None:
    """RunError for a device that the cluster does not have: tasks would wait for it without end."""
    for name, amount in resources.items():
        if available.get({"num_gpus": "GPU", "num_cpus": "CPU"}.get(name, name), 0) < amount:
            raise RunError(f"--engine=ray: no machine of the cluster can lend {name}={amount:g}; it has "
                           f"{', '.join(f'{n}={a:g}' for n, a in available.items() if n in ('CPU', 'GPU', 'TPU'))}")


def _options(resources: dict[str, float]) -> dict[str, Any]:
    """Arguments of a Ray task: GPUs and CPUs have names of their own, everything else is a custom resource."""
    named = {name: amount for name, amount in resources.items() if name.startswith("num_")}
    custom = {name: amount for name, amount in resources.items() if not name.startswith("num_")}
    return {**named, **({"resources": custom} if custom else {})}
