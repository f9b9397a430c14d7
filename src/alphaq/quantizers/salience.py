"""Widths that differ within a matrix: by group of columns, or for single weights.

slim (SliM-LLM, arXiv 2405.14917): groups whose error hurts least have a bit less than the others, and as many whose
error hurts most a bit more, so that bytes do not depend on which. A group's hurt is Σ(w − ŵ)² over its columns, times
the columns' importance where that is known; of all balanced widths those of the least sum are taken.

pb (PB-LLM, arXiv 2310.00034): in each group the k weights that two levels mean ± s miss most have 8 bits and a scale of
their own. Without them the levels are fitted again, other weights are then missed most, and so on while that helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from alphaq.formats.blocks import dequantized_rows
from alphaq.formats.coded import Coded
from alphaq.formats.nested import Nested
from alphaq.formats.salient import Salient, SalientWeights, most_of
from alphaq.formats.slim import Slim
from alphaq.formats.table import format_of
from alphaq.formats.trellis import Trellis
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.debiased import BIAS_WEIGHT, quantize_debiased
from alphaq.quantizers.nested import quantize_nested
from alphaq.quantizers.rated import quantize_rated
from alphaq.quantizers.rows import over_groups
from alphaq.quantizers.salience_kernels import quantize_salient
from alphaq.quantizers.trellis import quantize_trellis
from alphaq.simd.sums import in_threads, row_parts

Rounding = Callable[..., QuantizedMatrix]


def mixing(base: Rounding, bias_weight: float = BIAS_WEIGHT) -> Rounding:
    """A quantizer that also stores mixes, whose groups `base` fills.

    bias_weight: of two levels beside single weights. The quantizer takes the importance of columns, which mixes heed.
    """

    def quantize(
        weight: torch.Tensor, choice: Choice, name: str = "matrix", importance: np.ndarray | None = None
    ) -> QuantizedMatrix:
        match format_of(choice):
            case Coded():
                return quantize_rated(weight, choice, name, bias_weight)
            case Nested():
                return quantize_nested(weight, choice, name, bias_weight)
            case Salient():
                return quantize_pb(weight, choice, name, importance, bias_weight)
            case Slim():
                return quantize_slim(weight, choice, name, base, importance)
            case Trellis():
                return quantize_trellis(weight, choice, name, importance, bias_weight)
        return base(weight, choice, name)

    return quantize


def quantize_slim(
    weight: torch.Tensor,
    choice: Choice,
    name: str = "matrix",
    base: Rounding = quantize_debiased,
    importance: np.ndarray | None = None,
) -> QuantizedMatrix:
    """Groups of a bit less and more than the choice's in equal numbers, as many as make Σ(w − ŵ)² least.

    base: what rounds, each group by itself. importance: float32 [columns], by which squared errors count. A ragged
    last group has the choice's own bits. Raises what `base` does.
    """
    columns = weight.shape[1]
    found = [base(weight, plain, name) for plain in _plain_choices(choice)]
    errors = np.stack([column_errors(weight, matrix) for matrix in found])
    starts = np.arange(0, columns, choice.group_size)
    weighted = np.add.reduceat(errors if importance is None else errors * importance, starts, axis=1)
    steps = np.zeros(len(starts), np.int64)
    whole = columns // choice.group_size
    steps[:whole] = balanced_steps(weighted[:, :whole])
    error = math.fsum(np.add.reduceat(errors, starts, axis=1)[steps + 1, np.arange(len(starts))])
    return replace(_joined(found, choice, steps), squared_error=error)


def _plain_choices(choice: Choice) -> tuple[Choice, Choice, Choice]:
    """What groups of each width are stored as; those of 1 bit have no mean, which would take more than a zero point."""
    bits, size, symmetric = choice.bits, choice.group_size, choice.symmetric
    return (
        Choice(bits - 1, size, symmetric or bits == 2),
        Choice(bits, size, symmetric),
        Choice(bits + 1, size, symmetric),
    )


def column_errors(weight: torch.Tensor, matrix: QuantizedMatrix) -> np.ndarray:
    """Σ(w − ŵ)² over the rows of each column, float64 [columns]."""

    def errors(part: slice) -> np.ndarray:
        misses = weight[part].float() - dequantized_rows(matrix, part)
        return misses.double().square_().sum(0).numpy()

    found: np.ndarray = np.sum(in_threads(errors, row_parts(*matrix.shape)), axis=0)
    return found


def balanced_steps(errors: np.ndarray) -> np.ndarray:
    """Bits of each group beyond the middle, −1, 0 or 1, that add up to 0 with the least error; exact.

    errors: float64 [3, groups], with a bit less, in the middle, and with a bit more.
    """
    groups = errors.shape[1]
    options = np.array([0, -1, 1])  # the first of equals is taken
    least = np.full(2 * groups + 3, np.inf)  # of the groups so far, by what their steps add up to
    least[groups + 1] = 0
    taken = np.empty((groups, 2 * groups + 1), np.int64)
    for group, (low, middle, high) in enumerate(errors.T):
        ways = np.stack([least[1:-1] + middle, least[2:] + low, least[:-2] + high])
        taken[group] = options[ways.argmin(0)]
        least[1:-1] = ways.min(0)
    steps, total = np.zeros(groups, np.int64), groups
    for group in reversed(range(groups)):
        steps[group] = taken[group, total]
        total -= steps[group]
    return steps


def _joined(found: Sequence[QuantizedMatrix], choice: Choice, steps: np.ndarray) -> QuantizedMatrix:
    """Groups of three matrices, a bit apart, next to one another. steps: int64 [groups], −1, 0 or 1."""
    size, middle = choice.group_size, found[1]
    pieces, groups = [], torch.arange(len(steps))
    for group, step in enumerate(steps.tolist()):
        length = size * (choice.bits + step) // 8
        last = group == len(steps) - 1
        pieces.append(found[step + 1].codes[:, group * length : None if last else (group + 1) * length])
    chosen = torch.from_numpy(steps + 1)

    def of_each(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(parts))[chosen, :, groups].T.contiguous()

    offsets = None
    if middle.offsets is not None:
        offsets = of_each([torch.zeros_like(middle.offsets) if one.offsets is None else one.offsets for one in found])
    return QuantizedMatrix(
        choice,
        middle.shape,
        torch.cat(pieces, dim=1),
        of_each([matrix.scales for matrix in found]),
        offsets,
        extra=(choice.bits + steps).astype(np.uint8),
    )


def quantize_pb(
    weight: torch.Tensor,
    choice: Choice,
    name: str = "matrix",
    importance: np.ndarray | None = None,
    bias_weight: float = BIAS_WEIGHT,
) -> QuantizedMatrix:
    """One bit for all but a few weights of each group, chosen so that Σ(w − ŵ)² is least; 8 bits for those.

    importance: float32 [columns], by which squared errors count. bias_weight: as in `quantize_debiased`, of the two
    levels' last fit. Raises QuantizationError naming the matrix if it cannot be stored.
    """
    rows, columns = weight.shape
    groups, most = choice.groups(columns), most_of(choice)
    worth = np.ones(columns, np.float32) if importance is None else np.ascontiguousarray(importance, np.float32)
    packed = np.zeros((rows, choice.row_bytes(columns)), np.uint8)
    scales, offsets, wide = np.empty((3, rows, groups), np.float32)
    positions, values = np.empty((2, rows, groups, most), np.uint8)
    filled = (packed, scales, offsets, wide, positions, values)
    error = over_groups(quantize_salient, (most, worth, bias_weight), weight, choice, filled, name)
    return QuantizedMatrix(
        choice,
        (rows, columns),
        torch.from_numpy(packed),
        torch.from_numpy(scales).half(),
        None if choice.symmetric else torch.from_numpy(offsets).half(),
        error,
        extra=SalientWeights(wide.astype(np.float16), positions, values),
    )
