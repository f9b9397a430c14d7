"""The step search of `alphaq.quantizers.rtn`, and half-quadratic splitting, in plain torch: oracles of the kernels."""

from __future__ import annotations

import torch

from alphaq.nouns.choice import Choice
from alphaq.quantizers.debiased import BIAS_WEIGHT, SEARCH_STEPS, SMALLEST_SHRINK

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def quantize_groups(weight: torch.Tensor, choice: Choice, bias_weight: float = BIAS_WEIGHT) -> Parts:
    """Codes [rows, columns], scales and offsets [rows, groups] of a matrix."""
    pieces = []
    for columns in weight.float().split(choice.group_size, dim=1):
        found = (
            _one_bit(columns, choice.symmetric) if choice.bits == 1 else _search(columns, choice.bits, choice.symmetric)
        )
        pieces.append(_stretched(columns, found, choice, bias_weight) if bias_weight > 1 else found)
    codes, scales, offsets = (None if part[0] is None else torch.cat(part, dim=1) for part in zip(*pieces, strict=True))
    return codes, scales, offsets


def values_of(parts: Parts, choice: Choice) -> torch.Tensor:
    """What codes, scales and offsets stand for, float32 [rows, columns]."""
    codes, scales, offsets = parts

    def spread(per_group: torch.Tensor) -> torch.Tensor:
        return per_group.float().repeat_interleave(choice.group_size, dim=1)[:, : codes.shape[1]]

    if choice.bits == 1:
        means = 0 if offsets is None else spread(offsets)
        return (2 * codes.float() - 1) * spread(scales) + means
    zero = 2.0 ** (choice.bits - 1) if offsets is None else spread(offsets)
    return (codes.float() - zero) * spread(scales)


def _stretched(values: torch.Tensor, parts: Parts, choice: Choice, bias_weight: float) -> Parts:
    """Scales that make |e|² + (bias_weight − 1)·(e·w)²/|w|² least, found by trying; codes as they are."""
    codes, scales, offsets = parts
    levels, mean = codes.double() - (0.5 if choice.bits == 1 else 2.0 ** (choice.bits - 1)), 0.0
    if choice.bits == 1:
        levels *= 2
    if offsets is not None:
        levels = levels if choice.bits == 1 else codes.double() - offsets.double()
        mean = values.double().mean(1, keepdim=True) if choice.bits == 1 else 0.0
    if choice.bits == 1 and offsets is not None:
        balance = levels.mean(1, keepdim=True)
    else:
        balance = torch.zeros(len(values), 1, dtype=torch.float64)
    target, levels = values.double() - mean, levels - balance
    energy = target.square().sum(1, keepdim=True)

    def loss(scale: torch.Tensor) -> torch.Tensor:
        error = scale * levels - target
        along = (error * target).sum(1, keepdim=True).square() / energy
        return error.square().sum(1, keepdim=True) + (bias_weight - 1) * along

    low, high = scales.double() * 0.5, scales.double() * 8  # the loss is a parabola: halve the interval
    for _ in range(200):
        one, other = low + (high - low) / 3, high - (high - low) / 3
        left = loss(one) < loss(other)
        low, high = torch.where(left, low, one), torch.where(left, other, high)
    stored = high.half()
    fits = (energy > 0) & (stored > 0) & torch.isfinite(stored)
    if choice.bits == 1 and offsets is not None:
        offsets = torch.where(fits, (mean - high * balance).half(), offsets)
    return codes, torch.where(fits, stored, scales), offsets


def _search(values: torch.Tensor, bits: int, symmetric: bool) -> Parts:
    """Best step and zero point of each group [n, size]; b ≥ 2."""
    top = 2**bits - 1
    if symmetric:
        zero = torch.full((len(values), 1), float(2 ** (bits - 1)))
        widest = values.abs().amax(1, keepdim=True) / (top - 2 ** (bits - 1))
    else:
        low = values.amin(1, keepdim=True).clamp_max(0)
        widest = (values.amax(1, keepdim=True).clamp_min(0) - low) / top
        zero = (-low / widest).nan_to_num_(0, 0, 0).round_().clamp_(0, top)
    best_error = torch.full((len(values), 1), torch.inf)
    best_scale = torch.zeros_like(best_error)

    def attempt(scale: torch.Tensor) -> None:
        nonlocal best_error, best_scale
        scale = _as_stored(scale)
        error = (_levels(values, scale, zero, top).mul_(scale).sub_(values)).square_().sum(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)

    for shrink in torch.linspace(1.0, SMALLEST_SHRINK[bits], SEARCH_STEPS).tolist():
        attempt(widest * shrink)
    levels = _levels(values, best_scale, zero, top)
    attempt((values * levels).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True).clamp_min_(1))
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    single = ((values == 0) | (values == torch.where(high > 0, high, low))).all(1, keepdim=True)
    attempt(torch.where(single, values.abs().amax(1, keepdim=True), best_scale))
    codes = _levels(values, best_scale, zero, top).add_(zero).to(torch.uint8)
    return codes, best_scale.half(), None if symmetric else zero.to(torch.uint8)


def _as_stored(scale: torch.Tensor) -> torch.Tensor:
    """A scale as fp16 will hold it: codes must be best for the stored value, not the ideal one."""
    return scale.half().float()


def _levels(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """q − z for each weight; a scale of 0 (a group of zeros, or fp16 underflow) gives 0."""
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return (values * inverse).round_().add_(zero).clamp_(0, top).sub_(zero)


def _one_bit(values: torch.Tensor, symmetric: bool) -> Parts:
    """Two levels mean ± scale per group [n, size], split at the mean (at zero if symmetric)."""
    if symmetric:
        above = values > 0
        return above.to(torch.uint8), values.abs().mean(1, keepdim=True).half(), None
    above = values > values.mean(1, keepdim=True)
    high_count = above.sum(1, keepdim=True)
    low_count = values.shape[1] - high_count
    high = torch.where(above, values, 0).sum(1, keepdim=True) / high_count.clamp_min(1)
    low = torch.where(above, 0, values).sum(1, keepdim=True) / low_count.clamp_min(1)
    high = torch.where(high_count == 0, low, high)
    return above.to(torch.uint8), ((high - low) / 2).half(), ((high + low) / 2).half()


def half_quadratic(weight: torch.Tensor, bits: int, group_size: int, p: float = 0.7, rounds: int = 20) -> torch.Tensor:
    """Half-quadratic splitting as published: the range's step, and a zero point that is any float.

    weight: float32 [rows, whole groups]. Returns what is restored, as large.
    """
    values = weight.double().reshape(-1, group_size)
    low = values.amin(1, keepdim=True)
    step = (values.amax(1, keepdim=True) - low) / (2**bits - 1)
    zero, strength = -low / step, 10.0
    for _ in range(rounds):
        codes = (values / step + zero).round().clamp(0, 2**bits - 1)
        misses = values / step - (codes - zero)
        sizes = misses.abs()
        taken = misses.sign() * (sizes - sizes.clamp_min(1e-9).pow(p - 1) / strength).clamp_min(0)
        zero = (codes - (values / step - taken)).mean(1, keepdim=True)
        strength *= 1.01
    codes = (values / step + zero).round().clamp(0, 2**bits - 1)
    return ((codes - zero) * step).reshape(weight.shape)
