"""Column after column takes the code of least error with all others held, each group the step that does."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from alphaq.quantizers.learning.levels import TINY, Levels, as_stored
from alphaq.simd.sums import slices

SETTLED = 1e-4  # a sweep that lowers E by less, relatively, is the last of its polish


def polished(weight: torch.Tensor, levels: Levels, moments: torch.Tensor, sweeps: int) -> Levels:
    """Each code, then each step (and mean) where it minimises E with all others held; group by group, again and again.

    The gradient (ŵ − w)·H is kept up to date within a group by its own block of H, beyond it when the group is done.
    """
    levels = replace(levels, codes=levels.codes.clone(), step=levels.step.clone(), mean=levels.mean.clone())
    miss = levels.values() - weight
    pull = miss @ moments
    error = float((miss * pull).sum())
    for _ in range(sweeps):
        for group, part in enumerate(slices(weight.shape[1], levels.choice.group_size)):
            own = moments[part, part]
            local = pull[:, part].T.contiguous()
            codes = _best_codes(levels, group, part, own, local)
            _best_grid(levels, group, codes, own, local)
            levels.codes[:, part] = codes.T
            restored = levels.step[:, group] * (codes - levels.zero[:, group]) + levels.mean[:, group]
            changed = restored.T - weight[:, part] - miss[:, part]
            miss[:, part] += changed
            pull.addmm_(changed, moments[part])
        before, error = error, float((miss * pull).sum())
        if not error < before * (1 - SETTLED):
            break
    return levels


def _best_codes(levels: Levels, group: int, part: slice, own: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Codes [columns, rows] of a group, column by column; `local`, the transposed gradient there, follows them."""
    step = levels.step[:, group]
    curvature = own.diagonal()[:, None] * step
    inverse = torch.where(curvature > TINY, 1 / curvature, 0)
    codes = levels.codes[:, part].T.contiguous()
    for column, code in enumerate(codes):
        better = torch.addcmul(code, local[column], inverse[column], value=-1).round_().clamp_(0, levels.top)
        local.addr_(own[column], (better - code) * step)
        code.copy_(better)
    return codes


def _best_grid(levels: Levels, group: int, codes: torch.Tensor, own: torch.Tensor, local: torch.Tensor) -> None:
    """Move a group's step, and its mean if it is free, to the exact minimum along each, if what is stored is better."""
    step, zero, mean = levels.step[:, group], levels.zero[:, group], levels.mean[:, group]

    def move(value: torch.Tensor, direction: torch.Tensor, unit: float, above: float) -> None:
        pushed = own @ direction
        slope, curvature = (direction * local).sum(0), (direction * pushed).sum(0)
        best = value - torch.where(curvature > TINY, slope / curvature, 0)
        by = as_stored(best / unit, levels.stored) * unit - value
        by = torch.where(((2 * slope + by * curvature) * by < 0) & (value + by > above), by, 0)
        value += by
        local.add_(pushed * by)

    move(step, codes - zero, levels.scales_per_step, 0.0)
    if levels.free_mean:
        move(mean, torch.ones_like(codes), 1, -math.inf)
