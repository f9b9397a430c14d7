"""llama.cpp's own quantizers, called in the shared object of the `xllamacpp` wheel.

A row becomes blocks of 32 or 256 weights; which type is a choice's name. The types below 3 bits search for
the codes of least Σ m·(w − ŵ)², with an importance m per column: ones, unless a user brings an importance
matrix. Rows do not see one another, so any rows can be quantized apart, in any thread, to the same bytes.
Source: ggml_quantize_chunk in ggml.h; the tests compare with the `gguf` package's dequantization.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch

from alphaq.errors import QuantizationError
from alphaq.formats.ggml import GGML_BLOCKS, GGML_TYPES
from alphaq.formats.ggml_library import library, restore_rows
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.rows import FP16_MAX, too_large
from alphaq.simd.sums import in_threads, row_parts, squared_distance


@cache
def _prepared(type: str) -> Any:
    """The library once a type's tables are built, which takes seconds for some; llama.cpp lets one thread build."""
    built = library()
    built.ggml_quantize_init(GGML_TYPES[type].number)
    return built


def quantize_ggml(
    weight: torch.Tensor, choice: Choice, name: str = "matrix", importance: np.ndarray | None = None
) -> QuantizedMatrix:
    """Blocks of a [rows, columns] matrix as codes uint8 [rows, bytes per row]; scales are inside.

    importance: float32 [columns], positive. Raises QuantizationError naming the matrix if it is not finite or its
    rows are not whole blocks.
    """
    rows, columns = weight.shape
    _, block, nbytes = GGML_BLOCKS[choice.name]
    if columns % block:
        raise QuantizationError(f"{name}: rows of {columns} weights are not whole {choice} blocks of {block}.")
    weights = np.ones(columns, np.float32) if importance is None else importance
    codes = np.empty((rows, columns // block * nbytes), np.uint8)

    def quantize(part: slice) -> float:
        values = weight[part].float().contiguous()
        source = values.numpy()
        if not np.abs(source).max(initial=0) <= FP16_MAX:  # llama.cpp would end the process, or store infinite scales
            raise too_large(name, FP16_MAX)
        blocks_of(source, choice.name, weights, codes[part])
        return squared_distance(values, torch.from_numpy(restore_rows(codes[part], choice.name, columns)))

    error = math.fsum(in_threads(quantize, row_parts(rows, columns)))
    if not math.isfinite(error):
        raise QuantizationError(f"{name} cannot be stored as {choice}: its scales overflow. Choose another type.")
    return QuantizedMatrix(choice, (rows, columns), torch.from_numpy(codes), None, None, error)


def blocks_of(values: np.ndarray, type: str, importance: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows [rows, columns] into `out`, uint8 [rows, bytes per row].

    importance: float32 [columns]; None lets llama.cpp weigh errors by its own rules, which some types refuse.
    """
    rows, columns = values.shape
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if weights is None else weights.ctypes.data
    number = GGML_TYPES[type].number
    _prepared(type).ggml_quantize_chunk(number, values.ctypes.data, out.ctypes.data, 0, rows, columns, pointer)
