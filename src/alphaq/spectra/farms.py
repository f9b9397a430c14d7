"""FARMS: pool the spectra of equal square blocks, so that α does not depend on the aspect ratio.

A wide random matrix looks lighter-tailed than a square one of the same distribution. Cutting both
into squares of one size and pooling their eigenvalues removes that bias (FARMS, arXiv 2506.06280).
The reference samples blocks with an unseeded generator; here the seed is the matrix's name, so the
same matrix always has the same α.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

BLOCK_SIZE = 128
SMALLEST_BLOCK_SIZE = 16
MAX_BLOCKS = 256
MIN_BLOCKS = 16


def block_size(rows: int, columns: int) -> int | None:
    """Side of the squares a matrix is cut into: 128, halved until at least 16 blocks exist.

    None means: too small to cut, use the whole matrix.
    """
    size = BLOCK_SIZE
    while size >= SMALLEST_BLOCK_SIZE:
        if (rows // size) * (columns // size) >= MIN_BLOCKS:
            return size
        size //= 2
    return None


def sampled_blocks(name: str, count: int, limit: int = MAX_BLOCKS) -> np.ndarray:
    """Ascending indices of at most `limit` of `count` blocks, drawn by a seed made of `name`."""
    if count <= limit:
        return np.arange(count)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    keys = np.random.Generator(np.random.PCG64(seed)).random(count)
    return np.sort(np.argpartition(keys, limit)[:limit])


def corners(rows: int, columns: int, name: str) -> tuple[np.ndarray, int] | None:
    """First elements of the blocks, as offsets into the row-major matrix in ascending order, and their side.

    None for a matrix too small to be cut.
    """
    size = block_size(rows, columns)
    if size is None:
        return None
    down, across = np.divmod(sampled_blocks(name, (rows // size) * (columns // size)), columns // size)
    return down * size * columns + across * size, size


def blocks(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Sub-matrices of a [rows, columns] matrix in its dtype, [blocks, size, size], in row-major order.

    A matrix too small to cut comes back whole, as [1, rows, columns].
    """
    rows, columns = weight.shape
    cut = corners(rows, columns, name)
    if cut is None:
        return weight[None]
    starts, size = cut
    return torch.stack([weight[at // columns :, at % columns :][:size, :size] for at in starts.tolist()])
