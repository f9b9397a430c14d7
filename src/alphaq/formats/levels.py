"""The grids that a matrix's codes lie on, whichever engine's they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alphaq.formats.blocks import native_format
from alphaq.nouns.quantized import QuantizedMatrix


@dataclass(frozen=True)
class Grid:
    """Levels of each group: ŵ = step·(q − zero) + mean; float32 [rows, groups]."""

    step: torch.Tensor
    zero: torch.Tensor
    mean: torch.Tensor

    @property
    def start(self) -> torch.Tensor:
        """What the code 0 stands for: ŵ = step·q + start."""
        return self.mean - self.step * self.zero


def grid_of(matrix: QuantizedMatrix, rows: slice = slice(None)) -> Grid:
    """The levels that the codes of some rows stand for. Offsets of whole numbers are zero points, others are means."""
    levels = native_format(matrix.choice).levels(matrix.choice)
    step = levels.stretch * matrix.scales[rows].float()
    zero, mean = torch.full_like(step, levels.zero), torch.zeros_like(step)
    if matrix.offsets is None:
        return Grid(step, zero, mean)
    offsets = matrix.offsets[rows].float()
    if not matrix.offsets.is_floating_point():
        return Grid(step, offsets, mean)
    return Grid(step, zero if native_format(matrix.choice).means else mean, offsets)
