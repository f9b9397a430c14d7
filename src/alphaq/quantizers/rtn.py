"""Round to nearest on a uniform grid per group, with a search for the step of least squared error.

A group of weights w gets codes q = clamp(round(w/s) + z, 0, 2^b − 1) and is read back as s·(q − z).
The full range [min w, max w] spends codes on rare outliers, so s is shrunk in steps and the one with
the smallest Σ(w − s·(q − z))² is kept; one least-squares step s = Σ w(q − z) / Σ (q − z)² follows.
A group whose weights are whole multiples of a step is restored exactly, so quantizing twice is quantizing once, and
constants that fp16 can hold are exact. Min–max is the same without search and fit.
Least squares shrink what they cannot resolve: at 2 bits ŵ is a seventh short along w, in every matrix alike, and such
errors add up through a model where those at random average out. So the last fit of s lets errors along w count
BIAS_WEIGHT times: it makes |e|² + (BIAS_WEIGHT − 1)·(e·w)²/|w|² least, e = ŵ − w. With a weight of 1 (`clipped`) it is
least squares; without bound ŵ would be as long along w as w itself. 4 is best on trained models at 1, 2 and 3 bits
alike; from 4 bits on nothing depends on it (docs/LOG.md).
One bit has no grid: it stores sign(w − mean) with the mean and scale that fit best.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from alphaq.errors import QuantizationError
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.kernels import quantize_rows
from alphaq.simd.sums import in_threads, row_parts, squared_norm
from alphaq.simd.vectors import LANES, flat

SEARCH_STEPS = LANES
SMALLEST_SHRINK = {1: 1.0, 2: 0.3, 3: 0.4, 4: 0.55, 5: 0.65, 6: 0.75, 7: 0.85, 8: 0.9}
FP16_MAX = 65504.0
BIAS_WEIGHT = 4.0
BELOW_FP16 = 2.0**-26  # no step or mean of smaller weights rounds to an fp16 above 0


def quantize_rtn(
    weight: torch.Tensor, choice: Choice, name: str = "matrix", bias_weight: float = BIAS_WEIGHT
) -> QuantizedMatrix:
    """Quantize a [rows, columns] matrix. bias_weight: how many times errors along the weights count, 1 or more.

    Raises QuantizationError naming the matrix if it cannot be stored.
    """
    shrinks = np.linspace(1.0, SMALLEST_SHRINK[choice.bits], SEARCH_STEPS, dtype=np.float32)
    return quantized(quantize_rows, (shrinks, np.float32(bias_weight)), weight, choice, name)


def quantize_minmax(weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix:
    """Round a [rows, columns] matrix to the full range of each group, as most tools do.

    Raises QuantizationError naming the matrix if it cannot be stored.
    """
    return quantized(quantize_rows, (np.empty(0, np.float32), np.float32(1)), weight, choice, name)


def quantized(
    kernel: Callable[..., float], settings: tuple[object, ...], weight: torch.Tensor, choice: Choice, name: str
) -> QuantizedMatrix:
    """Run a kernel with the arguments of `quantize_rows`, `settings` after symmetric, over a [rows, columns] matrix.

    Raises QuantizationError naming the matrix if it cannot be stored.
    """
    rows, columns = weight.shape
    source = flat(weight.contiguous())
    groups = choice.groups(columns)
    packed = np.zeros((rows, choice.row_bytes(columns)), np.uint8)
    scales, offsets = np.empty((2, rows, groups), np.float32)
    parts = row_parts(rows, columns)
    largest = np.empty((len(parts), 1), np.float32)

    def quantize(number: int) -> float:
        part = parts[number]
        return kernel(
            source[part.start * columns : part.stop * columns],
            columns,
            choice.bits,
            choice.group_size,
            choice.symmetric,
            *settings,
            packed[part].reshape(-1),
            scales[part].reshape(-1),
            offsets[part].reshape(-1),
            largest[number],
        )

    errors = in_threads(quantize, range(len(parts)))
    # Half a step beyond the largest weight, a third of it at most, must still be a number where fp16 is computed in.
    most = FP16_MAX * 0.75 if weight.dtype == torch.float16 else FP16_MAX
    if not largest.max() <= most:
        raise too_large(name, most)
    # Where all becomes 0, squares may be too small for the kernel's float32.
    error = squared_norm(weight) if largest.max() < BELOW_FP16 else math.fsum(errors)
    return QuantizedMatrix(
        choice,
        (rows, columns),
        torch.from_numpy(packed),
        torch.from_numpy(scales.astype(np.float16)),
        None if choice.symmetric else torch.from_numpy(_stored_offsets(offsets, choice)),
        error,
    )


def too_large(name: str, most: float) -> QuantizationError:
    """The error of a matrix with weights beyond `most`, or with some that are no numbers."""
    return QuantizationError(
        f"{name} holds NaN, infinite or too large weights (beyond {most:g}), which fp16 scales cannot represent. The "
        f"checkpoint is damaged, or keep this matrix with --pin '{name}=16'."
    )


def _stored_offsets(offsets: np.ndarray, choice: Choice) -> np.ndarray:
    return offsets.astype(np.float16 if choice.bits == 1 else np.uint8)
