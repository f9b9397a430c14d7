"""Codes that can be cut down later: the top bits of a b-bit code are the codes of every narrower width.

Levels lie at odd halves of a step, ŵ = s·(q − 2^(b−1) + ½). Between two neighbours then lies a level of the grid with
twice the step: dropping the last bit of q gives a code of the same kind (D²MoE, arXiv 2504.15299). Only the scale has
to be fitted again, to the values that the wider code stands for; the original weights are not needed.
A step that suits b bits is too wide for 2, which want a range of 2σ where 4 bits want 2.7σ. So it is chosen jointly:
the least sum over widths 2 to b of the squared error, each relative to the one that a uniform quantizer of that width
has on Gaussian weights. At 2 bits alone the grid is the best one of four levels, without a zero point to store.
"""

from __future__ import annotations

import numpy as np
import torch

from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.debiased import BIAS_WEIGHT, SEARCH_STEPS, SMALLEST_SHRINK
from alphaq.quantizers.nested_kernels import nest_rows
from alphaq.quantizers.rows import quantized

GAUSSIAN_ERROR = {2: 0.1188, 3: 0.0374, 4: 0.0115, 5: 0.00349, 6: 0.00104, 7: 0.000304, 8: 0.0000883}
"""Least relative squared error of uniform quantizers (Max, 1960)."""
NARROWEST = 2


def quantize_nested(
    weight: torch.Tensor, choice: Choice, name: str = "matrix", bias_weight: float = BIAS_WEIGHT
) -> QuantizedMatrix:
    """Quantize a [rows, columns] matrix for the choice's width and all below. bias_weight: as in `quantize_debiased`.

    Raises QuantizationError naming the matrix if it cannot be stored.
    """
    shrinks = np.linspace(1.0, SMALLEST_SHRINK[choice.bits], SEARCH_STEPS, dtype=np.float32)
    worth = np.zeros(9, np.float32)
    for width in range(NARROWEST, choice.bits + 1):
        worth[width] = 1 / GAUSSIAN_ERROR[width]
    return quantized(nest_rows, (shrinks, worth, np.float32(bias_weight)), weight, choice, name)
