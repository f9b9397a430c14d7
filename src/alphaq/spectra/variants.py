"""The names of the ways to measure α: which eigenvalues, and where their power-law tail is taken to start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from alphaq.nouns.settings import Blocks, Tail
from alphaq.registry import lookup


@dataclass(frozen=True)
class SpectrumVariant:
    """Which eigenvalues and which tail. `str()` is a stable key, such as "farms-hill" or "whole-ks".

    Raises UnknownNameError for a name that is not one of the literals.
    """

    blocks: Blocks = "farms"
    tail: Tail = "hill"

    def __post_init__(self) -> None:
        lookup("blocks", dict.fromkeys(get_args(Blocks)), self.blocks)
        lookup("tail", dict.fromkeys(get_args(Tail)), self.tail)

    def __str__(self) -> str:
        return f"{self.blocks}-{self.tail}"


FAST_VARIANT = SpectrumVariant()
"""The one that `alphaq.spectra.measure.spectrum` measures with kernels; the others are in `alphaq.research.tails`."""
