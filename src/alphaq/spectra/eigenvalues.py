"""Eigenvalues λ = σ² of the blocks' Gram matrices: the readable path in batched torch, and the fast one."""

from __future__ import annotations

import math
import threading

import numpy as np
import torch

from alphaq.errors import SpectrumError
from alphaq.simd.sums import PART_VALUES, in_threads, slices
from alphaq.simd.vectors import LANES, flat
from alphaq.spectra import kernels
from alphaq.spectra.farms import corners
from alphaq.spectra.tail import tail_count

_own = threading.local()


def near_one(mean_square: float) -> float:
    """The power of two that brings weights of that mean square near 1, before they are squared twice in float32."""
    return 2.0 ** min(max(-round(math.log2(mean_square) / 2), -126), 127) if mean_square > 0 else 1.0


def block_eigenvalues(blocks: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """Squared singular values of each block [blocks, rows, columns], ascending, float32 [blocks, min side].

    scales: float32 [blocks], factors of the blocks' weights (see `near_one`). The smaller of the two Gram matrices is
    used. Negative rounding errors are clamped to zero. Runs where the blocks lie; float64 blocks stay float64.
    """
    values = blocks if scales is None else blocks * scales[:, None, None]
    values = values.float() if values.dtype.itemsize < 4 else values
    if values.shape[1] > values.shape[2]:
        values = values.transpose(1, 2)
    return torch.linalg.eigvalsh(values @ values.transpose(1, 2)).clamp_min(0)


def pooled_eigenvalues(blocks: torch.Tensor) -> torch.Tensor:
    """`block_eigenvalues` of all blocks together, ascending [n]."""
    return block_eigenvalues(blocks).flatten().sort().values


def whole_eigenvalues(weight: torch.Tensor) -> torch.Tensor:
    """All eigenvalues λ = σ² of a matrix [rows, columns], ascending, float64 [smaller side].

    The Gram matrix of the smaller side is added up by panels, so that the matrix is never held in float64.
    """
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
    side, length = wide.shape
    gram = torch.zeros(side, side, dtype=torch.float64)
    for part in slices(length, max(side, PART_VALUES // side)):  # panels no larger than the result
        panel = wide[:, part].double()
        gram.addmm_(panel, panel.T)
    return torch.linalg.eigvalsh(gram).clamp_min(0)


def largest_eigenvalues(weight: torch.Tensor, name: str, mean_square: float) -> tuple[torch.Tensor, int]:
    """The k + 1 largest eigenvalues of a matrix's blocks, ascending, float64, and how many there are in all.

    mean_square: of the weights.
    """
    rows, columns = weight.shape
    cut = corners(rows, columns, name)
    if cut is None:
        count = min(rows, columns)
        return whole_eigenvalues(weight)[-tail_count(count) - 1 :], count
    return largest_of_blocks(flat(weight.contiguous()), columns, *cut, mean_square)


def largest_of_blocks(
    source: np.ndarray, columns: int, starts: np.ndarray, size: int, mean_square: float
) -> tuple[torch.Tensor, int]:
    """`largest_eigenvalues` of the [size, size] blocks of a flat matrix whose first elements are at `starts`."""
    groups = -(-len(starts) // LANES)
    padded = np.pad(starts, (0, groups * LANES - len(starts)))  # with any block: its results are replaced below
    scale = near_one(mean_square)
    diagonal = np.empty((groups, size, LANES), np.float32)
    off_squared = np.empty_like(diagonal)

    def reduce(group: int) -> None:
        kernels.tridiagonals(
            source,
            columns,
            padded[group * LANES : (group + 1) * LANES],
            size,
            np.float32(scale),
            _scratch(2 * (size + 1) * kernels.row_length(size)),
            diagonal[group].reshape(-1),
            off_squared[group].reshape(-1),
        )

    in_threads(reduce, range(groups))
    if len(starts) % LANES:
        diagonal[-1, :, len(starts) % LANES :], off_squared[-1, :, len(starts) % LANES :] = -1, 0
    if not (np.isfinite(diagonal).all() and np.isfinite(off_squared).all()):
        raise SpectrumError("The eigenvalues are not finite. This is a defect of alphaq: please report it.")
    count = len(starts) * size
    tail = tail_count(count)
    forms = diagonal.reshape(-1), off_squared.reshape(-1), size
    low, high, bound, owner, rank = kernels.tail_start(*forms, tail)
    # Fewer than k may lie above the bracket; the others are equal to the start within the tolerance.
    values = np.full(tail + 1, (low + high) / 2, np.float32)
    in_threads(
        lambda part: kernels.bisect(*forms, owner[part], rank[part], high, bound, values[part]),
        slices(len(owner), 8 * kernels.PANEL),
    )
    return torch.from_numpy(np.sort(values).astype(np.float64) / scale**2), count


def _scratch(length: int) -> np.ndarray:
    """This thread's working memory, float32, at a multiple of 64 bytes, so that no vector crosses a cache line."""
    if not hasattr(_own, "memory") or len(_own.memory) < length:
        raw = np.empty(4 * length + 64, np.uint8)
        _own.memory = raw[-raw.ctypes.data % 64 :][: 4 * length].view(np.float32)
    memory: np.ndarray = _own.memory[:length]
    return memory
