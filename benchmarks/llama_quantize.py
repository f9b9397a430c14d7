"""llama.cpp's own quantizer as a command, where its `llama-quantize` is not installed.

    pip install llama-cpp-python
    python benchmarks/llama_quantize.py MODEL.gguf OUT.gguf IQ2_M [--imatrix imatrix.gguf]

The wheel has llama.cpp's shared library, which exports the function that `llama-quantize` calls (the one in
`xllamacpp` does not). An importance matrix is handed over as `llama-quantize` does: sums over counts, ones where a
weight, or an expert, met no token. It refuses what llama.cpp refuses, types that need an importance matrix without one
among them.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

RECIPES = {  # `llama_ftype` in llama.h
    **{"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14},
    **{"Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21},
    **{"IQ3_XS": 22, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28},
    **{"IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31},
}


class _Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Params(ctypes.Structure):
    """`llama_model_quantize_params` of 2026; what follows is not set here."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *((name, ctypes.c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure")),
        *((name, ctypes.c_bool) for name in ("keep_split", "dry_run")),
        ("imatrix", ctypes.c_void_p),
        ("_rest", ctypes.c_ubyte * 256),
    )


USUAL = {"ftype": 7, "quantize_output_tensor": True, "only_copy": False, "pure": False, "imatrix": None}


def library() -> ctypes.CDLL:
    """Raises SystemExit without the wheel, or where its structure is not the known one."""
    found = find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise SystemExit("llama.cpp's quantizer is not installed. Run: pip install llama-cpp-python")
    names = ("libllama.so", "libllama.dylib", "llama.dll")
    paths = (Path(found.origin).parent / "lib" / name for name in names)
    loaded = ctypes.CDLL(str(next(path for path in paths if path.is_file())))
    loaded.llama_model_quantize_default_params.restype = _Params
    params = loaded.llama_model_quantize_default_params()
    if changed := {name: getattr(params, name) for name, usual in USUAL.items() if getattr(params, name) != usual}:
        raise SystemExit(f"This build of llama.cpp has other parameters ({changed}). Compare its llama.h.")
    return loaded


def importance(path: Path) -> dict[str, np.ndarray]:
    """float32 [experts · columns] by tensor, of a file of `alphaq imatrix` or `llama-imatrix`."""
    tensors: dict[str, Any] = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    found = {}
    for name, sums in tensors.items():
        if name.endswith(".in_sum2"):
            own = name.removesuffix(".in_sum2")
            counts = tensors[f"{own}.counts"].reshape(-1, 1)
            means = np.where(counts > 0, sums.reshape(len(counts), -1) / np.maximum(counts, 1), 1.0)
            found[own] = np.ascontiguousarray(means, np.float32).ravel()
    return found


def quantize(source: Path, out: Path, recipe: str, imatrix: Path | None, threads: int) -> int:
    """llama.cpp's code, 0 for success."""
    loaded = library()
    params = loaded.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, RECIPES[recipe]
    given = importance(imatrix) if imatrix is not None else {}
    entries = (_Importance * (len(given) + 1))(*((k.encode(), v.ctypes.data, v.size) for k, v in given.items()))
    if given:
        params.imatrix = ctypes.addressof(entries)
    loaded.llama_backend_init()
    return int(loaded.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)))


def main() -> None:
    """One file."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("source", type=Path, metavar="MODEL.gguf")
    arguments.add_argument("out", type=Path, metavar="OUT.gguf")
    arguments.add_argument("recipe", choices=RECIPES, metavar="RECIPE")
    arguments.add_argument("--imatrix", type=Path)
    arguments.add_argument("--threads", type=int, default=1)
    given = arguments.parse_args()
    sys.exit(quantize(given.source, given.out, given.recipe, given.imatrix, given.threads))


if __name__ == "__main__":
    main()
