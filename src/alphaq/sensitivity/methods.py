"""Every allocator by name. To add one: a module with its rule, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alphaq.nouns.matrix import MatrixRef
from alphaq.registry import lookup
from alphaq.research import aimer, alpha_ratio, kurtosis, outlier, stable_rank
from alphaq.sensitivity import calibrated, importance, nats, router, signal, structure, typical
from alphaq.sensitivity.base import Method, Rule


def _scored(score: Callable[[Sequence[MatrixRef], Sequence[Any]], np.ndarray]) -> Rule:
    """A score of each matrix by its statistics, times its errors."""
    return lambda evidence: score(evidence.matrices, evidence.probes["statistics"])[:, None] * evidence.errors


METHODS: dict[str, Method] = {
    "auto": Method(
        "the default: nats by the Fisher information on the model's own writing, or signal where it has no gradient",
        "loss",
        nats.losses_or_signal,
        ("errors", "fisher"),
        joint=True,
        otherwise=("prior", "synthetic"),
    ),
    "fisher": Method(
        "nats by the Fisher information on the model's own writing",
        "loss",
        nats.losses,
        ("errors", "fisher"),
        joint=True,
    ),
    "signal": Method(
        "signal path × routing prior × relative error, from the weights alone",
        "loss",
        signal.losses,
        ("errors", "prior", "synthetic"),
        joint=True,
    ),
    "typical": Method(
        "place in a typical model × routing prior × relative error: what --share uses",
        "loss",
        typical.losses,
        ("errors", "prior"),
        joint=True,
    ),
    "alphaq": Method("(α₀/α)^γ × error: heavy-tailed spectra first", "loss", importance.losses, ("errors", "alpha")),
    "paper": Method(
        "AlphaQ as published: γ 10, analytic noise, matrices counted, 1 to 4 bits",
        "loss",
        importance.losses,
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
    "random": Method("the same, lifting matrices at random (--seed)", "order", structure.shuffled),
    "first-layers": Method(
        "the same, lifting the first layers first", "order", structure.first_layers, ("errors", "places")
    ),
    "structure": Method(
        "the same, first layers and down projections first",
        "order",
        lambda evidence: structure.score(evidence.matrices),
        ("errors", "places"),
    ),
    "alpha-ratio": Method(
        "lowest-α quarter one bit up, highest-α quarter one bit down",
        "ratio",
        lambda evidence: alpha_ratio.completed(evidence.alphas),
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
