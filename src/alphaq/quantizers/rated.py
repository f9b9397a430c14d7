"""Codes to be entropy-coded: one step for a whole matrix, as wide as a rate in bits per weight asks for.

Fixed-length codes need a scale to every group, so that few levels cover it. Where frequent codes cost fewer bits than
rare ones, levels are not scarce any more, and squared error plus λ times rate is least with one step everywhere: at
high rates a step Δ leaves Δ²/12 and costs h(w) − log₂ Δ bits, so λ = ln 2·Δ²/6 whatever a weight's size. For Gaussian
weights of standard deviation σ the rate R needs

    Δ = σ·√(2πe)·2^(−R)

and comes within a third of a bit of what any coder can do, D = σ²·2^(−2R), from 2 bits on: a quarter by theory, the
rest is Huffman's. Groups of 128 take 0.65 to 0.75 more (docs/research/log.md). A quadratic rate term in the rounding
itself (CERWU, arXiv 2505.18758) moves along the same curve when no correlations between columns are known, so λ is set
by the step alone. What a matrix really takes is measured.
The scale that is stored in the end is the one that `debiased` would fit to the codes.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from alphaq.errors import QuantizationError
from alphaq.formats.blocks import restored_error
from alphaq.formats.table import rate_of
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.debiased import BIAS_WEIGHT
from alphaq.quantizers.rated_kernels import round_rows
from alphaq.quantizers.rows import BELOW_FP16, FP16_MAX, too_large
from alphaq.simd.sums import in_threads, row_parts, squared_norm
from alphaq.simd.vectors import flat

GAUSSIAN = math.sqrt(2 * math.pi * math.e)  # 2^h of a Gaussian of variance 1
SAME_STEP = 0.85  # of the step asked for: a coarser grid that weights already lie on is kept


def quantize_rated(
    weight: torch.Tensor, choice: Choice, name: str = "matrix", bias_weight: float = BIAS_WEIGHT
) -> QuantizedMatrix:
    """Quantize a [rows, columns] matrix at the choice's rate. bias_weight: as in `quantize_debiased`, of the one scale.

    Raises QuantizationError naming the matrix if it cannot be stored.
    """
    rows, columns = weight.shape
    energy = squared_norm(weight)
    if not math.isfinite(energy) or not weight.abs().max() <= FP16_MAX:
        raise too_large(name, FP16_MAX)
    step = GAUSSIAN * 2.0 ** -rate_of(choice) * math.sqrt(energy / weight.numel())
    step = _own_step(weight, choice, SAME_STEP * step) or step
    packed = np.zeros((rows, choice.row_bytes(columns)), np.uint8)
    scale = 0.0
    if step > BELOW_FP16:
        source = flat(weight.contiguous())

        def work(part: slice) -> tuple[float, float]:
            own = source[part.start * columns : part.stop * columns]
            return round_rows(own, columns, choice.bits, np.float32(step), packed[part].reshape(-1))

        found = in_threads(work, row_parts(rows, columns))
        product, square = (math.fsum(column) for column in zip(*found, strict=True))
        along = (bias_weight - 1) * product * product + square * energy
        scale = bias_weight * product * energy / along if along > 0 else 0.0
    scales = torch.full((rows, choice.groups(columns)), scale).half()
    if not torch.isfinite(scales[0, 0]):
        raise QuantizationError(f"{name} needs a step beyond fp16. Keep this matrix with --pin '{name}=16'.")
    matrix = QuantizedMatrix(choice, (rows, columns), torch.from_numpy(packed), scales, None)
    return QuantizedMatrix(choice, matrix.shape, matrix.codes, scales, None, restored_error(matrix, weight))


def _own_step(weight: torch.Tensor, choice: Choice, least: float) -> float | None:
    """The step of which all weights are whole multiples already, if it is at least `least` and the codes reach them.

    Weights of one size are such multiples whatever the rate: at low ones they would all be rounded to zero.
    """
    sizes = weight.float().abs()
    smallest = float(sizes[sizes > 0].min()) if sizes.any() else 0.0
    if smallest > BELOW_FP16 and float(sizes.max()) == smallest:
        return smallest
    if smallest < max(least, BELOW_FP16) or float(sizes.max()) > smallest * (2 ** (choice.bits - 1)):
        return None
    if float(np.float16(smallest)) != smallest:
        return None
    levels = (weight.float() / smallest).round()
    lowest, highest = -(2 ** (choice.bits - 1)), 2 ** (choice.bits - 1) - 1
    fits = bool((levels >= lowest).all() and (levels <= highest).all())
    return smallest if fits and bool((levels * smallest == weight.float()).all()) else None
