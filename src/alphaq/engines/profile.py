"""What a plan may assume of the engine that will run it.

No engine with fused kernels loads a bit-width per expert, so a plan is always made for an engine: which
matrices must share a choice, which choices it can load, and how many bytes each takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from alphaq.records import Choice, MatrixRef, Shape

Unit = Literal["matrix", "layer × projection", "layer"]


@dataclass(frozen=True)
class Profile:
    """One engine.

    unit: what must share one choice. choices: every choice it can load for experts; defaults: those offered
    when the user names none. with_bits: the choice meant by a bare bit-width (`--attention-bits 4`), and for roles
    outside the budget. storage_bytes: exact bytes of one matrix's tensors at a choice. obstacle: why a matrix
    cannot be stored so, or None. exports: whether `alphaq quantize` can write it.
    """

    name: str
    summary: str
    unit: Unit
    choices: tuple[Choice, ...]
    defaults: tuple[Choice, ...]
    with_bits: Callable[[int], Choice]
    storage_bytes: Callable[[Choice, Shape], int]
    obstacle: Callable[[Choice, MatrixRef], str | None]
    exports: bool = False

    def unit_of(self, matrix: MatrixRef) -> str:
        """Name of the unit that a matrix belongs to."""
        if self.unit == "matrix":
            return matrix.name
        layer = f"layers.{matrix.layer}.experts"
        return layer if self.unit == "layer" else f"{layer}.{matrix.projection}"
