"""Codes, offsets and scales of one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alphaq.nouns.choice import (
    Choice,
)
from alphaq.nouns.matrix import Shape


@dataclass(frozen=True)
class SalientWeights:
    """Weights of 8 bits in a binary matrix, k to a group: ŵ = scale·(value − 128) at a position within the group.

    scales: float16 [rows, groups]. positions: uint8 [rows, groups, k], ascending, 255 where there is none. values:
    uint8 [rows, groups, k].
    """

    scales: Any
    positions: Any
    values: Any


@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes, offsets and scales of one matrix.

    codes: packed uint8 [rows, choice.row_bytes(columns)]. scales: float16 [rows, groups]. offsets: uint8
    zero points [rows, groups]; float16 means if bits is 1; None if symmetric. Engines that store scales and biases in
    the model's own type have bfloat16 there; of a ggml type there are only codes, whole blocks. squared_error:
    Σ(w − ŵ)² against the weights it was made of; None if it comes from a file. widths: uint8 [groups], bits of each
    group, whose codes follow one another, if they differ; groups of 1 bit have no mean then, and 0 for a zero point.
    salient: what stands in the place of some codes.
    """

    choice: Choice
    shape: Shape
    codes: Any
    scales: Any
    offsets: Any | None
    squared_error: float | None = None
    widths: Any | None = None
    salient: SalientWeights | None = None
