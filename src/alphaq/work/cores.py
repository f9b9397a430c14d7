"""The cores that a process may use, and how its threads wait beside other processes. Imports no torch, which reads this
from the environment when it is loaded."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

SPINS = "20000"  # a fraction of a millisecond; 300,000 where nothing is said
_GROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores that this process may use at once."""
    allowed, quota = _allowed_cores(), _quota()
    return allowed if quota is None else min(allowed, max(1, int(quota)))


def consider_others() -> None:
    """Keep threads within a container's share and let them sleep soon where they wait, unless the environment says how.

    A thread of OpenMP that waits for the others spins for milliseconds; where another process has their core, for as
    long as that one's turn lasts, which makes a command take several times as long.
    """
    quota = _quota()
    if quota is not None and quota < _allowed_cores():  # torch counts cores alone
        os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _allowed_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota() -> float | None:
    """How many cores' time a container may use, all threads together; None where nothing limits it."""
    with suppress(OSError, ArithmeticError, ValueError):  # no Linux, or "max"
        limit, period = (_GROUPS / "cpu.max").read_text(encoding="ascii").split()
        return int(limit) / int(period)
    with suppress(OSError, ArithmeticError, ValueError):
        limit, period = ((_GROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(limit) / int(period) if int(limit) > 0 else None
    return None
