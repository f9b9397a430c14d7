"""Codes beside each other on single matrices: how far each is from the limit, in bits for each weight.

    python benchmarks/codes.py MODEL [MODEL ...] [--matrices 12] [--bits 1 2 3 4]

A code that stores b bits for each weight, its scales included, and leaves the part e of a matrix's energy is
b + ½·log₂ e bits from the limit for Gaussian weights of one variance: less is better, and a code may go below zero
where weights are no such thing. Besides those that AlphaQ writes, three that it does not:

- `binary`: Σ αₖ·bₖ with bₖ of ±1 and fp16 αₖ for each group of 128 (or the largest power of two that divides a row),
  found in turns (ShiftAddLLM and others).
- `E8`: the 65,536 (one bit: 256) shortest points of the lattice E8 for each eight weights, one scale for each row;
  three and four bits code what two left once more (QuIP#).
- `shared basis`: each layer's projection turned to the axes of all its experts together, which are stored in 8 bits,
  and bits given to axes as is best for their energies (BitsMoE). Its axes' coefficients are coded as well as trellis
  codes code Gaussian weights, which flatters it: any width for each axis is taken to be had at no cost. No figure where
  the axes would take more than half of the bits, as those of a dense model do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from common import markdown_table, parser, save

from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.formats.blocks import dequantize, encode
from alphaq.formats.coding import encode_tensor
from alphaq.formats.table import parse_choice, storage_bytes
from alphaq.nouns.matrix import MatrixRef
from alphaq.quantizers.base import rounder_of

TITLE = "Codes on single matrices"
GROUP = 128
ROUNDS = 12  # of turns between signs and factors
SAMPLED = 2048  # octets of a matrix that E8 is tried on
AT_ONCE = 256
SCALES = np.linspace(0.7, 1.3, 13)
Measured = tuple[float, float]  # bits for each weight, part of the energy that is left


def left(weight: torch.Tensor, restored: torch.Tensor) -> float:
    """Part of a matrix's energy that a code leaves."""
    return float(((weight - restored) ** 2).sum() / (weight**2).sum())


def ours(name: str, coded: bool = False) -> Callable[[torch.Tensor], Measured]:
    """One of AlphaQ's choices, rounded for least squares."""

    def measure(weight: torch.Tensor) -> Measured:
        choice = parse_choice(name)
        found = rounder_of("mse")(weight, choice)
        size = encode_tensor(encode(found)).nbytes if coded else storage_bytes(choice, tuple(weight.shape))
        return 8 * size / weight.numel(), left(weight, dequantize(found))

    return measure


def binary(planes: int) -> Callable[[torch.Tensor], Measured]:
    """Sums of signs: signs of what is left one after the other, then factors by least squares and signs, in turns."""
    patterns = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=planes)))

    def measure(weight: torch.Tensor) -> Measured:
        group = math.gcd(GROUP, weight.shape[1])
        groups = weight.reshape(-1, group)
        rest, signs = groups.clone(), []
        for _ in range(planes):
            signs.append(rest.sign() + (rest == 0))
            rest = rest - rest.abs().mean(1, keepdim=True) * signs[-1]
        chosen = torch.stack(signs, 2)
        for _ in range(ROUNDS):
            gram = chosen.mT @ chosen + 1e-6 * torch.eye(planes)
            factors = torch.linalg.solve(gram, chosen.mT @ groups[:, :, None])[:, :, 0].half().float()
            levels = factors @ patterns.T
            nearest = (groups[:, :, None] - levels[:, None, :]).abs().argmin(2)
            chosen = patterns[nearest]
        restored = (chosen * factors[:, None, :]).sum(2)
        return planes + 16 * planes / group, left(groups, restored)

    return measure


@cache
def shortest(count: int) -> torch.Tensor:
    """The shortest points of E8, [count, 8]; of equally long ones the first in the order of their coordinates."""
    points = np.concatenate([_even_and_short(np.arange(-3, 4)), _even_and_short(np.arange(-2.5, 3))])
    order = np.lexsort((*points.T[::-1], (points**2).sum(1)))
    return torch.from_numpy(points[order[:count]])


def _even_and_short(values: np.ndarray) -> np.ndarray:
    """Octets of some values whose sum is even and whose squared length is at most 12."""
    fours = np.array(list(itertools.product(values, repeat=4)), np.float32)
    length = (fours**2).sum(1)
    first, second = np.nonzero(length[:, None] + length <= 12)
    octets = np.concatenate([fours[first], fours[second]], 1)
    return octets[octets.sum(1) % 2 == 0]


def nearest(octets: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The point nearest to each octet."""
    offset = (points**2).sum(1) / 2
    picked = [(part @ points.T - offset).argmax(1) for part in octets.split(AT_ONCE)]
    return points[torch.cat(picked)]


def eights(counts: Sequence[int]) -> Callable[[torch.Tensor], Measured]:
    """E8 once, or once more for what is left: `counts` points each time, at the scale that leaves least."""

    def measure(weight: torch.Tensor) -> Measured:
        columns = weight.shape[1] // 8 * 8
        sizes = weight.pow(2).mean(1, keepdim=True).sqrt().clamp_min(1e-30)
        octets = (weight / sizes)[:, :columns].reshape(-1, 8)
        drawn = torch.randperm(len(octets), generator=torch.Generator().manual_seed(0))[:SAMPLED]
        octets, sizes = octets[drawn], sizes.repeat_interleave(columns // 8, 0)[drawn]
        rest = octets
        for count in counts:
            points = shortest(count)
            spread = rest.pow(2).mean().sqrt() / points.pow(2).mean().sqrt()
            rest = min((_after(rest, points, float(scale * spread)) for scale in SCALES), key=_energy)
        bits = sum(math.log2(count) for count in counts) / 8 + 16 / columns
        return bits, _energy(rest * sizes) / _energy(octets * sizes)

    return measure


def _after(octets: torch.Tensor, points: torch.Tensor, scale: float) -> torch.Tensor:
    return octets - scale * nearest(octets / scale, points)


def _energy(values: torch.Tensor) -> float:
    return float(values.pow(2).sum())


def shared_basis(stack: torch.Tensor, bits: float, above: float) -> Measured | None:
    """All experts of a layer's projection, [experts, rows, columns], at so many bits, its axes' included.

    above: how many bits the code of coefficients is from the limit. The better one of both sides' axes is taken; None
    where both would take more than half of the bits.
    """
    experts, rows, columns = stack.shape
    found = []
    for side, other in ((columns, rows), (rows, columns)):
        overhead = 8 * side / (experts * other)
        if overhead < bits / 2:
            flat_stack = (stack if side == columns else stack.mT).reshape(-1, side).double()
            energies = torch.linalg.eigvalsh(flat_stack.T @ flat_stack).clamp_min(0).numpy()
            found.append(by_water(energies, bits - above - overhead))
    return (bits, min(found)) if found else None


def by_water(energies: np.ndarray, bits: float) -> float:
    """Part of the energy that is left where so many bits, in the mean, go to the axes that need them."""
    if bits <= 0:
        return 1.0
    low, high = 0.0, float(energies.max())
    for _ in range(100):
        level = (low + high) / 2
        spent = np.log2(np.maximum(energies, level) / max(level, 1e-300)).mean() / 2
        low, high = (level, high) if spent > bits else (low, level)
    return float(np.minimum(energies, high).sum() / energies.sum())


CODES: dict[int, dict[str, Callable[[torch.Tensor], Measured]]] = {
    bits: {
        "groups of 128": ours(f"{bits}g128"),
        "one step, entropy-coded": ours(f"@{bits}", coded=True),
        "trellis": ours(f"t{bits}"),
        "binary": binary(bits),
        "E8": eights({1: (256,), 2: (2**16,), 3: (2**16, 256), 4: (2**16, 2**16)}[bits]),
    }
    for bits in (1, 2, 3, 4)
}


def distance(found: Measured) -> float:
    """Bits for each weight from the limit."""
    bits, part = found
    return bits + math.log2(max(part, 1e-30)) / 2


def stacks(checkpoint: Checkpoint) -> Iterator[list[MatrixRef]]:
    """Matrices of one layer and projection that have one shape."""
    places: dict[tuple[object, ...], list[MatrixRef]] = {}
    for matrix in checkpoint.planned:
        places.setdefault((matrix.layer, matrix.projection, matrix.shape), []).append(matrix)
    return iter(places.values())


def measured(model: Path, bits: int, count: int, above: float) -> dict[str, Any]:
    """Mean distance of each code over some of a model's matrices, evenly drawn over layers and projections.

    above: how far trellis codes are from the limit for Gaussian weights.
    """
    checkpoint = open_checkpoint(model)
    groups = list(stacks(checkpoint))
    found: dict[str, list[float]] = {}
    for group in groups[:: -(-len(groups) // count)]:
        weight = checkpoint.read(group[len(group) // 2]).float()
        if not weight.any():
            continue
        for name, code in CODES[bits].items():
            found.setdefault(name, []).append(distance(code(weight)))
        shared = shared_basis(torch.stack([checkpoint.read(matrix).float() for matrix in group]), bits, above)
        if shared is not None:
            found.setdefault("shared basis", []).append(distance(shared))
    return {"model": model.name, "bits": bits, **{name: round(fmean(values), 3) for name, values in found.items()}}


def gaussian(bits: int) -> dict[str, Any]:
    """The same of Gaussian weights, which have no axes to share."""
    weight = torch.randn((256, 1024), generator=torch.Generator().manual_seed(0))
    found = {name: distance(code(weight)) for name, code in CODES[bits].items()}
    return {"model": "Gaussian", "bits": bits, **{name: round(value, 3) for name, value in found.items()}}


def main() -> None:
    """Measure, print, and keep the result."""
    options = parser(__doc__)
    options.add_argument("models", nargs="+", type=Path)
    options.add_argument("--matrices", type=int, default=12, help="of each model, from as many layers and projections")
    options.add_argument("--bits", nargs="+", type=int, default=[1, 2, 3, 4], choices=[1, 2, 3, 4])
    given = options.parse_args()
    rows = []
    for bits in given.bits:
        rows.append(gaussian(bits))
        above, count = rows[-1]["trellis"], 2 if given.quick else given.matrices
        rows += [measured(model, bits, count, above) for model in given.models]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("model", "bits")))
    table = [[f"{row['model']}, {row['bits']}", *(row.get(name, "–") for name in names)] for row in rows]
    save("codes", TITLE, rows, markdown_table(["model, bits", *names], table), given.quick)


if __name__ == "__main__":
    main()
