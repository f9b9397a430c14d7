"""Let torch's own threads run compiled kernels.

The OpenMP runtime that torch has loaded is asked, through the entry that GNU's and LLVM's share: its threads wait for
work already, stay where an application has bound them, and no second pool competes for the same cores. Where torch has
threads of another kind (macOS, Windows), kernels run on one.
"""

from __future__ import annotations

import ctypes
import re
from functools import lru_cache
from pathlib import Path

import numba
import torch

from alphaq.runtime import kernels


def parallel() -> tuple[int, int, int]:
    """What kernels take last: addresses of the runtime's entry and of the threads' function, number of threads."""
    entry = _entry()
    return entry, _function(), torch.get_num_threads() if entry else 1


@lru_cache(maxsize=1)
def _function() -> int:
    """`kernels.work`, compiled for this machine."""
    options = {"error_model": "numpy", "boundscheck": False}
    try:
        return numba.cfunc(kernels.SIGNATURE, cache=True, **options)(kernels.work).address
    except RuntimeError:  # no folder to keep it in
        return numba.cfunc(kernels.SIGNATURE, **options)(kernels.work).address


@lru_cache(maxsize=1)
def _entry() -> int:
    """Address of GOMP_parallel(function, data, threads, flags) in the runtime that torch uses, or 0."""
    if not torch.backends.openmp.is_available():
        return 0
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    libraries = re.findall(r"/\S*/lib(?:gomp|omp|iomp5)[^/\n]*\.so[.\d]*$", mapped, re.MULTILINE)
    own = Path(torch.__file__).resolve().parent
    for library in sorted(dict.fromkeys(libraries), key=lambda path: own not in Path(path).parents):
        try:
            entry = ctypes.CDLL(library).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(entry, ctypes.c_void_p).value or 0
    return 0
