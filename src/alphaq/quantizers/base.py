"""What a quantizer is, and the table of them. To add one: a module and a line here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import numpy as np
import torch

from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.affine import quantize_affine, quantize_symmetric16
from alphaq.quantizers.ggml import quantize_ggml
from alphaq.quantizers.hqq import quantize_hqq
from alphaq.quantizers.rtn import quantize_minmax, quantize_rtn
from alphaq.quantizers.salience import mixing


class Quantizer(Protocol):
    """Turns [rows, columns] weights into codes; deterministic; refuses NaN and infinity by name.

    Some also take the importance of each column (`importance`, float32 [columns]).
    """

    def __call__(self, weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix: ...


QUANTIZERS: dict[str, Quantizer] = {
    "rtn": mixing(quantize_rtn),
    "clipped": mixing(partial(quantize_rtn, bias_weight=1.0), bias_weight=1.0),
    "minmax": mixing(quantize_minmax, bias_weight=1.0),
    "hqq": mixing(quantize_hqq, bias_weight=1.0),
    "ggml": quantize_ggml,
    "symmetric16": quantize_symmetric16,
    "affine": quantize_affine,
}
OWN_VERSION = 2  # raised when a quantizer of ours begins to leave other bytes
PLAIN = ("rtn", "clipped", "hqq", "minmax")  # those that fill the same storage, so that one may stand for another


def quantizer_version(name: str) -> str:
    """What tells apart the bytes that a quantizer of this name may leave: our code's version, or its library's."""
    if name != "ggml":
        return f"v{OWN_VERSION}"
    try:
        return version("xllamacpp")
    except PackageNotFoundError:
        return ""


def quantizer_of(name: str, importance: np.ndarray | None = None) -> Quantizer:
    """A quantizer by its name, for columns of some importance [columns] where that is known."""
    chosen: Callable[..., QuantizedMatrix] = QUANTIZERS[name]
    return chosen if importance is None else partial(chosen, importance=importance)


def sixteen_bits(weight: torch.Tensor) -> torch.Tensor:
    """What the choice "16" stores: a 16-bit matrix as it is, a 32-bit one as bfloat16."""
    return weight if weight.dtype.itemsize == 2 else weight.bfloat16()
