"""What a quantizer is, and the table of them. To add one: a module and a line here."""

from __future__ import annotations

from typing import Protocol

import torch

from alphaq.numerics import squared_distance
from alphaq.quantizers.rtn import quantize_rtn
from alphaq.records import Choice, QuantizedMatrix


class Quantizer(Protocol):
    """Turns [rows, columns] weights into codes; deterministic; refuses NaN and infinity by name."""

    def __call__(self, weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix: ...


QUANTIZERS: dict[str, Quantizer] = {"rtn": quantize_rtn}


def sixteen_bits(weight: torch.Tensor) -> torch.Tensor:
    """What the choice "16" stores: a 16-bit matrix as it is, a 32-bit one as bfloat16."""
    return weight if weight.dtype.itemsize == 2 else weight.bfloat16()


def squared_error(weight: torch.Tensor, choice: Choice, name: str, quantizer: Quantizer = quantize_rtn) -> float:
    """Σ(w − ŵ)² after a round trip through the real quantizer; float64."""
    if choice.bits == 16:
        return squared_distance(weight, sixteen_bits(weight))
    error = quantizer(weight, choice, name).squared_error
    assert error is not None  # only matrices read from files lack it
    return error
