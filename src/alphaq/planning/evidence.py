"""What must be known for a plan: spectra and errors, and what a method asks for beyond: probes, passes, text."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import StatsError
from alphaq.measuring.probes import PROBES
from alphaq.measuring.resources import Resources
from alphaq.planning.coded import coded_rest
from alphaq.planning.dropping import fitting_scope
from alphaq.planning.formula import alphas_of
from alphaq.planning.matrices import (
    MatrixTable,
    Survey,
    harms,
    joined_errors,
    measure_errors,
    measure_planned,
    planned_errors,
)
from alphaq.planning.measured import AtChoice, Measurements, PlanInputs
from alphaq.planning.passes import PassResults, PassRun, run_passes
from alphaq.planning.request import Request
from alphaq.planning.sampled import measured_by_rows
from alphaq.planning.samples import Samples
from alphaq.planning.scope import Scope
from alphaq.planning.settling import settle_further, stageable
from alphaq.planning.stats import measured_by_headers, measured_by_stats
from alphaq.sensitivity.base import Evidence, Need
from alphaq.spectra.measure import Stats


def measure_for_plan(
    checkpoint: Checkpoint | None,
    request: Request,
    inputs: PlanInputs = PlanInputs(),
    resources: Resources = Resources(),
    needs: Collection[Need] | None = None,
    check_budget: bool = True,
    settle: bool = True,
) -> Measurements:
    """What the request's method needs to know of the matrices to plan, from the weights, a stats file, or both.

    needs: measure for these instead of the method's own. check_budget: raise BudgetError before any work if the
    request's budget is infeasible. settle: measure only as much as the plan of this request's budget depends on; False
    where plans of several budgets or methods are to be made, as without `check_budget`. Raises StatsError if the stats
    lack a matrix of the checkpoint, or the method needs weights or a text that were not given.
    """
    wanted = {*(request.method.needs if needs is None else needs), *({"drops"} if request.config.drop else ())}
    stats = inputs.read_stats()
    if checkpoint is None:
        return measured_by_stats(request, wanted, stats)
    # What coded files take is known once they are coded; all else that cannot be is told before any measuring.
    early = check_budget and request.config.codec is None
    request.profile.check_layers(checkpoint)
    if early:
        request.profile.writer.layout(checkpoint, {})
    scope = Scope.of(checkpoint, request)
    if early:
        fitting_scope(checkpoint, request)
    if request.config.share is not None:
        return measured_by_rows(checkpoint, request, wanted, resources)
    if stats is None and needs is None and request.method.by_shapes and request.config.noise == "analytic":
        return measured_by_headers(checkpoint, request)
    if stats is not None:
        _check_stats(checkpoint, inputs, stats)
    if "text" in wanted and inputs.text is None:
        raise StatsError(f"--method {request.config.method} needs a text. Give one with --calibration FILE.")
    staged = settle and check_budget and needs is None and not request.config.drop and stageable(scope)
    outputs = request.choices if "outputs" in wanted else ()
    observed = request.profile.writer.observed
    run = PassRun(checkpoint, request.config.bos, inputs.text, outputs, resources, observed)
    passes = run_passes(run, wanted, request.method.otherwise)
    fisher = passes.found.get("fisher") if request.method.needs_fisher else None
    own = None
    if fisher is not None and inputs.imatrix is None and inputs.own_imatrix is not None:
        own = inputs.own_imatrix(checkpoint, fisher)
    survey = Survey.of(scope, stats, tuple(sorted(set(wanted) & PROBES.keys())), own or inputs.imatrix)
    return replace(_measured(replace(survey, staged=staged, fisher=fisher), passes, resources), own_imatrix=own)


def _measured(survey: Survey, passes: PassResults, resources: Resources) -> Measurements:
    """The stages of measuring after the passes: matrices, what coded files hold beside, and what of the matrices the
    plan is still uncertain of."""
    begin = time.perf_counter()
    planned, joined = Samples(survey.planned), tuple(map(Samples, survey.joined))
    table = measure_planned(survey, planned, resources)
    fixed = survey.fixed_samples()
    for samples in (*joined, fixed):
        if samples.group.members:
            measure_errors(survey, samples, samples.first(), resources, "measure the rest")
    first_s = time.perf_counter() - begin
    rest_bytes = 0 if table.coded is None else coded_rest(survey.scope, resources)
    found = _Found(survey, table, planned, joined, fixed, passes, rest_bytes)
    begin = time.perf_counter()
    measurements = found.measurements()
    while survey.staged and settle_further(survey, (planned, *joined), measurements, resources):
        measurements = found.measurements()
    return replace(measurements, seconds=dict(passes.seconds) | {"errors": first_s + time.perf_counter() - begin})


@dataclass(frozen=True, eq=False)
class _Found:
    """What was found so far: of the planned matrices, of errors of these and of those that join, by passes, and the
    bytes of what coded files hold beside."""

    survey: Survey
    table: MatrixTable
    planned: Samples
    joined: tuple[Samples, ...]
    fixed: Samples
    passes: PassResults
    rest_bytes: int

    def _fixed(self, name: str) -> AtChoice:
        """A matrix outside the budget; it has no error where the source's bytes are copied."""
        found, choice = self.fixed.errors[name], self.survey.scope.fixed[name]
        if self.survey.scope.stored_as(self.survey.fixed[name]) == choice:
            return AtChoice(choice, 0.0)
        return AtChoice(choice, found.expected[choice] / (found.energy or 1.0))

    def measurements(self) -> Measurements:
        """What plans can be made of."""
        survey, table, scope, results = self.survey, self.table, self.survey.scope, self.passes.found
        known = dict(zip(table.spectra, table.energies.tolist(), strict=True))
        of_all = harms(survey, (self.planned, *self.joined, self.fixed), known)
        errors, joined = planned_errors(survey, table, self.planned), joined_errors(survey, self.joined)
        energies = np.where(table.energies > 0, table.energies, 1.0)[:, None]
        plain = None if errors.plain is None else errors.plain / energies
        evidence = Evidence(
            tuple(table.spectra),
            scope.request.choices,
            errors.expected,
            table.energies,
            np.array([matrix.parameters for matrix in scope.planned], dtype=np.int64),
            alphas_of(table.spectra.values()),
            tuple(scope.planned),
            table.probes,
            results.get("prior"),
            results.get("synthetic"),
            results.get("text"),
            survey.fisher,
            None if survey.fisher is None else np.array([of_all[name] for name in table.spectra]),
            coded=table.coded,
            rest_bytes=self.rest_bytes,
            plain=plain,
        )
        return Measurements(
            table.spectra,
            scope.request.offered,
            evidence,
            _left_out(survey.stats),
            deviations=errors.deviations,
            joined={name: one.expected for name, one in joined.items()},
            importance=survey.importance,
            joined_deviations={name: one.deviations for name, one in joined.items()},
            plain=plain,
            joined_plain={name: one.plain for name, one in joined.items()},
            harms=of_all,
            fixed={name: self._fixed(name) for name in self.fixed.errors},
            unpredicted=self.passes.unpredicted,
            drops=results.get("drops"),
        )


def _check_stats(checkpoint: Checkpoint, inputs: PlanInputs, stats: Stats) -> None:
    """Raise StatsError for a matrix that the stats have no row of."""
    for matrix in checkpoint.planned:
        if matrix.name not in stats.spectra:
            reason = stats.left_out.get(matrix.name, "no row")
            raise StatsError(
                f"{inputs.stats} has no usable row for {matrix.name!r} ({reason}). Analyze this model again."
            )


def _left_out(stats: Stats | None) -> dict[str, str]:
    """Rows of experts that were not usable, and why."""
    return {} if stats is None else {name: why for name, why in stats.left_out.items() if "not an expert" not in why}
