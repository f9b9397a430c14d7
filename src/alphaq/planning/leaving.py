"""How many experts each layer does without, where layers may differ: solved together with the bits of the rest.

What dropping costs is known of the order in which each layer misses its experts least (calibration/dropping.py), so
each layer has a number: the first so many of its order go.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alphaq.allocation.leaving import Chains, solve_leaving
from alphaq.allocation.problem import Problem
from alphaq.calibration.dropping import Drops
from alphaq.checkpoint.pruned import Spared
from alphaq.checkpoint.reader import Checkpoint
from alphaq.nouns.matrix import Role
from alphaq.planning.limits import open_problem
from alphaq.planning.measured import Measurements
from alphaq.planning.plan import weighed
from alphaq.planning.request import Request
from alphaq.planning.scope import Scope
from alphaq.planning.solving import losses_of

HEADER_STEP = 8  # bytes by which a tensor's entry in a header grows with its name or a number in it


@dataclass(frozen=True)
class OwnCounts:
    """counts: how many experts go, by layer. lower_bound: no plan loses less in all, whichever go in these orders."""

    counts: dict[int, int]
    lower_bound: float


def best_counts(
    checkpoint: Checkpoint, request: Request, measurements: Measurements, drops: Drops, most: int, surely: bool = False
) -> OwnCounts:
    """The best counts, of up to `most` in each layer. Raises TooSmallError if nothing fits.

    surely: of a budget for files, what goes with experts is counted as no more than really goes; else as no less.
    """
    scope = Scope.of(checkpoint, request)
    problem, _ = open_problem(scope, measurements.evidence)
    evidence, joined = weighed(scope, measurements)
    losses = losses_of(request, evidence)
    if joined is not None:
        losses = np.vstack([losses, joined])
    table = problem.allowed_only(problem.per_unit(losses))
    chains, limit = _chains(scope, problem, drops, most), problem.limit
    if request.config.budget.size_bytes is not None:
        spared = Spared.of(checkpoint)
        chains.saved[:] = _saved(checkpoint, drops, spared, most, surely)
        limit += spared.prediction
    found = solve_leaving(table, problem.unit_costs, limit, chains)
    return OwnCounts(dict(zip(drops.layers, found.counts.tolist(), strict=True)), found.lower_bound)


def _chains(scope: Scope, problem: Problem, drops: Drops, most: int) -> Chains:
    """Layers as chains of their experts; a unit is of one expert."""
    where = {
        (layer, expert): (number, place)
        for number, (layer, one) in enumerate(drops.layers.items())
        for place, expert in enumerate(one.order[:most])
    }
    owner, place = np.full(len(problem.units), -1), np.zeros(len(problem.units), np.int64)
    for matrix, unit in zip(scope.matrices, problem.owner.tolist(), strict=True):
        if matrix.role is Role.EXPERT and (found := where.get((matrix.layer or 0, matrix.expert or 0))) is not None:
            owner[unit], place[unit] = found
    lost = np.full((len(drops.layers), most + 1), np.inf)
    lost[:, 0] = 0.0
    for number, one in enumerate(drops.layers.values()):
        for count in range(drops.groups, most + 1, drops.groups):
            lost[number, count] = one.bounds[count - 1]
    return Chains(owner, place, lost, np.zeros(lost.shape, np.int64), scope.request.config.max_drop_loss)


def _saved(checkpoint: Checkpoint, drops: Drops, spared: Spared, most: int, surely: bool) -> np.ndarray:
    """Bytes of files that go with experts beside their matrices, int64 [layers, counts]; no fewer than really go, or
    `surely` no more.

    Names become shorter where a number loses a digit, as happens to no more experts than go, and so may shapes.
    """
    architecture, counts = checkpoint.architecture, np.arange(most + 1)
    digits = len(str(architecture.experts_per_layer(checkpoint.config) - 1))
    if surely:
        return np.array([counts * spared.rows[layer] for layer in drops.layers])
    names = HEADER_STEP * len(set(architecture.projections.values())) * (digits - 1) * counts
    shapes = HEADER_STEP * np.minimum(counts, 1)
    return names + np.array([counts * spared.rows[layer] + shapes * spared.tensors[layer] for layer in drops.layers])
