"""What a quantizer is, and the table of them. To add one: a module and a line here."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import numpy as np
import torch

from alphaq.errors import QuantizationError
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.affine import quantize_affine, quantize_symmetric16
from alphaq.quantizers.coding import encode_tensor
from alphaq.quantizers.debiased import quantize_debiased, quantize_mse
from alphaq.quantizers.ggml import quantize_ggml
from alphaq.quantizers.gptq import quantize_gptq
from alphaq.quantizers.hqq import quantize_hqq
from alphaq.quantizers.learned import quantize_learned
from alphaq.quantizers.packing import encode
from alphaq.quantizers.rtn import round_to_nearest
from alphaq.quantizers.salience import mixing
from alphaq.simd.sums import in_threads, squared_distance, squared_norm

SAMPLE_VALUES = 1 << 18
SAMPLE_ROWS = 64
SAMPLE_BATCHES = 8  # of fewer the standard error is itself too uncertain


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


OWN_VERSION = 3  # raised when a quantizer of ours begins to leave other bytes, or a name comes to mean another one
DEFAULT = "debiased"
LEVELS = "hqq"  # whose levels are rounded to by inputs, where the storage allows: the best of those tried (docs/LOG.md)
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
    if choice.mix and not choice.nested:
        # Their levels are several in a group; what inputs say is which of them are salient.
        importance = moments if moments.ndim == 1 else moments.diagonal()
        return rounder_of(plain, None if coded else importance.numpy())(weight, choice, name)
    function = QUANTIZERS[quantizer].function
    if coded:
        return function(weight, choice, name, moments, rounder_of(plain)(weight, choice, name), coded=True)
    levels = LEVELS if QUANTIZERS[plain].plain and choice.bits > 1 and not choice.rate else plain
    return function(weight, choice, name, moments, rounder_of(levels)(weight, choice, name))


def sixteen_bits(weight: torch.Tensor) -> torch.Tensor:
    """What the choice "16" stores: a 16-bit matrix as it is, a 32-bit one as bfloat16."""
    return weight if weight.dtype.itemsize == 2 else weight.bfloat16()


def squared_error(weight: torch.Tensor, choice: Choice, name: str, rounder: Rounder = quantize_debiased) -> float:
    """Σ(w − ŵ)² after a round trip through the real quantizer; float64."""
    if choice.kept:
        return squared_distance(weight, sixteen_bits(weight))
    error = rounder(weight, choice, name).squared_error
    assert error is not None  # only matrices read from files lack it
    return error


@dataclass(frozen=True)
class SquaredErrors:
    """Σ(w − ŵ)² by choice, and the standard error of each where it was estimated from a sample of rows.

    energy: Σw², 0 if nothing was measured. coded: bytes of the matrix once entropy-coded, where that was asked for.
    """

    expected: dict[Choice, float] = field(default_factory=dict)
    deviation: dict[Choice, float] = field(default_factory=dict)
    energy: float = 0.0
    coded: dict[Choice, int] = field(default_factory=dict)


def coded_errors(
    weight: torch.Tensor, choices: Sequence[Choice], name: str, rounder: Rounder = quantize_debiased
) -> SquaredErrors:
    """Errors of the whole matrix at every choice, and the exact bytes that its native form takes once coded."""
    energy = squared_norm(weight)
    found = SquaredErrors({}, {}, energy)
    for choice in choices:
        if choice.kept:
            stored = sixteen_bits(weight)
            error: float | None = squared_distance(weight, stored)
        else:
            matrix = rounder(weight, choice, name)
            stored, error = encode(matrix), matrix.squared_error
        assert error is not None  # only matrices read from files lack it
        found.expected[choice], found.coded[choice] = error, encode_tensor(stored).nbytes
    return found


def squared_errors(
    weight: torch.Tensor,
    choices: Sequence[Choice],
    name: str,
    rounder: Rounder = quantize_debiased,
    sample_values: int = SAMPLE_VALUES,
) -> SquaredErrors:
    """`squared_error` at every choice; of a matrix beyond `sample_values` weights estimated from a sample of rows.

    A row's error is nearly proportional to its energy, so the sample's ratio Σ(w − ŵ)²/Σw² times the whole energy is
    typically within one per cent of the truth (with 2^18 weights at most 3.5 % was seen, on Student's t with 4 degrees
    of freedom and on rows and columns of outliers). Rows are drawn without repetition, seeded by the name. The
    standard error comes from the spread of the ratio over batches of the rows.
    """
    if not choices:
        return SquaredErrors()
    rows, columns = weight.shape
    if not math.isfinite(whole := squared_norm(weight)):  # the rows drawn might not show it
        raise QuantizationError(f"{name} holds NaN or infinite weights. The checkpoint is damaged.")

    def of_whole() -> SquaredErrors:
        found = in_threads(lambda choice: squared_error(weight, choice, name, rounder), choices)
        return SquaredErrors(dict(zip(choices, found, strict=True)), energy=whole)

    count = max(sample_values // columns, min(SAMPLE_ROWS, sample_values // 64), SAMPLE_BATCHES)
    if weight.numel() <= sample_values or count >= rows:
        return of_whole()
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    drawn = np.random.Generator(np.random.PCG64(seed)).choice(rows, count, replace=False)
    batches = [weight[torch.from_numpy(np.sort(batch))] for batch in np.array_split(drawn, SAMPLE_BATCHES)]
    energies = np.array([squared_norm(batch) for batch in batches])
    if not (energy := energies.sum()) > 0:  # nothing but zeros drawn
        return of_whole()
    pairs = [(choice, batch) for choice in choices for batch in batches]
    measured = np.array(in_threads(lambda pair: squared_error(pair[1], pair[0], name, rounder), pairs))
    expected, deviation = {}, {}
    for choice, errors in zip(choices, measured.reshape(len(choices), -1), strict=True):
        ratio = errors.sum() / energy
        misses = errors - ratio * energies
        expected[choice] = float(ratio * whole)
        deviation[choice] = float(np.sqrt(misses @ misses * len(batches) / (len(batches) - 1)) * whole / energy)
    return SquaredErrors(expected, deviation, whole)
