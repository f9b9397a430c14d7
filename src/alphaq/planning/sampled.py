"""What a share of a model's bytes tells: relative errors of stacks by runs of their rows, and the routing prior.

A plan of it needs no more of a store than these rows, routers and norms (`measuring.rows`), which are kept beside the
measurements: the next plan of the same share reads nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from alphaq.calibration.traffic import Expert, ExpertUse
from alphaq.checkpoint.ranges import KeepingStore, Range, fetched, keeping, missing
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import PassError
from alphaq.formats.gaussian import gaussian_errors
from alphaq.formats.table import following, format_of
from alphaq.measuring.measurement import Sampling, Wanted, measure
from alphaq.measuring.resources import Resources
from alphaq.measuring.rows import RowSample, draw_rows, stack_of
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.plan import Plan
from alphaq.planning.estimates import UNSEEN, between, of_unit
from alphaq.planning.measured import Measurements
from alphaq.planning.passes import PassRun, run_passes
from alphaq.planning.request import Request
from alphaq.planning.scope import Scope
from alphaq.quantizers.base import QUANTIZERS
from alphaq.quantizers.rounded import SquaredErrors
from alphaq.sensitivity.base import Evidence, Need
from alphaq.work.workers import Workers

RUN_VALUES = 1 << 13  # weights of a run that are rounded, but eight rows at least
SLOW_RUNS = 8  # of a stack, at choices that take long to find codes for
FOLDER = "rows"


@dataclass(frozen=True, eq=False)
class StackErrors:
    """Of one stack. relative: Σ(w − ŵ)²/Σw² [choices]; deviations: the relative standard error of each. mean_square:
    of its weights."""

    relative: np.ndarray
    deviations: np.ndarray
    mean_square: float


@dataclass(frozen=True)
class _RunErrors:
    """Of one run of so many weights."""

    weights: int
    errors: SquaredErrors


def measured_by_rows(
    checkpoint: Checkpoint, request: Request, needs: Collection[Need], resources: Resources
) -> Measurements:
    """What plans of any budget may go by. Raises QuantizationError for NaN or infinity among the rows."""
    assert request.config.share is not None  # the caller has looked
    scope = Scope.of(checkpoint, request)
    with at_hand(checkpoint, resources) as (near, own):
        sample = draw_rows(near, request.config.share)
        _fetch(near, sample.whole_ranges, own, "fetch routers and norms")
        prior, unrouted = routing_uses(near, own) if "prior" in needs else (None, None)
        _fetch(near, sample.row_ranges, own, "fetch rows")
        by_stack = {
            stack: _stack_errors(runs, request.choices) for stack, runs in _measured(sample, scope, own).items()
        }
    planned = scope.planned
    found = [by_stack[stack_of(matrix)] for matrix in planned]
    weights = np.array([matrix.parameters for matrix in planned], dtype=np.int64)
    energies = weights * np.array([one.mean_square for one in found])
    evidence = Evidence(
        tuple(matrix.name for matrix in planned),
        request.choices,
        _copied(scope, planned, np.array([one.relative for one in found])) * energies[:, None],
        energies,
        weights,
        np.full(len(planned), np.nan),
        tuple(planned),
        prior=prior,
    )
    joined = {matrix.name: by_stack[stack_of(matrix)] for matrix in scope.joined}
    relative = _copied(scope, scope.joined, np.array([one.relative for one in joined.values()]))
    return Measurements(
        {},
        request.offered,
        evidence,
        deviations=np.array([one.deviations for one in found]),
        joined=dict(zip(joined, relative, strict=True)),
        joined_deviations={name: one.deviations for name, one in joined.items()},
        unrouted=unrouted,
    )


def _fetch(checkpoint: Checkpoint, ranges: Sequence[Range], resources: Resources, label: str) -> None:
    """Have at hand what is read, where it lies on a store."""
    wanted = missing(checkpoint, ranges)
    for _ in resources.wrap(fetched(checkpoint, wanted), len(wanted), label) if wanted else ():
        pass


def routing_uses(checkpoint: Checkpoint, resources: Resources) -> tuple[Mapping[Expert, ExpertUse], str | None]:
    """The routing prior; where routers and norms alone do not give one, nothing, and why."""
    if checkpoint.planned_role is not Role.EXPERT:
        return {}, None
    if not checkpoint.architecture.router_norm:
        return {}, f"the routers of {checkpoint.name} see more than a norm puts out."
    run = PassRun(checkpoint, True, None, (), resources)
    try:
        return run_passes(run, {"prior"}).found["prior"], None
    except PassError as error:
        return {}, error.reason


def sampling_error(plan: Plan, measurements: Measurements) -> float:
    """Relative standard error of a plan's loss that comes of reading few rows.

    Errors of one stack are known together, those of different stacks apart. A unit that spans stacks (gate and up, or
    a whole expert) is taken for one of the stack of its first matrix, as if all of it were known as well as that.
    """
    assert plan.table is not None and measurements.deviations is not None
    columns = {name: number for number, name in enumerate(plan.table.choices)}
    deviations = dict(zip(measurements.evidence.names, measurements.deviations, strict=True))
    deviations |= measurements.joined_deviations
    stacks = {matrix.name: stack_of(matrix) for matrix in measurements.evidence.matrices}
    sums: dict[str, float] = {}
    total = 0.0
    for unit, losses in plan.table.losses.items():
        members = plan.table.members.get(unit) or (unit,)
        column = columns[plan.choices[members[0]]]
        loss = losses[column] or 0.0
        total += loss
        stack = stacks.get(members[0], members[0])
        sums[stack] = sums.get(stack, 0.0) + loss * float(deviations[members[0]][column])
    return float(np.sqrt(sum(one * one for one in sums.values()))) / total if total else 0.0


@contextmanager
def at_hand(checkpoint: Checkpoint, resources: Resources) -> Iterator[tuple[Checkpoint, Resources]]:
    """The checkpoint with what is read of a store kept here, and processes that work on it."""
    if checkpoint.store is None or isinstance(checkpoint.store, KeepingStore):
        yield checkpoint, resources
        return
    with TemporaryDirectory(prefix="alphaq-") as scratch:
        cache = resources.cache
        near = keeping(checkpoint, (Path(scratch) if cache is None else cache.path) / FOLDER)
        given = resources.workers
        with Workers(1 if given is None or given.cluster else given.count, near) as workers:  # nodes have no rows
            yield near, replace(resources, workers=workers, device="cpu")


def _measured(sample: RowSample, scope: Scope, resources: Resources) -> dict[str, list[_RunErrors]]:
    """Errors of the runs of each stack: at choices that are quick to round to of all, at others of some. Runs that no
    choice is measured on are left out, energy and all, whatever the cache knows of them."""
    request = scope.request
    told = frozenset(choice for choice in request.choices if not choice.kept)
    rounded = told - following(told).keys()
    quick = frozenset(choice for choice in rounded if not format_of(choice).slow(choice))
    storable = {stack_of(matrix): scope.storable(matrix) & rounded for matrix in scope.matrices}
    wanted = {
        run.name: storable[stack] if number < SLOW_RUNS else storable[stack] & quick
        for stack in storable
        for number, run in enumerate(sample.runs[stack])
    }
    drawn = [(stack, run) for stack in storable for run in sample.runs[stack] if wanted[run.name]]
    runs = [run for _, run in drawn]
    quantizer = request.profile.quantizer
    sampling = Sampling(quantizer, RUN_VALUES, wanted, digest=str(QUANTIZERS[quantizer].version))
    # A device is for spectra, of which none are wanted.
    found = measure(
        sample.checkpoint, runs, Wanted(None, tuple(sorted(rounded)), sampling), replace(resources, device="cpu")
    )
    errors: dict[str, list[_RunErrors]] = {stack: [] for stack in storable}
    for (stack, run), one in zip(drawn, resources.wrap(found, len(runs), "measure rows"), strict=True):
        errors[stack].append(_RunErrors(run.parameters, one.squared_errors))
    return errors


def _stack_errors(runs: Sequence[_RunErrors], choices: Sequence[Choice]) -> StackErrors:
    """What the runs of a stack say of it. Choices at which none could be measured follow from a formula."""
    energies = np.array([run.errors.energy for run in runs])
    energy = energies.sum()
    if not energy > 0:
        return StackErrors(np.zeros(len(choices)), np.zeros(len(choices)), 0.0)
    usual = gaussian_errors(choices)
    measured = [[run.errors.expected.get(choice, np.nan) for choice in choices] for run in runs]
    unseen = _none(measured)
    follow = [one for one in between(choices, choices) if unseen[one.column] and not unseen[[one.low, one.high]].any()]
    errors = np.where(np.isfinite(usual) & unseen, energies[:, None] * usual, np.array(measured))
    own = np.array([[run.errors.deviation.get(choice, 0.0) for choice in choices] for run in runs])
    completed = of_unit(errors, own, energies, usual, follow)
    relative = completed.errors.sum(axis=0) / energy
    misses = completed.errors - relative * energies[:, None]
    # Few runs know their own spread poorly: Student's t with n − 1 degrees of freedom has this variance for n > 3.
    variance = np.square(misses).sum(axis=0) * len(runs) / max(1, len(runs) - 3) / energy**2
    among = np.sqrt(variance) / np.where(relative > 0, relative, 1.0) if len(runs) > 3 else UNSEEN * (relative > 0)
    return StackErrors(
        relative, np.hypot(among, completed.deviations), float(energy / sum(run.weights for run in runs))
    )


def _none(measured: Sequence[Sequence[float]]) -> np.ndarray:
    """Choices at which no run was measured, bool [choices]."""
    return ~np.isfinite(np.array(measured)).any(axis=0)


def _copied(scope: Scope, matrices: Sequence[MatrixRef], relative: np.ndarray) -> np.ndarray:
    """Relative errors [matrices, choices], 0 where a GGUF file has a matrix so already."""
    own = [scope.stored_as(matrix) for matrix in matrices]
    same = [[one == choice for choice in scope.request.choices] for one in own]
    return np.where(np.array(same, dtype=bool).reshape(relative.shape), 0.0, relative)
