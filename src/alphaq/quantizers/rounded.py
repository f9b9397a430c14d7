"""What a matrix becomes at a choice, its error and its bytes: answered here for who measures, checks, and writes.

Codes that a native checkpoint holds are cut where they hold the choice (cutting.py); else weights are rounded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import QuantizationError
from alphaq.formats.blocks import dequantize, encode
from alphaq.formats.coding import encode_tensor
from alphaq.formats.table import format_of
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.base import Rounder, rounder_of, sixteen_bits
from alphaq.quantizers.cutting import CUTS, can_cut, cut, held_form
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.simd.sums import in_threads, squared_distance, squared_norm, squares_by_row

SAMPLE_VALUES = 1 << 18
STREAM_SHARE = 4  # one in so many of these at choices that are searched for as streams
SAMPLE_BATCHES = 8  # of fewer the standard error is itself too uncertain


@dataclass(frozen=True)
class Rounded:
    """A matrix at a choice.

    values: its codes; where it keeps 16 bits, those, [rows, columns]. squared_error: Σ(w − ŵ)². energy: Σw², where it
    came along.
    """

    values: QuantizedMatrix | torch.Tensor
    squared_error: float
    energy: float | None = None

    def native(self) -> torch.Tensor:
        """The tensor of a native file: a block, or 16-bit values."""
        return encode(self.values) if isinstance(self.values, QuantizedMatrix) else self.values

    def coded_bytes(self) -> int:
        """Bytes of that tensor once entropy-coded."""
        return encode_tensor(self.native()).nbytes


def rounded(weight: torch.Tensor, choice: Choice, name: str, rounder: Rounder = quantize_debiased) -> Rounded:
    """Weights [rows, columns] after the real quantizer."""
    if choice.kept:
        kept = sixteen_bits(weight)
        return Rounded(kept, squared_distance(weight, kept))
    matrix = rounder(weight, choice, name)
    assert matrix.squared_error is not None  # only matrices read from files lack it
    return Rounded(matrix, matrix.squared_error)


def relative(squared_error: float, energy: float) -> float:
    """Σ(w − ŵ)² / Σw², 0 for a matrix of zeros that is restored exactly."""
    return squared_error / energy if energy else squared_error


@dataclass(frozen=True, eq=False)
class ErrorWeights:
    """What the square of each weight's error counts: rows[i] · columns[j]; both float32 with mean 1."""

    rows: np.ndarray
    columns: np.ndarray

    def by_row(self, values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Σⱼ columns[j]·v² and Σⱼ v² of each row of values [rows, columns], both float64 [rows]."""
        return squares_by_row(values, self.columns.astype(np.float32))


@dataclass(frozen=True)
class SquaredErrors:
    """Σ(w − ŵ)² by choice, and the standard error of each where it was estimated from a sample of rows.

    energy: Σw², 0 if nothing was measured. coded: bytes of the matrix once entropy-coded, where that was asked for.
    Where columns have an importance m, errors are Σm(w − ŵ)², and those without it are in `plain`. Where weights
    count by row and column (`ErrorWeights`), errors are in proportion to what all of the matrix counts, so that they
    are errors of Σw² still; counted: what all of it counts, over Σw².
    """

    expected: dict[Choice, float] = field(default_factory=dict)
    deviation: dict[Choice, float] = field(default_factory=dict)
    energy: float = 0.0
    coded: dict[Choice, int] = field(default_factory=dict)
    plain: dict[Choice, float] = field(default_factory=dict)
    counted: float = 1.0

    def updated(self, later: SquaredErrors) -> SquaredErrors:
        """With what was measured later in place of what was known."""
        earlier = {choice: error for choice, error in self.deviation.items() if choice not in later.expected}
        return SquaredErrors(
            self.expected | later.expected,
            earlier | later.deviation,
            later.energy or self.energy,
            self.coded | later.coded,
            self.plain | later.plain,
            later.counted,
        )


@dataclass(frozen=True)
class SourceMatrix:
    """A matrix of a checkpoint, read when it is needed.

    quantizer: by name. importance: of columns, where known. counting: what errors count, all the same by default.
    """

    checkpoint: Checkpoint
    matrix: MatrixRef
    quantizer: str = CUTS
    importance: np.ndarray | None = None
    counting: ErrorWeights | None = None

    @cached_property
    def weight(self) -> torch.Tensor:
        """[rows, columns]."""
        return self.checkpoint.read(self.matrix)

    @cached_property
    def codes(self) -> QuantizedMatrix | None:
        """What the checkpoint holds, where those are codes whose cut scales are the quantizer's."""
        return held_form(self.checkpoint, self.matrix) if self.quantizer == CUTS else None

    @property
    def rounder(self) -> Rounder:
        """The quantizer for its columns."""
        return rounder_of(self.quantizer, self.importance)

    def cut(self, choice: Choice) -> Rounded | None:
        """Its own codes at a choice, with no weight read; None where they do not hold it."""
        if self.codes is None or not can_cut(self.codes.choice, choice):
            return None
        matrix, energy = cut(self.codes, choice)
        return Rounded(matrix, matrix.squared_error or 0.0, energy)

    def at(self, choice: Choice) -> Rounded:
        """The matrix at a choice: its own codes cut, or its weights rounded."""
        return self.cut(choice) or rounded(self.weight, choice, self.matrix.name, self.rounder)

    def restored(self, choice: Choice) -> torch.Tensor:
        """What an engine computes with in its place, float32 [rows, columns]."""
        values = self.at(choice).values
        if not isinstance(values, QuantizedMatrix):
            return values.float()
        return dequantize(values)

    def errors(self, choices: Sequence[Choice], sample_values: int = SAMPLE_VALUES) -> SquaredErrors:
        """Errors at every choice: exact of those that its codes hold, else as `squared_errors` says.

        Of choices whose codes are searched for as streams on a quarter of the weights: a hundred times the work each.
        """
        streams = [choice for choice in choices if format_of(choice).streams]
        others = [choice for choice in choices if not format_of(choice).streams]
        if not streams:
            return self._errors(others, sample_values)
        found = self._errors(streams, sample_values // STREAM_SHARE)
        return self._errors(others, sample_values).updated(found) if others else found

    def _errors(self, choices: Sequence[Choice], sample_values: int) -> SquaredErrors:
        if self.counting is not None and choices:
            return counted_errors(self, choices, self.counting, sample_values)
        own = self._cut_errors(choices) if choices else SquaredErrors()
        others = [choice for choice in choices if choice not in own.expected]
        if not others:
            return own
        rest = squared_errors(
            self.weight, others, self.matrix.name, self.rounder, sample_values, importance=self.importance
        )
        if not own.expected:
            return rest
        return replace(own, expected=own.expected | rest.expected, deviation=rest.deviation)

    def _cut_errors(self, choices: Sequence[Choice]) -> SquaredErrors:
        """Exact errors at those choices that the codes hold, and Σŵ²; nothing if they hold none."""
        own = {choice: one for choice in choices if (one := self.cut(choice)) is not None}
        if self.codes is None or not own:
            return SquaredErrors()
        energy = max(one.energy or 0.0 for one in own.values()) or squared_norm(dequantize(self.codes))
        return SquaredErrors({choice: one.squared_error for choice, one in own.items()}, energy=energy)

    def coded(self, choices: Sequence[Choice]) -> SquaredErrors:
        """Errors of the whole matrix at every choice, and the bytes that its native form takes once coded."""
        errors = SquaredErrors(energy=squared_norm(self.weight))
        for choice in choices:
            one = self.at(choice)
            errors.expected[choice], errors.coded[choice] = one.squared_error, one.coded_bytes()
        return errors


def squared_errors(
    weight: torch.Tensor,
    choices: Sequence[Choice],
    name: str,
    rounder: Rounder = quantize_debiased,
    sample_values: int = SAMPLE_VALUES,
    *,
    importance: np.ndarray | None = None,
) -> SquaredErrors:
    """Σ(w − ŵ)² at every choice; of a matrix beyond `sample_values` weights estimated from a sample of rows.

    A row's error is nearly proportional to its energy, so the sample's ratio Σ(w − ŵ)²/Σw² times the whole energy is
    typically within one per cent of the truth (with 2^18 weights at most 3.5 % was seen, on Student's t with 4 degrees
    of freedom and on rows and columns of outliers). Rows are drawn without repetition, seeded by the name. The
    standard error comes from the spread of the ratio over batches of the rows. importance: of the columns, float32
    [columns] of mean 1, which then weighs the errors too; the rounder knows it already.
    """
    if not choices:
        return SquaredErrors()
    rows, columns = weight.shape
    if not math.isfinite(whole := squared_norm(weight)):  # the rows drawn might not show it
        raise QuantizationError(f"{name} holds NaN or infinite weights. The checkpoint is damaged.")

    def errors_of(pair: tuple[Choice, torch.Tensor]) -> tuple[float, float]:
        choice, values = pair
        found = rounded(values, choice, name, rounder)
        plain = found.squared_error
        return plain if importance is None else _weighted_error(values, found, importance), plain

    def of_whole() -> SquaredErrors:
        pairs = in_threads(errors_of, [(choice, weight) for choice in choices])
        expected, plain = ({one: pair[at] for one, pair in zip(choices, pairs, strict=True)} for at in (0, 1))
        return SquaredErrors(expected, energy=whole, plain={} if importance is None else plain)

    count = max(sample_values // columns, SAMPLE_BATCHES)
    if weight.numel() <= sample_values or count >= rows:
        return of_whole()
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    drawn = np.random.Generator(np.random.PCG64(seed)).choice(rows, count, replace=False)
    batches = [weight[torch.from_numpy(np.sort(batch))] for batch in np.array_split(drawn, SAMPLE_BATCHES)]
    energies = np.array([squared_norm(batch) for batch in batches])
    if not (energy := energies.sum()) > 0:  # nothing but zeros drawn
        return of_whole()
    pairs = [(choice, batch) for choice in choices for batch in batches]
    measured = np.array(in_threads(errors_of, pairs)).reshape(len(choices), -1, 2)
    found = SquaredErrors(energy=whole)
    for choice, errors in zip(choices, measured, strict=True):
        ratios = errors.sum(axis=0) / energy
        misses = errors[:, 0] - ratios[0] * energies
        found.expected[choice] = float(ratios[0] * whole)
        found.deviation[choice] = float(np.sqrt(misses @ misses * len(batches) / (len(batches) - 1)) * whole / energy)
        if importance is not None:
            found.plain[choice] = float(ratios[1] * whole)
    return found


def counted_errors(
    source: SourceMatrix, choices: Sequence[Choice], counting: ErrorWeights, sample_values: int = SAMPLE_VALUES
) -> SquaredErrors:
    """Errors at every choice, counted by row and column.

    Of a matrix beyond `sample_values` weights rows are drawn, with repetition and seeded by the name: half of them in
    proportion to what their energy counts, half to their energy, so that both kinds of errors are known.
    """
    weight, name = source.weight, source.matrix.name
    of_rows, plain_rows = counting.by_row(weight)
    of_rows = counting.rows * of_rows
    energy, total = float(plain_rows.sum()), float(of_rows.sum())
    if not math.isfinite(total + energy):
        raise QuantizationError(f"{name} holds NaN or infinite weights. The checkpoint is damaged.")
    rows, columns = weight.shape
    count = max(sample_values // columns, SAMPLE_BATCHES)
    whole = weight.numel() <= sample_values or count >= rows or not total > 0
    chance = np.ones(rows) if whole else (of_rows / total + plain_rows / energy) / 2
    drawn = np.arange(rows)
    if not whole:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        drawn = np.random.Generator(np.random.PCG64(seed)).choice(rows, count, p=chance)
    distinct, where = np.unique(drawn, return_inverse=True)
    some = weight if whole else weight[torch.from_numpy(distinct)]
    batches = [where] if whole else np.array_split(where, SAMPLE_BATCHES)

    def relative_errors(choice: Choice) -> tuple[np.ndarray, np.ndarray]:
        """As they count, and plainly, [batches]."""
        found = source.at(choice) if whole else rounded(some, choice, name, source.rounder)
        restored = dequantize(found.values) if isinstance(found.values, QuantizedMatrix) else found.values
        by_row, plainly = counting.by_row(some.float() - restored.float())
        kinds = (counting.rows[distinct] * by_row, of_rows), (plainly, plain_rows)
        counted, plain = (
            np.array([_ratio(errors, of[distinct], chance[distinct], one) for one in batches]) for errors, of in kinds
        )
        return counted, plain

    found = SquaredErrors(energy=energy, counted=total / energy if energy > 0 else 1.0)
    for choice, (counted, plain) in zip(choices, in_threads(relative_errors, choices), strict=True):
        found.expected[choice], found.plain[choice] = float(counted.mean() * energy), float(plain.mean() * energy)
        if not whole:
            found.deviation[choice] = float(counted.std(ddof=1) / math.sqrt(len(counted)) * energy)
    return found


def _ratio(errors: np.ndarray, energies: np.ndarray, chances: np.ndarray, drawn: np.ndarray) -> float:
    """Σ error / Σ energy of all rows, by those drawn with such chances; 0 where there is no energy."""
    energy = float((energies / chances)[drawn].sum())
    return float((errors / chances)[drawn].sum()) / energy if energy > 0 else 0.0


def _weighted_error(weight: torch.Tensor, found: Rounded, importance: np.ndarray) -> float:
    """Σm(w − ŵ)² of rows [rows, columns]."""
    values = found.values
    restored = dequantize(values) if isinstance(values, QuantizedMatrix) else values
    misses = (weight.float() - restored.float()).numpy()
    return float(np.square(misses, dtype=np.float64).sum(axis=0) @ importance)
