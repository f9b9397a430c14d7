"""H = R·D·Rᵀ of the second moments H of a matrix's inputs, R upper triangular with ones on its diagonal."""

from __future__ import annotations

import numpy as np
import torch

from alphaq.errors import QuantizationError

DAMPING = 0.01  # of the mean diagonal
RETRIES = 4  # with ten times the damping each


def factor_of(hessian: torch.Tensor, order: torch.Tensor, name: str, more: float = 0.0) -> np.ndarray:
    """Lower triangular L with L·Lᵀ = H + damping, for columns in reversed order; float32 [columns, columns].

    more: damping beyond the usual. What lies above the diagonal is not to be read. Raises QuantizationError if no
    damping makes H positive definite.
    """
    from scipy.linalg import lapack

    backwards = order.flip(0)
    diagonal = hessian.diagonal()[backwards]
    damping = DAMPING * float(diagonal.double().mean()) + more
    for _ in range(RETRIES):
        reordered = hessian[backwards[:, None], backwards]
        reordered.diagonal().add_(damping)
        # A symmetric matrix is its own transpose, which LAPACK can overwrite.
        factor, failed = lapack.spotrf(reordered.numpy().T, lower=0, clean=0, overwrite_a=1)
        if not failed:
            return np.asarray(factor.T)
        damping *= 10
    raise QuantizationError(
        f"{name}: the second moments of its inputs are not positive definite, even with {damping / 10:.3g} on the "
        "diagonal. Calibrate with another or a longer text, or use --quantizer hqq, which needs none."
    )


def mixing_of(factor: np.ndarray, block: slice) -> np.ndarray:
    """R of a block's columns and all later ones, float32 [block, columns from the block on]."""
    last = len(factor) - 1
    begin, end = last - block.start, last - block.stop  # of the block's rows in the reversed factor, downwards
    rows = factor[begin : (end if end >= 0 else None) : -1]
    return rows[:, begin::-1] / factor.diagonal()[begin::-1]
