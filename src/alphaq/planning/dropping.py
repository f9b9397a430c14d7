"""Which experts a plan does without: measured, and only as many as pay.

Engines have one count of experts for all layers. So each count is tried: those that layers miss least are taken out,
bits of the rest are solved for the same budget, and the plan of the least loss is taken, counting what is gone by its
bound. The plan without dropping is one of them, so that dropping never foretells more loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from alphaq.calibration.dropping import MOST_SHARE, Drops
from alphaq.checkpoint.pruned import without_experts
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import BudgetError
from alphaq.measuring.resources import Resources
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.plan import Dropping, Plan
from alphaq.nouns.settings import Budget
from alphaq.planning.costs import costs_of
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
    drops = _checked(measurements)
    count = checkpoint.architecture.experts_per_layer(checkpoint.config)
    most = min(int(count * request.config.max_drop + 1e-9), drops.most)
    counts = [*range(drops.groups, most + 1, drops.groups * max(1, -(-most // (MOST_TRIED * drops.groups))))]
    within = [number for number in counts if drops.bound(number) <= request.config.max_drop_loss]
    best, totals = make_plan(checkpoint, request, measurements), dict[int, float]()
    assert best.objective is not None  # methods in nats have one
    totals[0], experts = best.objective, dict[int, tuple[int, ...]]()
    limit = costs_of(Scope.of(checkpoint, request), measurements.evidence).limit
    for number in within:
        gone = drops.first(number)
        pruned = without_experts(checkpoint, gone)
        left = without(measurements, checkpoint, pruned, drops, number)
        plan = make_plan(pruned, _in_as_many_bytes(request, limit, pruned), left)
        assert plan.objective is not None and plan.config is not None
        totals[number] = plan.objective + drops.bound(number)
        if totals[number] < min(totals[other] for other in totals if other != number):
            asked = {"config": plan.config.model_copy(update={"budget": request.config.budget})}
            best, experts = plan.model_copy(update=asked | {"budget_unit": best.budget_unit}), gone
    chosen = len(next(iter(experts.values()), ()))
    dropping = Dropping(
        experts=experts,
        loss=drops.loss(chosen),
        bound=drops.bound(chosen),
        totals={number: float(f"{total:.6g}") for number, total in totals.items()},
        refused=tuple(sorted(set(counts) - set(within))),
        source=checkpoint.fingerprint,
    )
    return best.model_copy(update={"dropped": dropping})


def _in_as_many_bytes(request: Request, limit: int, pruned: Checkpoint) -> Request:
    """The request for fewer experts in the bytes that the budget comes to with all of them: bits mean other bytes."""
    if request.config.budget.size_bytes is not None:
        return request
    bpw = 8 * limit / sum(matrix.parameters for matrix in pruned.planned)
    return replace(request, config=request.config.model_copy(update={"budget": Budget(bpw=bpw)}))


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
    measurements: Measurements, whole: Checkpoint, pruned: Checkpoint, drops: Drops, number: int
) -> Measurements:
    """What was measured of a whole model, for the same without the first `number` experts of each layer's order."""
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
        dropped={layer: one.bounds[number - 1] for layer, one in drops.layers.items()},
    )
