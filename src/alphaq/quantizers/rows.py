"""Kernels over whole rows of a matrix, a part in each thread, and what fp16 scales cannot hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from alphaq.errors import QuantizationError
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.simd.sums import in_threads, row_parts, squared_norm
from alphaq.simd.vectors import flat

FP16_MAX = 65504.0
BELOW_FP16 = 2.0**-26  # no step or mean of smaller weights rounds to an fp16 above 0


def quantized(
    kernel: Callable[..., float], settings: tuple[object, ...], weight: torch.Tensor, choice: Choice, name: str
) -> QuantizedMatrix:
    """Quantize a [rows, columns] matrix by a kernel of rows and its settings.

    Raises QuantizationError naming the matrix if it cannot be stored.
    """
    rows, columns = weight.shape
    groups = choice.groups(columns)
    packed = np.zeros((rows, choice.row_bytes(columns)), np.uint8)
    scales, offsets = np.empty((2, rows, groups), np.float32)
    error = over_groups(kernel, settings, weight, choice, (packed, scales, offsets), name)
    return QuantizedMatrix(
        choice,
        (rows, columns),
        torch.from_numpy(packed),
        torch.from_numpy(scales.astype(np.float16)),
        None if choice.symmetric else torch.from_numpy(_stored_offsets(offsets, choice)),
        error,
    )


def over_groups(
    kernel: Callable[..., float],
    settings: tuple[object, ...],
    weight: torch.Tensor,
    choice: Choice,
    filled: Sequence[np.ndarray],
    name: str,
) -> float:
    """Run a kernel of rows (`rows_kernel`) over a matrix: Σ(w − ŵ)², exact where all weights become 0.

    filled: packed codes, scales, offsets, and what else the kernel fills, each [rows, …]. Raises QuantizationError
    naming the matrix if fp16 scales cannot hold its weights, or some are no numbers.
    """
    largest = np.full((weight.shape[0], 1), -np.inf, np.float32)  # the first row's place of each part is filled
    given = (choice.bits, choice.group_size, choice.symmetric, settings)
    error = over_rows(kernel, given, weight, (largest, *filled))
    # Half a step beyond the largest weight, a third of it at most, must still be a number where fp16 is computed in.
    most = FP16_MAX * 0.75 if weight.dtype == torch.float16 else FP16_MAX
    if not largest.max() <= most:
        raise too_large(name, most)
    # Where all becomes 0, squares may be too small for the kernel's float32.
    return squared_norm(weight) if largest.max() < BELOW_FP16 else error


def over_rows(
    kernel: Callable[..., float], settings: Sequence[object], weight: torch.Tensor, filled: Sequence[np.ndarray]
) -> float:
    """The sum of what a kernel returns for parts of a [rows, columns] matrix, whatever the number of threads.

    The kernel takes the part's weights (flat), columns, `settings`, then its rows (flat) of each array in `filled`,
    [rows, …].
    """
    rows, columns = weight.shape
    source = flat(weight.contiguous())

    def work(part: slice) -> float:
        own = source[part.start * columns : part.stop * columns]
        return kernel(own, columns, *settings, *(array[part].reshape(-1) for array in filled))

    return math.fsum(in_threads(work, row_parts(rows, columns)))


def too_large(name: str, most: float) -> QuantizationError:
    """The error of a matrix with weights beyond `most`, or with some that are no numbers."""
    return QuantizationError(
        f"{name} holds NaN, infinite or too large weights (beyond {most:g}), which fp16 scales cannot represent. The "
        f"checkpoint is damaged, or keep this matrix with --pin '{name}=16'."
    )


def _stored_offsets(offsets: np.ndarray, choice: Choice) -> np.ndarray:
    return offsets.astype(np.float16 if choice.bits == 1 else np.uint8)
