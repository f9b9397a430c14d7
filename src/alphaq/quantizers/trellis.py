"""The cheapest path through a trellis: of all streams of a row, the one whose values are nearest to its weights.

Weights are put in the scale in which Gaussian ones lose least, the best stream, or one nearly as good, is found by
Viterbi's algorithm over all 1024 states, and the scale is fitted again to the values that it stands for, errors along
the weights counting as in `debiased`. Rows do not see one another, so any rows can be quantized apart, in any thread,
to the same bytes.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

from alphaq.errors import QuantizationError
from alphaq.formats.trellis import FORMAT, STATE_BITS, UNIT, WHOLE_ROW, state_levels
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.debiased import BIAS_WEIGHT
from alphaq.quantizers.rows import FP16_MAX, over_rows, too_large
from alphaq.quantizers.trellis_kernels import LAST_COST, encode_rows, on_lines
from alphaq.simd.sums import squared_norm
from alphaq.simd.vectors import LANES

MARKS = (64, 64, 128, 128)  # of the levels' root mean square, by the rate's whole bits
GAUSSIAN_ERRORS = (0.284, 0.0759, 0.0199, 0.0053)  # of 1 to 4 bits, in the mean square of the weights
UNIT_SHARE = 0.16  # of such an error: with less, bytes end too early; with more, roundings count
LEAST_WORTH = 0.1  # of the mean: the path would give up columns that count for nothing, and make them noise


def quantize_trellis(
    weight: torch.Tensor,
    choice: Choice,
    name: str = "matrix",
    importance: np.ndarray | None = None,
    bias_weight: float = BIAS_WEIGHT,
) -> QuantizedMatrix:
    """Quantize a [rows, columns] matrix. importance: float32 [columns], by which squared errors count. bias_weight: as
    in `quantize_debiased`, of the scales' last fit.

    Raises QuantizationError naming the matrix if it cannot be stored, or if importance is negative or not finite.
    """
    rows, columns = weight.shape
    energy = squared_norm(weight)
    if not math.isfinite(energy) or not weight.abs().max() <= FP16_MAX:
        raise too_large(name, FP16_MAX)
    packed = np.zeros((rows, FORMAT.row_bytes(choice, columns)), np.uint8)
    scales = np.zeros((rows, choice.groups(columns)), np.float32)
    quarters = FORMAT.quarters(choice)
    settings = (
        quarters,
        WHOLE_ROW,
        encoder_levels(),
        _worth(importance, columns, name),
        *_misses(quarters if importance is None else None),
        *_first_scales(quarters / 4),
        bias_weight,
    )
    error = over_rows(encode_rows, settings, weight, (packed, scales))
    if not scales.any():  # squares may be too small for the kernel
        error = energy
    stored = torch.from_numpy(scales).half()
    return QuantizedMatrix(choice, (rows, columns), torch.from_numpy(packed), stored, None, error)


def _first_scales(rate: float) -> tuple[np.ndarray, np.float32]:
    """Shares of a row's root mean square that its levels may have, float32 [16], and what the square of one costs.

    The best reproduction of a Gaussian is shorter than it by its error. Heavier tails want more. The costs are those of
    Gaussian and Student weights whose errors were measured at ten scales (docs/research/log.md).
    """
    usual = math.sqrt(1 - 1.15 * 4.0**-rate)
    granular = 2.0 ** np.interp(rate, (1, 2, 3, 4), np.log2((0.0352, 0.0170, 0.0050, 0.00123)))
    return (1.05 * usual * 1.08 ** np.arange(LANES)).astype(np.float32), np.float32(granular / usual**2)


def _worth(importance: np.ndarray | None, columns: int, name: str) -> np.ndarray:
    """What the square of an error counts in each column, float32 [columns]; alike where nothing tells."""
    if importance is None:
        return np.ones(columns, np.float32)
    mean = float(importance.mean(dtype=np.float64))
    if not math.isfinite(mean) or importance.min() < 0:
        raise QuantizationError(
            f"{name}: what its columns weigh is negative, infinite or NaN, so no codes are nearest. Its inputs "
            "overflowed, or the importance matrix is damaged: use other inputs, or --quantizer debiased."
        )
    if mean == 0:
        return np.ones(columns, np.float32)
    return np.maximum(importance / mean, LEAST_WORTH).astype(np.float32)


@cache
def _misses(quarters: int | None) -> tuple[np.ndarray, np.ndarray, np.float32, np.float32]:
    """What each state costs more than the best one at marks that weights are put at, uint8 flat [marks · states], and
    what the best one costs, float32 [marks]; how far marks are apart and the unit of the former, in levels and their
    squares. No marks where there are no quarters."""
    if quarters is None:
        return np.empty(0, np.uint8), np.empty(0, np.float32), np.float32(1), np.float32(1)
    levels = encoder_levels().astype(np.float64)
    square = float(np.square(levels).mean())
    unit = UNIT_SHARE * square * 2.0 ** np.interp(quarters / 4, (1, 2, 3, 4), np.log2(GAUSSIAN_ERRORS))
    apart = math.sqrt(square) / MARKS[quarters // 4 - 1]
    reach = math.ceil((levels.max() + math.sqrt(LAST_COST * unit)) / apart)
    cost = np.square(apart * np.arange(-reach, reach + 1)[:, None] - levels)
    best = cost.min(1)
    found = on_lines(cost.size)
    found[:] = np.minimum(np.rint((cost - best[:, None]) / unit), LAST_COST).reshape(-1)
    return found, best.astype(np.float32), np.float32(apart), np.float32(unit)


def encoder_levels() -> np.ndarray:
    """The value of each state with a scale of 1, float32 [1024], the newest bit of the state lowest."""
    states = np.arange(1 << STATE_BITS)
    newest_high = sum((states >> bit & 1) << (STATE_BITS - 1 - bit) for bit in range(STATE_BITS))
    return state_levels()[newest_high].astype(np.float32) * np.float32(UNIT)
