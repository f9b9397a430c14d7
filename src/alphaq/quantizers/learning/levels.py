"""Codes and grids of some rows as plain float tensors, which can be searched and learned."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from alphaq.formats.base import levels_of_bits
from alphaq.formats.levels import grid_of
from alphaq.formats.packing import pack, unpack
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.simd.sums import slices

JUDGED_COLUMNS = 512  # of H in float64 at a time
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Levels:
    """Codes [rows, columns] and the grids [rows, groups] of some rows, all float32; see `values`."""

    choice: Choice
    stored: torch.dtype
    """What steps and means are rounded to."""
    free_mean: bool
    codes: torch.Tensor
    step: torch.Tensor
    zero: torch.Tensor
    mean: torch.Tensor

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.choice.bits - 1

    @property
    def scales_per_step(self) -> float:
        """A binary matrix stores half the distance of its two levels."""
        return levels_of_bits(self.choice.bits).stretch

    def spread(self, per_group: torch.Tensor) -> torch.Tensor:
        """[rows, groups] → [rows, columns]; the last group may be ragged."""
        spread = per_group[:, :, None].expand(-1, -1, self.choice.group_size)
        return spread.reshape(len(per_group), -1)[:, : self.codes.shape[1]]

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over each group: [rows, columns] → [rows, groups]."""
        size = self.choice.group_size
        return pad(values, (0, -values.shape[1] % size)).view(len(values), -1, size).sum(2)

    def distances(self) -> torch.Tensor:
        """Of the codes from their zero points, in steps; [rows, columns]."""
        return self.codes - self.spread(self.zero)

    def values(self) -> torch.Tensor:
        """ŵ = step·(code − zero) + mean, [rows, columns]."""
        return self.spread(self.step) * self.distances() + self.spread(self.mean)

    def nearest(self, weight: torch.Tensor) -> Levels:
        """With the codes nearest to the weights."""
        step = self.spread(self.step)
        places = (weight - self.spread(self.mean)) / step.clamp_min(TINY) + self.spread(self.zero)
        return replace(self, codes=torch.where(step > 0, places.round().clamp(0, self.top), self.codes))

    def rounded(self, step: torch.Tensor, mean: torch.Tensor) -> Levels:
        """With the nearest steps and means that can be stored; the old step where the new one is not above 0."""
        scale = as_stored(step / self.scales_per_step, self.stored) * self.scales_per_step
        return replace(self, step=torch.where(scale > 0, scale, self.step), mean=as_stored(mean, self.stored))

    def or_else(self, other: Levels, where: torch.Tensor) -> Levels:
        """These levels, but the other ones in some groups, bool [rows, groups]."""
        return replace(
            self,
            codes=torch.where(self.spread(where), other.codes, self.codes),
            step=torch.where(where, other.step, self.step),
            zero=torch.where(where, other.zero, self.zero),
            mean=torch.where(where, other.mean, self.mean),
        )

    def or_else_rows(self, other: Levels, where: torch.Tensor) -> Levels:
        """These levels, but the other ones in some rows, bool [rows]."""
        return self.or_else(other, where[:, None].expand_as(self.step))


def levels_of(matrix: QuantizedMatrix, part: slice, place: torch.device) -> Levels:
    """What some rows of a matrix stand for, whichever engine's it is."""
    choice, grid = matrix.choice, grid_of(matrix, part)
    codes = torch.from_numpy(unpack(matrix.codes[part].numpy(), choice.bits, matrix.shape[1])).to(place).float()
    free_mean = matrix.offsets is not None and matrix.offsets.is_floating_point()
    step, zero, mean = grid.step.to(place), grid.zero.to(place), grid.mean.to(place)
    return Levels(choice, matrix.scales.dtype, free_mean, codes, step, zero, mean)


def matrix_of(weight: torch.Tensor, levels: Levels) -> QuantizedMatrix:
    """Levels of some rows as they are stored."""
    choice = levels.choice
    offsets = None if choice.symmetric else levels.zero.to(torch.uint8).cpu()
    return QuantizedMatrix(
        choice,
        (weight.shape[0], weight.shape[1]),
        torch.from_numpy(pack(levels.codes.to(torch.uint8).cpu().numpy(), choice.bits)),
        (levels.step / levels.scales_per_step).to(levels.stored).cpu(),
        levels.mean.to(levels.stored).cpu() if levels.free_mean else offsets,
        float((levels.values() - weight).double().square().sum()),
    )


def as_stored(values: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    most = torch.finfo(stored).max
    return values.clamp(-most, most).to(stored).float()


def best_rows(weight: torch.Tensor, first: Levels, second: Levels, moments: torch.Tensor) -> Levels:
    """Of each row the levels of less error; the first if equal."""
    return first.or_else_rows(second, row_errors(weight, second, moments) < row_errors(weight, first, moments))


def row_errors(weight: torch.Tensor, levels: Levels, moments: torch.Tensor) -> torch.Tensor:
    """(w − ŵ)·H·(w − ŵ)ᵀ of each row, float64 [rows]; H is made float64 a few columns at a time."""
    miss = levels.values().double() - weight.double()
    if moments.ndim == 1:
        return miss.square() @ moments.double()
    total = miss.new_zeros(len(miss))
    for block in slices(len(moments), JUDGED_COLUMNS):
        total += ((miss @ moments[:, block].double()) * miss[:, block]).sum(1)
    return total
