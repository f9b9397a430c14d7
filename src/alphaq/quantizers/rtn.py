"""Round to nearest on a uniform grid per group, with a search for the step of least squared error.

A group of weights w gets codes q = clamp(round(w/s) + z, 0, 2^b − 1) and is read back as s·(q − z).
The full range [min w, max w] spends codes on rare outliers, so s is shrunk in steps and the one with
the smallest Σ(w − s·(q − z))² is kept; one least-squares step s = Σ w(q − z) / Σ (q − z)² follows.
One bit has no grid: it stores sign(w − mean) with the mean and scale that fit best.
"""

from __future__ import annotations

import torch

from alphaq.errors import QuantizationError
from alphaq.records import Choice, QuantizedMatrix

SEARCH_STEPS = 16
SMALLEST_SHRINK = {2: 0.3, 3: 0.4, 4: 0.55, 5: 0.65, 6: 0.75, 7: 0.85, 8: 0.9}
WEIGHTS_AT_ONCE = 32768  # stays in the processor's cache, and below the size at which torch starts threads:
# a search is hundreds of small operations, and a barrier after each would cost more than it gains
FP16_MAX = 65504.0

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def quantize_rtn(weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix:
    """Quantize a [rows, columns] matrix. Raises QuantizationError naming it if it cannot be stored."""
    rows, columns = weight.shape
    size = choice.group_size
    whole = columns // size * size
    pieces = []
    if whole:
        pieces.append(_quantize_groups(weight[:, :whole].reshape(-1, size), choice, name, rows))
    if whole < columns:
        pieces.append(_quantize_groups(weight[:, whole:], choice, name, rows))
    codes, scales, offsets = (None if part[0] is None else torch.cat(part, dim=1) for part in zip(*pieces, strict=True))
    return QuantizedMatrix(choice, (rows, columns), codes, scales, offsets)


def _quantize_groups(groups: torch.Tensor, choice: Choice, name: str, rows: int) -> Parts:
    """[rows · n, size] → codes [rows, n · size], scales and offsets [rows, n]."""
    found = [
        _one_bit(chunk, choice.symmetric) if choice.bits == 1 else _search(chunk, choice.bits, choice.symmetric)
        for chunk in (_checked(part, name) for part in groups.split(max(1, WEIGHTS_AT_ONCE // groups.shape[1])))
    ]
    codes, scales, offsets = (
        None if part[0] is None else torch.cat(part).reshape(rows, -1) for part in zip(*found, strict=True)
    )
    assert codes is not None and scales is not None  # for the type checker: only offsets may be None
    return codes, scales, offsets


def _checked(chunk: torch.Tensor, name: str) -> torch.Tensor:
    values = chunk.float()
    if not float(values.abs().max()) <= FP16_MAX:
        raise QuantizationError(
            f"{name} holds NaN, infinite or too large weights (beyond {FP16_MAX:g}), which fp16 scales cannot "
            "represent. The checkpoint is damaged, or keep this matrix in 16 bits."
        )
    return values


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
    codes = _levels(values, best_scale, zero, top).add_(zero).to(torch.uint8)
    return codes, best_scale.half(), None if symmetric else zero.to(torch.uint8)


def _as_stored(scale: torch.Tensor) -> torch.Tensor:
    """A scale as fp16 will hold it: codes must be best for the stored value, not the ideal one."""
    return scale.half().float()


def _levels(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """q − z for each weight; a scale of 0 (a group of zeros, or fp16 underflow) gives 0."""
    return (values / scale).nan_to_num_(0, 0, 0).round_().add_(zero).clamp_(0, top).sub_(zero)


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
