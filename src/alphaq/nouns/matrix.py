"""One 2-D weight, wherever it lies on disk.

A shape is always `(rows, columns)` = `(out_features, in_features)`, whatever the layout on disk.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

Shape = tuple[int, int]


class Role(str, enum.Enum):
    """What a tensor does in the model; decides whether and how it may be quantized."""

    EXPERT = "expert"
    SHARED_EXPERT = "shared_expert"
    ATTENTION = "attention"
    MIXER = "mixer"
    DENSE_MLP = "dense_mlp"
    ROUTER = "router"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class MatrixRef:
    """One 2-D weight, wherever it lies on disk: alone, or as a slice of a fused tensor."""

    name: str
    shape: Shape
    dtype: str
    layer: int | None
    expert: int | None
    projection: str | None
    role: Role
    tensor: str
    """Name of the stored tensor that holds the matrix (equal to `name` unless fused)."""
    index: int | None = None
    """Position along the first axis of a fused `[experts, …]` tensor."""
    row_start: int = 0
    """First row of this matrix inside its (oriented) slice, e.g. `up` after `gate`."""
    transposed: bool = False
    """True if disk holds `[in, out]`."""
    row_step: int = 1
    """From one row of this matrix to the next, 2 where those of `gate` and `up` alternate."""

    @property
    def place(self) -> tuple[float, float, str, str]:
        """Sorts matrices as the model runs them: by layer, expert, projection."""
        layer, expert = (math.inf if value is None else value for value in (self.layer, self.expert))
        return layer, expert, self.projection or "", self.name

    @property
    def in_every_layer(self) -> str:
        """A glob on names: this matrix of all layers."""
        return self.name if self.layer is None else self.name.replace(f".{self.layer}.", ".*.", 1)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]
