"""GPTQ for trellis codes: a few columns of each row at a time, by the cheapest path, with the errors of those before.

With H = R·D·Rᵀ (as in `gptq`) the columns of a step should be their weights and what earlier columns make of theirs,
w[k] + Σ over j before the step of (w[j] − ŵ[j])·R[j, k]. Within a step nothing is made up for; the square of column k's
error then costs Σ over m of R[k, m]²·D[m], over its step. A row's stream goes on in the state that the last step left,
and as the bits of a column decide on those of the next ones too, each step's path is sought through some columns
behind it, of which the next step decides anew. At last each row's scales are multiplied by what makes
(w − ŵ)·H·(w − ŵ)ᵀ least, with errors along the outputs counting more. Source: BlockLDLQ of QuIP# (arXiv 2402.04396), as
QTIP uses it (arXiv 2406.11235).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from alphaq.formats.blocks import dequantize, restored_error
from alphaq.formats.trellis import FORMAT, WHOLE_ROW
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.debiased import BIAS_WEIGHT
from alphaq.quantizers.factoring import factor_of, mixing_of
from alphaq.quantizers.rows import FP16_MAX
from alphaq.quantizers.trellis import encoder_levels
from alphaq.quantizers.trellis_feedback_kernels import encode_block
from alphaq.simd.sums import in_threads, row_parts, slices

BLOCK = 128  # columns whose errors reach those far behind together
STEP = 8  # columns decided together: 4 leave 2 to 7 % less and take twice the time, 16 a tenth more (research/log.md)
AHEAD_BITS = 32  # of a stream that a path is sought through behind its step; more gain nothing


def feed_back(weight: torch.Tensor, found: QuantizedMatrix, hessian: torch.Tensor, name: str) -> QuantizedMatrix:
    """Other trellis codes of a [rows, columns] matrix, which move outputs less; scales begin from those of `found`.

    hessian: second moments of the inputs, float32 [columns, columns]. Raises QuantizationError naming the matrix if
    they are not positive definite.
    """
    factor = factor_of(hessian, torch.arange(weight.shape[1]), name)
    codes = torch.from_numpy(_streams(weight.float(), found, factor))
    matrix = _fitted(replace(found, codes=codes, squared_error=None), weight, hessian)
    return replace(matrix, squared_error=restored_error(matrix, weight))


def _streams(weight: torch.Tensor, found: QuantizedMatrix, factor: np.ndarray) -> np.ndarray:
    """Streams of all rows, uint8 [rows, bytes per row]."""
    rows, columns = weight.shape
    quarters = FORMAT.quarters(found.choice)
    ahead = 4 * AHEAD_BITS // quarters
    scales, levels, wanted = found.scales.float().numpy(), encoder_levels(), weight.clone()
    packed, states = np.zeros_like(found.codes.numpy()), np.zeros(rows, np.int64)
    for block in slices(columns, BLOCK):
        mixing = mixing_of(factor, block)
        count = len(mixing)
        width = min(count + ahead, columns - block.start)  # the block, and columns that its paths look at
        near = wanted[:, block.start : block.start + width].contiguous().numpy()
        misses = weight[:, block].contiguous().numpy().copy()
        shares = np.ascontiguousarray(mixing[:, :width]).reshape(-1)
        settings = (width, _worth(mixing, factor, block), STEP, ahead, block.start, quarters, WHOLE_ROW, levels)

        def work(part: slice, near: np.ndarray = near, misses: np.ndarray = misses) -> None:
            own = (array[part].reshape(-1) for array in (near, misses, scales, states, packed))
            encode_block(shares, columns, *settings, *own)  # noqa: B023 - done before the next block

        in_threads(work, row_parts(rows, columns))
        if block.stop < columns:
            wanted[:, block.stop :].addmm_(torch.from_numpy(misses), torch.from_numpy(mixing[:, count:]))
    return packed


def _worth(mixing: np.ndarray, factor: np.ndarray, block: slice) -> np.ndarray:
    """What the square of an error costs in each column of a block, on average 1; float32 [columns]."""
    conditional = np.square(factor.diagonal()[::-1][block], dtype=np.float64)
    worth = np.empty(len(mixing))
    for step in slices(len(mixing), STEP):
        within = np.triu(mixing[step, step]).astype(np.float64)
        worth[step] = np.square(within) @ conditional[step]
    return (worth / worth.mean()).astype(np.float32)


def _fitted(matrix: QuantizedMatrix, weight: torch.Tensor, hessian: torch.Tensor) -> QuantizedMatrix:
    """The same streams with scales of the least (w − ŵ)·H·(w − ŵ)ᵀ, all of a row moved alike.

    Errors along the outputs count as in `debiased`: shorter outputs add up over the layers.
    """
    restored, original = dequantize(matrix), weight.float()
    weighed = restored @ hessian
    square, along, energy = (
        (one * other).sum(1, dtype=torch.float64)
        for one, other in ((weighed, restored), (weighed, original), (original @ hessian, original))
    )
    whole = (BIAS_WEIGHT - 1) * along.square() + square * energy
    longer = torch.where((whole > 0) & (along > 0), BIAS_WEIGHT * along * energy / whole, 1.0).float()
    scales = (matrix.scales.float() * longer[:, None]).clamp(max=FP16_MAX)
    return replace(matrix, scales=scales.half())
