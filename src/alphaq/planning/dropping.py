"""Which experts a plan does without: measured, and only as many as pay.

Engines have one count of experts for all layers. So each count is tried: those that layers miss least are taken out,
bits of the rest are solved for the same budget, and the plan of the least loss is taken, counting what is gone by its
bound. Where layers may differ, counts and bits are solved together (leaving.py). The plan without dropping is one of
those tried, so that dropping never foretells more loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from alphaq.calibration.dropping import MOST_SHARE, Drops
from alphaq.checkpoint.families.routing import expert_groups, experts_per_token, fewest_experts
from alphaq.checkpoint.pruned import without_experts
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import BudgetError, TooSmallError
from alphaq.measuring.resources import Resources
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.plan import Dropping, Plan
from alphaq.nouns.settings import Budget
from alphaq.planning.costs import costs_of
from alphaq.planning.leaving import best_counts
from alphaq.planning.limits import problem_of
from alphaq.planning.measured import Measurements
from alphaq.planning.passes import PassRun, run_passes
from alphaq.planning.plan import make_plan
from alphaq.planning.request import Request
from alphaq.planning.scope import Scope

T = TypeVar("T")
MOST_TRIED = 16  # counts of experts


def measured_drops(checkpoint: Checkpoint, bos: bool, resources: Resources) -> Drops:
    """What layers lose without some of their experts. Raises what the pass raises."""
    found: Drops = run_passes(PassRun(checkpoint, bos, None, (), resources), {"drops"}).found["drops"]
    return found


def to_drop(checkpoint: Checkpoint, drops: Drops, experts: int) -> int:
    """How many experts each layer loses to keep so many. Raises BudgetError if it cannot."""
    count = checkpoint.architecture.experts_per_layer(checkpoint.config)
    if not 0 < count - experts <= drops.most or (count - experts) % drops.groups:
        groups = f", in steps of {drops.groups}, which is how many groups a router knows" if drops.groups > 1 else ""
        raise BudgetError(
            f"--experts {experts} is not possible: layers of {checkpoint.name} have {count} experts, of which "
            f"{count - drops.most} to {count - drops.groups} can be kept{groups}. No more than {MOST_SHARE:.0%} are "
            "dropped, and one more stays than a token goes to."
        )
    return count - experts


def plan_with_drops(checkpoint: Checkpoint, request: Request, measurements: Measurements) -> Plan:
    """The best of the plans with fewer and fewer experts, what was tried on record. Raises what `make_plan` does."""
    trial = _Trial.of(checkpoint, request, measurements)
    best = trial.own() if request.config.drop_counts == "own" else trial.equal()
    unit = next(name for name, value in request.config.budget.model_dump().items() if value is not None)
    assert best.config is not None  # it was made here
    config = best.config.model_copy(update={"budget": request.config.budget})
    return best.model_copy(update={"config": config, "budget_unit": unit})


def smallest(checkpoint: Checkpoint, request: Request) -> Checkpoint:
    """The model without as many experts as may go of each layer, whichever they are."""
    groups = expert_groups(checkpoint.architecture, checkpoint.config)
    count = checkpoint.architecture.experts_per_layer(checkpoint.config)
    least = max(
        fewest_experts(checkpoint.architecture, checkpoint.config),
        experts_per_token(checkpoint.architecture, checkpoint.config) + 1,
    )
    most = min(int(count * request.config.max_drop + 1e-9), count - least) // groups
    gone = [expert for expert in range(count) if expert % (count // groups) < most]
    return without_experts(checkpoint, dict.fromkeys(checkpoint.architecture.moe_layers(checkpoint.config), gone))


def fitting_scope(checkpoint: Checkpoint, request: Request) -> Scope:
    """What a plan is about, of a model with all experts or, where only that fits, without all that may go.

    Raises TooSmallError if neither fits, and what `problem_of` does.
    """
    scope = Scope.of(checkpoint, request)
    try:
        problem_of(scope)
    except TooSmallError as error:
        if not request.config.drop:
            raise
        left = smallest(checkpoint, request)
        scope = Scope.of(left, _in_as_many_bytes(request, costs_of(scope, None).limit, left))
        try:
            problem_of(scope)
        except TooSmallError:
            raise _still_too_small(error) from None
    return scope


def _still_too_small(error: TooSmallError) -> TooSmallError:
    return TooSmallError(
        f"{error} Without as many experts as --max-drop and --max-drop-loss allow it does not fit either: raise them, "
        "if the model may lose more."
    )


@dataclass(frozen=True)
class _Trial:
    """Plans of one request with fewer experts. most: that may go of each layer. limit: of bytes, in which bits and bits
    per weight mean the same with fewer experts. whole: the plan with all of them; why there is none, if none fits."""

    checkpoint: Checkpoint
    request: Request
    measurements: Measurements
    drops: Drops
    most: int
    limit: int
    whole: Plan | TooSmallError

    @classmethod
    def of(cls, checkpoint: Checkpoint, request: Request, measurements: Measurements) -> _Trial:
        """Raises what `make_plan` does, but for a budget that is too small."""
        measurements = measurements.of(request)
        drops = _checked(measurements)
        count = checkpoint.architecture.experts_per_layer(checkpoint.config)
        most = min(int(count * request.config.max_drop + 1e-9), drops.most)
        limit = costs_of(Scope.of(checkpoint, request), measurements.evidence).limit
        try:
            whole: Plan | TooSmallError = make_plan(checkpoint, request, measurements)
        except TooSmallError as error:
            whole = error
        return cls(checkpoint, request, measurements, drops, most - most % drops.groups, limit, whole)

    def equal(self) -> Plan:
        """As many experts gone in every layer."""
        drops, groups = self.drops, self.drops.groups
        counts = [*range(groups, self.most + 1, groups * max(1, -(-self.most // (MOST_TRIED * groups))))]
        most_loss = self.request.config.max_drop_loss
        within = [number for number in counts if drops.bound(drops.evenly(number)) <= most_loss]
        best, totals = None, dict[int, float]()
        if isinstance(self.whole, Plan):
            best, totals[0] = self._dropping(self.whole, {}), _objective(self.whole)
        for number in within:
            try:
                plan = self.without(drops.evenly(number))
            except TooSmallError:
                continue
            totals[number] = _total(plan)
            if best is None or _total(plan) < _total(best):
                best = plan
        refused = tuple(sorted(set(counts) - set(within)))
        return self._recorded(best, totals=totals, refused=refused)

    def own(self) -> Plan:
        """As many as pay in each layer."""
        drops, most_loss = self.drops, self.request.config.max_drop_loss
        counts = range(drops.groups, self.most + 1, drops.groups)
        within = {n for n in counts if any(one.bounds[n - 1] <= most_loss for one in drops.layers.values())}
        if not within:  # the same, with less to solve
            return self.equal()
        best, totals = None, dict[int, float]()
        if isinstance(self.whole, Plan):
            best, totals[0] = self._dropping(self.whole, {}), _objective(self.whole)
        solved = self._solved(best)
        if solved is None:
            return self.equal()
        plan, lower_bound = solved
        if best is None or _total(plan) < _total(best):
            best = plan
        refused = tuple(sorted(set(counts) - within))
        return self._recorded(best, totals=totals, refused=refused, lower_bound=lower_bound)

    def _solved(self, whole: Plan | None) -> tuple[Plan, float] | None:
        """The plan of the best counts, and what none loses less than; None if none is found. whole: where none go."""
        try:
            found = best_counts(self.checkpoint, self.request, self.measurements, self.drops, self.most)
            try:
                plan = self._with(found.counts, whole)
            except TooSmallError:  # by bytes of headers, which are not known before names are
                surely = best_counts(self.checkpoint, self.request, self.measurements, self.drops, self.most, True)
                plan = self._with(surely.counts, whole)
        except TooSmallError:
            return None
        return plan, found.lower_bound

    def _with(self, counts: Mapping[int, int], whole: Plan | None) -> Plan:
        if any(counts.values()):
            return self.without(counts)
        if whole is None:
            assert isinstance(self.whole, TooSmallError)
            raise self.whole
        return whole

    def without(self, counts: Mapping[int, int]) -> Plan:
        """The plan without the first so many experts of each layer's order. Raises what `make_plan` does."""
        gone = self.drops.first(counts)
        pruned = without_experts(self.checkpoint, gone, self.request.profile.uneven)
        left = without(self.measurements, self.checkpoint, pruned, self.drops.bounds(counts))
        plan = make_plan(pruned, _in_as_many_bytes(self.request, self.limit, pruned), left)
        return self._dropping(plan, counts)

    def _dropping(self, plan: Plan, counts: Mapping[int, int]) -> Plan:
        dropping = Dropping(
            experts=self.drops.first(counts),
            loss=self.drops.loss(counts),
            bound=self.drops.bound(counts),
            total=_objective(plan) + self.drops.bound(counts),
            source=self.checkpoint.fingerprint,
        )
        return plan.model_copy(update={"dropped": dropping})

    def _recorded(
        self,
        best: Plan | None,
        totals: Mapping[int, float],
        refused: tuple[int, ...],
        lower_bound: float | None = None,
    ) -> Plan:
        """The best plan, with what was tried. Raises TooSmallError if none fits."""
        if best is None:
            assert isinstance(self.whole, TooSmallError)
            raise _still_too_small(self.whole)
        assert best.dropped is not None
        rounded = {number: float(f"{total:.6g}") for number, total in totals.items()}
        told = {"totals": rounded, "refused": refused, "lower_bound": lower_bound}
        return best.model_copy(update={"dropped": best.dropped.model_copy(update=told)})


def _in_as_many_bytes(request: Request, limit: int, pruned: Checkpoint) -> Request:
    """The request for fewer experts in the bytes that the budget comes to with all of them."""
    if request.config.budget.size_bytes is not None:
        return request
    bpw = 8 * limit / sum(matrix.parameters for matrix in pruned.planned)
    return replace(request, config=request.config.model_copy(update={"budget": Budget(bpw=bpw)}))


def _objective(plan: Plan) -> float:
    assert plan.objective is not None  # methods in nats have one
    return plan.objective


def _total(plan: Plan) -> float:
    assert plan.dropped is not None and plan.dropped.total is not None  # as `_dropping` makes it
    return plan.dropped.total


def _checked(measurements: Measurements) -> Drops:
    """The measured losses of experts. Raises BudgetError where they cannot be held against those of bits."""
    if measurements.drops is None or measurements.evidence.fisher is None:
        raise BudgetError(
            "--drop weighs experts against bits in nats, which are not known of this model"
            f"{'' if measurements.unpredicted is None else f' ({measurements.unpredicted})'}. Drop --drop."
        )
    return measurements.drops


@dataclass(frozen=True)
class _Renamed:
    """Matrices that stay. rows: of the planned ones, their numbers before. names: new ones by old."""

    rows: np.ndarray
    names: Mapping[str, str]

    @classmethod
    def of(cls, whole: Checkpoint, pruned: Checkpoint, planned: Sequence[MatrixRef]) -> _Renamed:
        """From the same matrices in the same order."""
        stay = [matrix for matrix in whole.matrices if not _gone(matrix, pruned)]
        names = {before.name: after.name for before, after in zip(stay, pruned.matrices, strict=True)}
        return cls(np.array([number for number, one in enumerate(planned) if one.name in names]), names)

    def by_name(self, values: Mapping[str, T]) -> dict[str, T]:
        """Values of those that stay, by their new names."""
        return {new: values[old] for old, new in self.names.items() if old in values}


def _gone(matrix: MatrixRef, pruned: Checkpoint) -> bool:
    return matrix.role is Role.EXPERT and matrix.expert in pruned.dropped.get(matrix.layer or 0, ())


def without(
    measurements: Measurements, whole: Checkpoint, pruned: Checkpoint, bounds: Mapping[int, float]
) -> Measurements:
    """What was measured of a whole model, for the same without some experts. bounds: what those cost, by layer."""
    evidence = measurements.evidence
    stay = _Renamed.of(whole, pruned, evidence.matrices)
    matrices = tuple(pruned.planned)
    assert evidence.fisher is not None and evidence.harms is not None  # which `_checked` asks for
    return replace(
        measurements,
        spectra=stay.by_name(measurements.spectra),
        evidence=replace(
            evidence,
            names=tuple(matrix.name for matrix in matrices),
            errors=evidence.errors[stay.rows],
            energies=evidence.energies[stay.rows],
            weights=evidence.weights[stay.rows],
            alphas=evidence.alphas[stay.rows],
            matrices=matrices,
            probes={name: tuple(values[row] for row in stay.rows) for name, values in evidence.probes.items()},
            prior=None,
            synthetic=None,
            fisher=replace(evidence.fisher, matrices=stay.by_name(evidence.fisher.matrices)),
            harms=evidence.harms[stay.rows],
            plain=None if evidence.plain is None else evidence.plain[stay.rows],
        ),
        deviations=None if measurements.deviations is None else measurements.deviations[stay.rows],
        plain=None if measurements.plain is None else measurements.plain[stay.rows],
        harms=stay.by_name(measurements.harms),
        importance=stay.by_name(measurements.importance),
        dropped=dict(bounds),
    )
