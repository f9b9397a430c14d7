"""A Ray cluster of separate node processes on this machine, without dashboard or usage statistics."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DISABLE_IMPORT_WARNING="1", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")


_HERE = str(Path(__file__).parent)
if _HERE not in os.environ.get("PYTHONPATH", "").split(os.pathsep):  # nodes import the functions below
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_HERE, os.environ.get("PYTHONPATH"))))


class Nodes:
    """A head without cores, and worker nodes that can be added and killed."""

    def __init__(self, count: int, cores: int = 1) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 200 << 20},
        )
        self.nodes = [self.add(cores) for _ in range(count)]

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, cores: int = 1, **more: Any) -> Any:
        return self.cluster.add_node(num_cpus=cores, object_store_memory=200 << 20, **more)

    def kill(self, node: Any) -> None:
        """As when a machine loses its power."""
        self.cluster.remove_node(node, allow_graceful=False)

    def stop(self) -> None:
        self.cluster.shutdown()


def slow_square(shared: int, task: int) -> int:
    time.sleep(0.05)
    return shared * task * task


def where(shared: Any, task: int) -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def killed(shared: Path, task: int) -> int:
    """Dies with its process: always, if so many times are asked for, else the first time."""
    marks = list(shared.iterdir())
    if task == 3 and len(marks) < int(shared.name):
        (shared / f"{len(marks)}").touch()
        os._exit(1)
    return task


def fails(shared: Any, task: int) -> int:
    from alphaq.errors import QuantizationError

    if task >= 5:
        raise QuantizationError(f"task {task} cannot be")
    return task


def defect(shared: Any, task: int) -> int:
    raise ZeroDivisionError("a mistake of ours")


def array_of(shared: int, task: int) -> Any:
    """A result of so many bytes."""
    import numpy as np

    return np.full(shared, task % 256, np.uint8)
