"""llama.cpp's own code, in the shared object of the `xllamacpp` wheel."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from alphaq.errors import MissingExtraError


def shared_object() -> Path | None:
    """The wheel's shared object, None if it is not installed."""
    found = find_spec("xllamacpp")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    objects = (
        path for folder in folders for ending in ("so", "dylib", "pyd") for path in Path(folder).glob(f"*.{ending}")
    )
    return next(objects, None)


@lru_cache(maxsize=1)
def library() -> Any:
    """The shared object. Raises MissingExtraError if it is not installed."""
    path = shared_object()
    if path is None:
        raise MissingExtraError("gguf", "Quantizing for llama.cpp calls llama.cpp's own quantizers")
    found = ctypes.CDLL(str(path))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return found


def restore_rows(codes: np.ndarray, type: str, columns: int) -> np.ndarray:
    """float32 [rows, columns] that blocks of a type, uint8 [rows, bytes per row], stand for."""
    values = np.empty((len(codes), columns), np.float32)
    codes = np.ascontiguousarray(codes)
    function = getattr(library(), f"dequantize_row_{_suffix(type)}")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    function(codes.ctypes.data, values.ctypes.data, values.size)
    return values


def _suffix(type: str) -> str:
    """q4_K, iq2_xxs: the C functions keep only the K in capitals."""
    return type.lower().replace("_k", "_K")
