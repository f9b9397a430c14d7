"""Codes, offsets and scales of one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Shape


@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes, offsets and scales of one matrix.

    codes: packed uint8 [rows, choice.row_bytes(columns)]. scales: float16 [rows, groups]. offsets: uint8
    zero points [rows, groups]; float16 means if bits is 1; None if symmetric. Engines that store scales and biases in
    the model's own type have bfloat16 there; of a ggml type there are only codes, whole blocks. squared_error:
    Σ(w − ŵ)² against the weights it was made of; None if it comes from a file. extra: what else its format stores, by
    that format's module: widths of groups, salient weights.
    """

    choice: Choice
    shape: Shape
    codes: Any
    scales: Any
    offsets: Any | None
    squared_error: float | None = None
    extra: Any | None = None
