"""Round to nearest over the full range of each group, min–max, without any search: what most tools do."""

from __future__ import annotations

import numpy as np
import torch

from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.kernels import quantize_rows
from alphaq.quantizers.rows import quantized


def round_to_nearest(weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix:
    """Round a [rows, columns] matrix to the full range of each group.

    Raises QuantizationError naming the matrix if it cannot be stored.
    """
    return quantized(quantize_rows, (np.empty(0, np.float32), np.float32(1)), weight, choice, name)
