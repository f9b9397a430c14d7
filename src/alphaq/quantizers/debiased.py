"""The step of least squared error in each group, stretched so that errors add up less: the default.

A group of weights w gets codes q = clamp(round(w/s) + z, 0, 2^b − 1) and is read back as s·(q − z).
The full range [min w, max w] spends codes on rare outliers, so s is shrunk in steps and the one with
the smallest Σ(w − s·(q − z))² is kept; one least-squares step s = Σ w(q − z) / Σ (q − z)² follows.
A group whose weights are whole multiples of a step is restored exactly, so quantizing twice is quantizing once, and
constants that fp16 can hold are exact.
Least squares shrink what they cannot resolve: at 2 bits ŵ is a seventh short along w, in every matrix alike, and such
errors add up through a model where those at random average out. So the last fit of s lets errors along w count
BIAS_WEIGHT times: it makes |e|² + (BIAS_WEIGHT − 1)·(e·w)²/|w|² least, e = ŵ − w. With a weight of 1 (`quantize_mse`)
it is least squares; without bound ŵ would be as long along w as w itself. 4 is best on trained models at 1, 2 and 3
bits alike; from 4 bits on nothing depends on it (docs/research/log.md).
One bit has no grid: it stores sign(w − mean) with the mean and scale that fit best.
"""

from __future__ import annotations

import numpy as np
import torch

from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.kernels import quantize_rows
from alphaq.quantizers.rows import quantized
from alphaq.simd.vectors import LANES

SEARCH_STEPS = LANES
SMALLEST_SHRINK = {1: 1.0, 2: 0.3, 3: 0.4, 4: 0.55, 5: 0.65, 6: 0.75, 7: 0.85, 8: 0.9}
BIAS_WEIGHT = 4.0


def quantize_debiased(
    weight: torch.Tensor, choice: Choice, name: str = "matrix", bias_weight: float = BIAS_WEIGHT
) -> QuantizedMatrix:
    """Quantize a [rows, columns] matrix. bias_weight: how many times errors along the weights count, 1 or more.

    Raises QuantizationError naming the matrix if it cannot be stored.
    """
    shrinks = np.linspace(1.0, SMALLEST_SHRINK[choice.bits], SEARCH_STEPS, dtype=np.float32)
    return quantized(quantize_rows, (shrinks, np.float32(bias_weight)), weight, choice, name)


def quantize_mse(weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix:
    """Quantize a [rows, columns] matrix for the least Σ(w − ŵ)², by clipping alone.

    Raises QuantizationError naming the matrix if it cannot be stored.
    """
    return quantize_debiased(weight, choice, name, bias_weight=1.0)
