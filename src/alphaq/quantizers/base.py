"""What a quantizer is, and the table of them. To add one: a module and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import numpy as np
import torch

from alphaq.formats.table import format_of, rate_of
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.affine import quantize_affine, quantize_symmetric16
from alphaq.quantizers.debiased import quantize_debiased, quantize_mse
from alphaq.quantizers.ggml import quantize_ggml
from alphaq.quantizers.gptq import quantize_gptq
from alphaq.quantizers.hqq import quantize_hqq
from alphaq.quantizers.learned import quantize_learned
from alphaq.quantizers.rtn import round_to_nearest
from alphaq.quantizers.salience import mixing


class Rounder(Protocol):
    """Turns [rows, columns] weights into codes; deterministic; refuses NaN and infinity by name.

    Some also take the importance of each column (`importance`, float32 [columns]).
    """

    def __call__(self, weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix: ...


class InputRounder(Protocol):
    """Improves on `found`, a matrix rounded without inputs, by the second moments of its inputs.

    hessian: float32 [columns, columns], or [columns] where only its diagonal is known. Where the size of coded files is
    known to a plan, it also takes `coded`: codes will be entropy-coded, in no more bytes than those of `found`.
    """

    def __call__(
        self, weight: torch.Tensor, choice: Choice, name: str, hessian: torch.Tensor, found: QuantizedMatrix, /
    ) -> QuantizedMatrix: ...


@dataclass(frozen=True)
class Quantizer:
    """One way to find codes.

    function: a `Rounder`, or an `InputRounder` if it looks at inputs. storage: what it fills; of two quantizers with
    the same storage one may stand for another. One that looks at inputs fills whatever it improves on. library: the
    package whose code rounds; None if it is ours. adds_offsets: whether offsets are added to s·q instead of being zero
    points. coded_size_known: whether its codes, entropy-coded, take the bytes that a plan has measured.
    """

    summary: str
    function: Callable[..., QuantizedMatrix]
    looks_at_inputs: bool = False
    storage: str = "plain"
    library: str | None = None
    adds_offsets: bool = False
    coded_size_known: bool = False

    @property
    def plain(self) -> bool:
        """Whether it fills plain groups of our own format."""
        return self.storage == "plain" and not self.looks_at_inputs

    @property
    def version(self) -> str:
        """What tells apart the bytes that it may leave: our code's version, or its library's."""
        if self.library is None:
            return f"v{OWN_VERSION}"
        try:
            return version(self.library)
        except PackageNotFoundError:
            return ""


OWN_VERSION = 5  # raised when a quantizer of ours begins to leave other bytes, or a name comes to mean another one
DEFAULT = "debiased"
LEVELS = "hqq"  # whose levels are rounded to by inputs, where the storage allows (docs/research/log.md)
FORMERLY = {"clipped": "mse", "minmax": "rtn"}  # what some were called before; rtn then was what debiased is now

QUANTIZERS: dict[str, Quantizer] = {
    DEFAULT: Quantizer(
        "least squared error, stretched so that errors add up less",
        mixing(quantize_debiased),
        coded_size_known=True,
    ),
    "mse": Quantizer("least squared error by clipping alone", mixing(quantize_mse, bias_weight=1.0)),
    "rtn": Quantizer("round to nearest over the full range of each group", mixing(round_to_nearest, bias_weight=1.0)),
    "hqq": Quantizer("least Σ|w − ŵ|^0.7, which lets rare weights go", mixing(quantize_hqq, bias_weight=1.0)),
    "gptq": Quantizer(
        "columns one after the other, each making up for the errors of those before",
        quantize_gptq,
        looks_at_inputs=True,
        coded_size_known=True,
    ),
    "learned": Quantizer("codes and steps learned together, from gptq's", quantize_learned, looks_at_inputs=True),
    "ggml": Quantizer("llama.cpp's own rounding", quantize_ggml, storage="ggml", library="xllamacpp"),
    "symmetric16": Quantizer(
        "least squared error, with 16-bit scales as compressed-tensors stores them",
        quantize_symmetric16,
        storage="symmetric16",
    ),
    "affine": Quantizer(
        "debiased, with 16-bit scales and offsets as MLX stores them",
        quantize_affine,
        storage="affine",
        adds_offsets=True,
    ),
}


def offered(usual: str) -> tuple[str, ...]:
    """Names of the quantizers that users may ask for where one is usual: itself, then those that may stand for it."""
    own = QUANTIZERS[usual]
    if own.library is not None:
        return (usual,)
    others = (name for name, one in QUANTIZERS.items() if one.looks_at_inputs or one.storage == own.storage)
    return tuple(dict.fromkeys((usual, *others)))


def looks_at_inputs(name: str | None) -> bool:
    """Whether the quantizer of this name does; False for None and unknown names."""
    return name in QUANTIZERS and QUANTIZERS[name].looks_at_inputs


def rounder_of(name: str, importance: np.ndarray | None = None) -> Rounder:
    """A quantizer's function by its name, for columns of some importance [columns] where that is known."""
    function = QUANTIZERS[name].function
    return function if importance is None else partial(function, importance=importance)


def rounded_by_inputs(
    weight: torch.Tensor,
    choice: Choice,
    name: str = "matrix",
    *,
    quantizer: str,
    plain: str,
    moments: torch.Tensor,
    coded: bool = False,
) -> QuantizedMatrix:
    """What a quantizer makes of a matrix by the second moments of its inputs.

    plain: the quantizer that it improves on. moments: as of `InputRounder`. coded: whether codes will be entropy-coded,
    in no more bytes than those of `plain`.
    """
    form = format_of(choice)
    if not (form.one_grid or (form.streams and moments.ndim == 2)):  # all that inputs say is what is salient
        importance = moments if moments.ndim == 1 else moments.diagonal()
        return rounder_of(plain, None if coded else importance.numpy())(weight, choice, name)
    function = QUANTIZERS[quantizer].function
    if coded:
        return function(weight, choice, name, moments, rounder_of(plain)(weight, choice, name), coded=True)
    own_levels = form.one_grid and choice.bits > 1 and not rate_of(choice)
    levels = LEVELS if QUANTIZERS[plain].plain and own_levels else plain
    return function(weight, choice, name, moments, rounder_of(levels)(weight, choice, name))


def sixteen_bits(weight: torch.Tensor) -> torch.Tensor:
    """What the choice "16" stores: a 16-bit matrix as it is, a 32-bit one as bfloat16."""
    return weight if weight.dtype.itemsize == 2 else weight.bfloat16()
