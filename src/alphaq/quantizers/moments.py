"""Second moments of a matrix's inputs, as quantizers are given them."""

from __future__ import annotations

import torch

from alphaq.errors import QuantizationError


def check_moments(moments: torch.Tensor, columns: int, name: str) -> None:
    """QuantizationError naming the matrix unless these are finite numbers, [columns, columns] or their diagonal."""
    if moments.shape not in ((columns,), (columns, columns)) or not torch.isfinite(moments).all():
        raise QuantizationError(
            f"{name}: second moments of shape {list(moments.shape)} are not finite numbers for {columns} columns. "
            "Calibrate with another text, or use --quantizer hqq, which needs none."
        )
