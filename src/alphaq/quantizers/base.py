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
from alphaq.formats.blocks import encode
from alphaq.formats.coding import encode_tensor
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.affine import quantize_affine, quantize_symmetric16
from alphaq.quantizers.ggml import quantize_ggml
from alphaq.quantizers.hqq import quantize_hqq
from alphaq.quantizers.rtn import quantize_minmax, quantize_rtn
from alphaq.quantizers.salience import mixing
from alphaq.simd.sums import in_threads, squared_distance, squared_norm

SAMPLE_VALUES = 1 << 18
SAMPLE_ROWS = 64
SAMPLE_BATCHES = 8  # of fewer the standard error is itself too uncertain


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


def squared_error(weight: torch.Tensor, choice: Choice, name: str, quantizer: Quantizer = quantize_rtn) -> float:
    """Σ(w − ŵ)² after a round trip through the real quantizer; float64."""
    if choice.kept:
        return squared_distance(weight, sixteen_bits(weight))
    error = quantizer(weight, choice, name).squared_error
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
    weight: torch.Tensor, choices: Sequence[Choice], name: str, quantizer: Quantizer = quantize_rtn
) -> SquaredErrors:
    """Errors of the whole matrix at every choice, and the exact bytes that its native form takes once coded."""
    energy = squared_norm(weight)
    found = SquaredErrors({}, {}, energy)
    for choice in choices:
        if choice.kept:
            stored = sixteen_bits(weight)
            error: float | None = squared_distance(weight, stored)
        else:
            matrix = quantizer(weight, choice, name)
            stored, error = encode(matrix), matrix.squared_error
        assert error is not None  # only matrices read from files lack it
        found.expected[choice], found.coded[choice] = error, encode_tensor(stored).nbytes
    return found


def squared_errors(
    weight: torch.Tensor,
    choices: Sequence[Choice],
    name: str,
    quantizer: Quantizer = quantize_rtn,
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
        found = in_threads(lambda choice: squared_error(weight, choice, name, quantizer), choices)
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
    measured = np.array(in_threads(lambda pair: squared_error(pair[1], pair[0], name, quantizer), pairs))
    expected, deviation = {}, {}
    for choice, errors in zip(choices, measured.reshape(len(choices), -1), strict=True):
        ratio = errors.sum() / energy
        misses = errors - ratio * energies
        expected[choice] = float(ratio * whole)
        deviation[choice] = float(np.sqrt(misses @ misses * len(batches) / (len(batches) - 1)) * whole / energy)
    return SquaredErrors(expected, deviation, whole)
