"""What a method is, and the evidence that it goes by.

A loss rule gives the expected loss of every matrix at every choice, which the exact solver then minimises
over the budget. An order rule only says which matrices come first; they are lifted in that order above the
widest choice that fits for all. Either way a method is one function of `Evidence`, so all of them can be
compared on the same measurements and the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from alphaq.calibration.fisher import Fisher
from alphaq.calibration.traffic import Calibration, Expert, ExpertUse
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef

Need = str
"""`errors`, `alpha` and `places` are always known; others name a pass (`planning.passes`) or a probe
(`measuring.probes`); `outputs` asks the pass over a text for every choice's output errors."""
Kind = Literal["loss", "order", "ratio", "expert"]


@dataclass(frozen=True)
class Evidence:
    """What was measured of the matrices to plan, in their order; parts that no method asked for are None.

    errors: expected Σ(w − ŵ)² [matrices, choices]. energies: Σw² [matrices]. weights: parameters, or ones where
    every matrix is to count once (errors and energies are then per weight). alphas: NaN where undefined. probes: what
    further was measured of each matrix, by the probe's name.
    """

    names: tuple[str, ...]
    choices: tuple[Choice, ...]
    errors: np.ndarray
    energies: np.ndarray
    weights: np.ndarray
    alphas: np.ndarray
    matrices: tuple[MatrixRef, ...] = ()
    probes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    prior: Mapping[Expert, ExpertUse] | None = None
    synthetic: Calibration | None = None
    calibration: Calibration | None = None
    fisher: Fisher | None = None
    """Where it is known, errors count as it says (`calibration.fisher`)."""
    harms: np.ndarray | None = None
    """Nats per token and per unit of relative error, float64 [matrices]."""
    gamma: float | Literal["auto"] = "auto"
    seed: int = 0
    coded: np.ndarray | None = None
    """Bytes of each matrix at each choice once entropy-coded, int64 [matrices, choices]."""
    plain: np.ndarray | None = None
    """Σ(w − ŵ)² / Σw² [matrices, choices] with all weights alike, where errors count otherwise."""
    rest_bytes: int = 0
    """Of entropy-coded files: everything but these matrices."""

    @property
    def relative_errors(self) -> np.ndarray:
        """Σ(w − ŵ)² / Σw² [matrices, choices]; 0 for a matrix of zeros."""
        return self.errors / np.where(self.energies > 0, self.energies, 1.0)[:, None]


Rule = Callable[[Evidence], np.ndarray]


@dataclass(frozen=True)
class Method:
    """One allocator.

    kind: `loss` (rule gives [matrices, choices], solved exactly), `order` (rule gives a score [matrices], highest
    first; None spreads evenly), `ratio` (rule gives a score; the reference's fixed shares), `expert` (a loss whose
    unit is a whole expert, under PMQ's side constraints). preset: settings that belong to the method.
    joint: whether its losses are per weight of an average expert, so that other roles can be weighed against them.
    otherwise: what it needs where it asked for the Fisher information and the model's pass has no gradient here.
    """

    summary: str
    kind: Kind
    rule: Rule | None
    needs: tuple[Need, ...] = ("errors",)
    preset: Mapping[str, Any] = field(default_factory=dict)
    joint: bool = False
    otherwise: tuple[Need, ...] = ()

    @property
    def by_widths(self) -> bool:
        """Whether it goes by plain widths, one choice for each, and takes none of the others."""
        return self.kind != "loss"

    @property
    def spreads_evenly(self) -> bool:
        """Whether all matrices get the same, as nearly as the budget allows."""
        return self.kind == "order" and self.rule is None

    @property
    def by_shapes(self) -> bool:
        """Whether it goes by places alone, so that errors only describe what it chose."""
        return self.kind == "order" and {*self.needs} <= {"errors", "places"}

    @property
    def needs_fisher(self) -> bool:
        """Whether errors count as the Fisher information says."""
        return "fisher" in self.needs

    @property
    def needs_text(self) -> bool:
        """Whether it cannot work without a text from the user."""
        return "text" in self.needs
