"""Steps and zero points of least Σ importance·(w − ŵ)², group by group: what is left where columns do not interact."""

from __future__ import annotations

from dataclasses import replace

import torch

from alphaq.quantizers.learning.levels import TINY, Levels

STRETCHES = (0.85, 0.925, 1.0, 1.075, 1.15)  # of the step
REFITS = 3


def searched(weight: torch.Tensor, levels: Levels, importance: torch.Tensor) -> Levels:
    """Steps and zero points near the given ones of least Σ importance·(w − ŵ)² per group, with the nearest codes."""

    def errors(found: Levels) -> torch.Tensor:
        return found.gathered((found.values() - weight).square() * importance)

    best, least = levels, errors(levels)
    fixed_zero = levels.choice.symmetric or levels.free_mean
    for shift in (0,) if fixed_zero else (-1, 0, 1):
        for stretch in STRETCHES:
            zero = levels.zero if fixed_zero else (levels.zero + shift).clamp(0, levels.top)
            found = _fitted(weight, replace(levels, step=levels.step * stretch, zero=zero), importance)
            better = (error := errors(found)) < least
            best, least = best.or_else(found, better), torch.where(better, error, least)
    return best


def _fitted(weight: torch.Tensor, levels: Levels, importance: torch.Tensor) -> Levels:
    """Codes nearest to the weights and least-squares steps for the codes, in turn (Lloyd's iteration)."""
    total = levels.gathered(importance.expand_as(weight)).clamp_min(TINY)
    for _ in range(REFITS):
        levels = levels.nearest(weight)
        distances, mean = levels.distances(), levels.mean
        product = levels.gathered((weight - levels.spread(mean)) * distances * importance)
        step = product / levels.gathered(distances.square() * importance).clamp_min(TINY)
        if levels.free_mean:
            mean = levels.gathered((weight - levels.spread(step) * distances) * importance) / total
        levels = levels.rounded(step, mean)
    return levels.nearest(weight)
