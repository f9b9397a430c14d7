"""Plans without weights: from a stats file alone, or from what headers say of a model."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from alphaq.allocation.problem import Problem
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import BudgetError, StatsError
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import PlanConfig
from alphaq.nouns.spectrum import Spectrum
from alphaq.planning.costs import by_count
from alphaq.planning.formula import alphas_of, expected_error
from alphaq.planning.limits import check_feasible, most_noise
from alphaq.planning.measured import Measurements
from alphaq.planning.request import Request
from alphaq.planning.solving import accounted, draft, solve
from alphaq.sensitivity.base import Evidence, Need
from alphaq.spectra.measure import Stats

OF_MATRICES = ("engine", "pins", "min_bits", "max_bits", "per_layer", "min_speed")
"""Settings that mean nothing where only names, α and variances are known."""


def measured_by_stats(request: Request, needs: Collection[Need], stats: Stats | None) -> Measurements:
    """What a stats file and a formula say. Raises StatsError if there is none, or the request needs the weights."""
    config, choices = request.config, request.choices
    if stats is None:
        raise StatsError("Nothing to plan. Give MODEL, or --stats with columns name, alpha, variance.")
    if config.noise == "measured":
        raise StatsError("--noise measured needs the weights. Give MODEL, or use --noise analytic.")
    if beyond := set(needs) - {"errors", "alpha"}:
        raise StatsError(f"--method {config.method} needs the weights ({', '.join(sorted(beyond))}). Give MODEL.")
    spectra, names = stats.spectra, tuple(stats.spectra)
    known = stats.parameters.keys() >= spectra.keys()
    weights = np.array([stats.parameters[name] if known else 1 for name in names], dtype=np.int64)
    errors = np.array(
        [
            [expected_error(one, choice, one.variance * weight, weight) for choice in choices]
            for one, weight in zip(spectra.values(), weights.tolist(), strict=True)
        ]
    )
    energies = np.array([one.variance for one in spectra.values()]) * weights
    evidence = Evidence(names, choices, errors, energies, weights, alphas_of(spectra.values()))
    return Measurements(spectra, request.offered, evidence, stats.left_out)


def measured_by_headers(checkpoint: Checkpoint, request: Request) -> Measurements:
    """What a formula says of weights of variance 1, which none was read to learn."""
    choices, matrices = request.choices, checkpoint.planned
    unit = Spectrum(None, 0, 0, 1.0, 1.0, math.nan)
    weights = np.array([matrix.parameters for matrix in matrices], dtype=np.int64)
    errors = weights[:, None] * np.array([expected_error(unit, choice, 1.0, 1) for choice in choices])
    evidence = Evidence(
        tuple(matrix.name for matrix in matrices),
        choices,
        errors,
        weights.astype(float),
        weights,
        np.full(len(matrices), np.nan),
        tuple(matrices),
    )
    return Measurements({}, request.offered, evidence, by_shapes=True)


def make_plan(request: Request, measurements: Measurements) -> Plan:
    """The plan of a stats file: code bits are all that can be counted. Raises BudgetError."""
    evidence = accounted(measurements.evidence, request)
    answer = solve(_problem(request, measurements.evidence), request, evidence)
    return draft(request, measurements, evidence, answer)


def _problem(request: Request, evidence: Evidence) -> Problem:
    config, choices, names = request.config, request.choices, evidence.names
    if config.budget.bits is None:
        raise BudgetError(
            "Stats alone do not say how many bytes matrices take. State the budget as --bits, or give MODEL."
        )
    if any(getattr(config, name) != PlanConfig.model_fields[name].default for name in OF_MATRICES):
        raise BudgetError("--engine, pins, bounds, --per-layer and --min-speed need to know the matrices. Give MODEL.")
    counts = np.ones(len(names), np.int64) if config.unweighted else evidence.weights
    costs = by_count(choices, counts, config.budget.bits)
    clear = evidence.relative_errors <= most_noise(config)
    outside_layers = np.full(len(names), -1)
    owner = np.arange(len(names))
    problem = Problem(names, owner, choices, costs.table, clear, costs.limit, outside_layers, request.rungs)
    check_feasible(problem, request, costs.stated)
    return problem
