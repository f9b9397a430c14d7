"""Every allocator by name: what it needs to know, and how it turns that into losses or an order.

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

from alphaq.calibration.traffic import Calibration, Expert, ExpertUse
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.spectrum import WeightStatistics
from alphaq.registry import lookup
from alphaq.sensitivity import aimer, calibrated, kurtosis, outlier, router, signal, stable_rank, structure
from alphaq.sensitivity.importance import alpha_importance, automatic_gamma, completed

Need = Literal["errors", "alpha", "places", "statistics", "prior", "synthetic", "text", "outputs"]
Kind = Literal["loss", "order", "ratio", "expert"]


@dataclass(frozen=True)
class Evidence:
    """What was measured of the matrices to plan, in their order; parts that no method asked for are None.

    errors: expected Σ(w − ŵ)² [matrices, choices]. energies: Σw² [matrices]. weights: parameters, or ones where
    every matrix is to count once (errors and energies are then per weight). alphas: NaN where undefined.
    """

    names: tuple[str, ...]
    choices: tuple[Choice, ...]
    errors: np.ndarray
    energies: np.ndarray
    weights: np.ndarray
    alphas: np.ndarray
    matrices: tuple[MatrixRef, ...] = ()
    statistics: tuple[WeightStatistics, ...] | None = None
    prior: Mapping[Expert, ExpertUse] | None = None
    synthetic: Calibration | None = None
    calibration: Calibration | None = None
    gamma: float | Literal["auto"] = "auto"
    seed: int = 0
    coded: np.ndarray | None = None
    """Bytes of each matrix at each choice once entropy-coded, int64 [matrices, choices]."""
    rest_bytes: int = 0
    """Of entropy-coded files: everything but these matrices."""

    @property
    def relative_errors(self) -> np.ndarray:
        """Σ(w − ŵ)² / Σw² [matrices, choices]; 0 for a matrix of zeros."""
        return self.errors / np.where(self.energies > 0, self.energies, 1.0)[:, None]


@dataclass(frozen=True)
class Method:
    """One allocator.

    kind: `loss` (rule gives [matrices, choices], solved exactly), `order` (rule gives a score [matrices], highest
    first; None spreads evenly), `ratio` (rule gives a score; the reference's fixed shares), `expert` (a loss whose
    unit is a whole expert, under PMQ's side constraints). preset: settings that belong to the method.
    joint: whether its losses are per weight of an average expert, so that other roles can be weighed against them.
    """

    summary: str
    kind: Kind
    rule: Callable[[Evidence], np.ndarray] | None
    needs: tuple[Need, ...] = ("errors",)
    preset: Mapping[str, Any] = field(default_factory=dict)
    joint: bool = False

    @property
    def by_widths(self) -> bool:
        """Whether it goes by plain widths, one choice for each, and takes none of the others."""
        return self.kind != "loss"

    @property
    def by_shapes(self) -> bool:
        """Whether it goes by places alone, so that errors only describe what it chose."""
        return self.kind == "order" and {*self.needs} <= {"errors", "places"}

    @property
    def needs_text(self) -> bool:
        """Whether it cannot work without a text from the user."""
        return "text" in self.needs


def _scored(score: Callable[..., np.ndarray]) -> Callable[[Evidence], np.ndarray]:
    def rule(evidence: Evidence) -> np.ndarray:
        return score(evidence.matrices, evidence.statistics)[:, None] * evidence.errors

    return rule


def resolved_gamma(evidence: Evidence) -> float:
    """γ as given, or the one that suits the spread of α."""
    return automatic_gamma(evidence.alphas) if evidence.gamma == "auto" else evidence.gamma


def _alphaq(evidence: Evidence) -> np.ndarray:
    return alpha_importance(evidence.alphas, resolved_gamma(evidence))[:, None] * evidence.errors


def _ranks(evidence: Evidence) -> np.ndarray:
    """Position of each matrix in the model, whatever the order of the files; in a stats file as it is listed."""
    numbers = range(len(evidence.names))
    ranks = np.empty(len(evidence.names))
    ranks[sorted(numbers, key=lambda n: evidence.matrices[n].place) if evidence.matrices else numbers] = numbers
    return ranks


def _random(evidence: Evidence) -> np.ndarray:
    return np.random.default_rng(evidence.seed).random(len(evidence.names))[_ranks(evidence).astype(int)]


def _first_layers(evidence: Evidence) -> np.ndarray:
    return -_ranks(evidence)


METHODS: dict[str, Method] = {
    "auto": Method(
        "the default: signal path × routing prior × relative error, from the weights alone",
        "loss",
        signal.losses,
        ("errors", "prior", "synthetic"),
        joint=True,
    ),
    "alphaq": Method("(α₀/α)^γ × error: heavy-tailed spectra first", "loss", _alphaq, ("errors", "alpha")),
    "paper": Method(
        "AlphaQ as published: γ 10, analytic noise, matrices counted, 1 to 4 bits",
        "loss",
        _alphaq,
        ("errors", "alpha"),
        {"gamma": 10.0, "noise": "analytic", "choices": "1,2,3,4", "unweighted": True},
    ),
    "distortion": Method("squared error alone (γ = 0)", "loss", lambda evidence: evidence.errors),
    "router": Method("routing prior × error", "loss", router.losses, ("errors", "prior")),
    "mint": Method(
        "relative error over bits and groups, nothing below 9 dB",
        "loss",
        lambda evidence: evidence.relative_errors * evidence.weights[:, None],
        preset={"min_sqnr_db": 9.0},
    ),
    "kurtosis": Method("kurtosis × error", "loss", _scored(kurtosis.score), ("errors", "statistics")),
    "outlier": Method("outlier score × error", "loss", _scored(outlier.score), ("errors", "statistics")),
    "stable-rank": Method("inverse stable rank × error", "loss", _scored(stable_rank.score), ("errors", "statistics")),
    "aimer": Method("AIMER's expert ranking × error", "loss", _scored(aimer.score), ("errors", "statistics")),
    "uniform": Method("one choice for all; what is left lifts evenly spread matrices", "order", None),
    "random": Method("the same, lifting matrices at random (--seed)", "order", _random),
    "first-layers": Method("the same, lifting the first layers first", "order", _first_layers, ("errors", "places")),
    "structure": Method(
        "the same, first layers and down projections first",
        "order",
        lambda evidence: structure.score(evidence.matrices),
        ("errors", "places"),
    ),
    "alpha-ratio": Method(
        "lowest-α quarter one bit up, highest-α quarter one bit down",
        "ratio",
        lambda evidence: completed(evidence.alphas),
        ("errors", "alpha"),
    ),
    "pmq": Method(
        "frequency × routing weight × block error, per layer", "expert", calibrated.pmq, ("errors", "text", "outputs")
    ),
    "baq": Method("range² and inverse Hessian, equal marginal loss", "loss", calibrated.baq, ("errors", "text")),
    "hessian": Method("trace of the Hessian × error", "loss", calibrated.hessian, ("errors", "text")),
    "mse-output": Method(
        "squared error of the block's output", "loss", calibrated.output_error, ("errors", "text", "outputs")
    ),
}


def method(name: str) -> Method:
    """The method of that name. Raises UnknownNameError with the closest name and the list of all."""
    return lookup("--method", METHODS, name)
