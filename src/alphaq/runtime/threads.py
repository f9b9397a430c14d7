"""Run a compiled function on all of torch's threads at once.

torch's own OpenMP threads are asked, through the entry that GNU's and LLVM's runtimes share: they wait for work
already, stay where an application has bound them, and no second pool competes for the same cores. Where torch has
another kind of threads (macOS, Windows), Python threads do the same, some tens of microseconds slower.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from alphaq.numerics import in_threads

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_on_all(function: int, data: int) -> None:
    """Call the C function at an address, void (*)(void *), with `data` on each thread; returns when all have."""
    threads = torch.get_num_threads()
    if threads > 1 and (parallel := _openmp()) is not None:
        parallel(function, data, threads, 0)
        return
    call = _FUNCTION(function)
    in_threads(lambda _: call(data), range(threads))


@lru_cache(maxsize=1)
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel(function, data, threads, flags) of the runtime that torch has loaded, or None."""
    if not torch.backends.openmp.is_available():
        return None
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    libraries = re.findall(r"/\S*/lib(?:gomp|omp|iomp5)[^/\n]*\.so[.\d]*$", mapped, re.MULTILINE)
    own = str(Path(torch.__file__).parent)
    for library in sorted(dict.fromkeys(libraries), key=lambda path: not path.startswith(own)):
        try:
            parallel = ctypes.CDLL(library).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None
