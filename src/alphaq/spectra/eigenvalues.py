"""Eigenvalues λ = σ² of the blocks' Gram matrices: the readable path, in batched torch."""

from __future__ import annotations

import torch


def pooled_eigenvalues(blocks: torch.Tensor) -> torch.Tensor:
    """Squared singular values of all blocks [blocks, rows, columns] together, ascending, float32 [n].

    The smaller of the two Gram matrices is used. Negative rounding errors are clamped to zero.
    """
    if blocks.shape[1] > blocks.shape[2]:
        blocks = blocks.transpose(1, 2)
    gram = blocks @ blocks.transpose(1, 2)
    return torch.linalg.eigvalsh(gram).clamp_min(0).flatten().sort().values
