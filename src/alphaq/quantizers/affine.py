"""Round to nearest with scales (and offsets) in the model's own 16-bit type, as engines store them beside the codes.

bfloat16 has 8 significant bits, so a step chosen in float16 moves by up to 0.2 % when it is stored: enough to shift
the outer 8-bit codes by a quarter of a step. A step search finds a grid; its numbers are rounded to what can be stored
and the codes rounded again to the grid that is really there. Least squares then fit the grid to the codes, and codes
are rounded to it, as long as that lowers the error (Lloyd's iteration); the last fit weighs errors along the weights as
`debiased` does. The error is that of the bytes written.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from alphaq.errors import QuantizationError
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.debiased import BIAS_WEIGHT, quantize_mse
from alphaq.quantizers.kernels import refit_rows
from alphaq.quantizers.rows import BELOW_FP16, over_rows
from alphaq.simd.vectors import LANES


def quantize_symmetric16(weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix:
    """ŵ = s·(q − 2^(b−1)) rounded to 16 bits, as compressed-tensors decodes; scales [rows, groups] in 16 bits.

    weight: [rows, columns]. Raises QuantizationError naming the matrix if it cannot be stored.
    """
    return _refitted(weight, choice, name, rounded=True, bias_weight=1.0)  # of 4 and 8 bits it makes no difference


def quantize_affine(
    weight: torch.Tensor, choice: Choice, name: str = "matrix", bias_weight: float = BIAS_WEIGHT
) -> QuantizedMatrix:
    """ŵ = s·q + β in float32, as MLX's kernels decode; scales and β (as offsets) [rows, groups] in 16 bits.

    weight: [rows, columns]. bias_weight: as in `quantize_debiased`, of deviations from a group's mean. Raises
    QuantizationError naming the matrix if it cannot be stored.
    """
    return _refitted(weight, choice, name, rounded=False, bias_weight=bias_weight)


def _refitted(weight: torch.Tensor, choice: Choice, name: str, rounded: bool, bias_weight: float) -> QuantizedMatrix:
    rows, columns = weight.shape
    if columns % LANES:
        raise QuantizationError(f"{name}: rows of {columns} weights are not in multiples of {LANES}. Keep it: '16'.")
    found = quantize_mse(weight, choice, name)
    stored = torch.float16 if weight.dtype == torch.float16 else torch.bfloat16
    if not found.scales.any() and weight.abs().max() < BELOW_FP16:
        zeros = torch.zeros(found.scales.shape, dtype=stored)
        return replace(found, scales=zeros, offsets=None if choice.symmetric else zeros)
    scales = found.scales.float().numpy()
    offsets = np.zeros_like(scales) if found.offsets is None else found.offsets.float().numpy()
    storage = (rounded, stored == torch.bfloat16, bias_weight)
    settings = (choice.bits, choice.group_size, choice.symmetric, *storage)
    error = over_rows(refit_rows, settings, weight, (found.codes.numpy(), scales, offsets))
    if not math.isfinite(error):
        raise QuantizationError(
            f"{name} holds weights too large for {stored} scales. Keep this matrix with --pin '{name}=16'."
        )
    return QuantizedMatrix(
        choice,
        (rows, columns),
        found.codes,
        torch.from_numpy(scales).to(stored),
        None if choice.symmetric else torch.from_numpy(offsets).to(stored),
        error,
    )
