"""Groups of units may be left out in an order, beside the choices of all others, within one budget."""

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from alphaq.allocation.exact import solve_exact
from alphaq.allocation.leaving import Chains, solve_leaving
from alphaq.errors import BudgetError

PARTS = 3  # units of a group, as an expert has matrices


def instance(seed: int) -> tuple[np.ndarray, np.ndarray, int, Chains]:
    """Layers of experts, some hardly missed, and a few units that always stay."""
    random = np.random.default_rng(seed)
    layers, experts, choices = int(random.integers(1, 4)), int(random.integers(2, 6)), int(random.integers(2, 5))
    grid = np.indices((layers, experts, PARTS)).reshape(3, -1)
    fixed = int(random.integers(0, 4))
    owner = np.concatenate([grid[0], np.full(fixed, -1)])
    place = np.concatenate([grid[1], np.zeros(fixed, np.int64)])
    most = experts - int(random.integers(0, 2))  # the last of a chain may have to stay
    owner[place >= most] = -1
    place[owner < 0] = 0
    parameters = random.integers(1, 50, len(owner)) * (1, 64)[seed % 2]
    costs = parameters[:, None] * np.arange(1, 1 + choices) + random.integers(0, 3, (len(owner), choices))
    losses = random.lognormal(0, 2, len(owner))[:, None] * 4.0 ** -np.arange(choices)
    steps = random.lognormal(0, 2, (layers, most)) * random.choice([0.1, 1, 10], (layers, most))
    lost = np.concatenate([np.zeros((layers, 1)), np.cumsum(steps, axis=1)], axis=1)
    lost[random.random(lost.shape) < 0.1] = np.inf
    lost[:, 0] = 0
    saved = np.arange(most + 1) * random.integers(0, 9, (layers, 1))
    limit = (np.inf, 0.3 * float(lost[np.isfinite(lost)].sum()), 0.05 * float(lost.sum()))[seed % 3]
    budget = int(random.uniform(0.6, 1.6) * costs.min(axis=1).sum())
    return losses, costs.astype(np.int64), budget, Chains(owner, place, lost, saved, limit)


def by_highs(losses: np.ndarray, costs: np.ndarray, budget: int, chains: Chains) -> float | None:
    """The least loss, with a binary for each choice of a unit and each count of a chain."""
    units, choices = losses.shape
    layers, counts = chains.losses.shape
    closed = ~np.isfinite(chains.losses)
    weights = np.concatenate([losses.ravel(), np.where(closed, 0, chains.losses).ravel()])
    one = np.zeros((units + layers, len(weights)))
    for unit in range(units):
        one[unit, unit * choices : (unit + 1) * choices] = 1
        if (chain := chains.owner[unit]) >= 0:  # chosen, or left out
            first = units * choices + chain * counts
            one[unit, first + chains.place[unit] + 1 : first + counts] = 1
    for chain in range(layers):
        one[units + chain, units * choices + chain * counts :][:counts] = 1
    spent = np.concatenate([costs.ravel(), -chains.saved.ravel()]).astype(float)
    lost = np.concatenate([np.zeros(losses.size), np.where(closed, 0, chains.losses).ravel()])
    limits = [LinearConstraint(one, 1, 1), LinearConstraint(spent[None], -np.inf, budget)]
    if np.isfinite(chains.most):
        limits.append(LinearConstraint(lost[None], -np.inf, chains.most))
    upper = np.concatenate([np.ones(losses.size), np.where(closed, 0, 1).ravel()])
    answer = milp(weights, constraints=limits, integrality=np.ones(len(weights)), bounds=Bounds(0, upper))
    return None if answer.x is None else float(answer.fun)


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 240), marks=pytest.mark.slow)])
def test_counts_are_those_that_highs_finds(seeds: range) -> None:
    left_out, infeasible = 0, 0
    for seed in seeds:
        losses, costs, budget, chains = instance(seed)
        expected = by_highs(losses, costs, budget, chains)
        if expected is None:
            infeasible += 1
            with pytest.raises(BudgetError, match="below what any plan costs"):
                solve_leaving(losses, costs, budget, chains)
            continue
        found = solve_leaving(losses, costs, budget, chains)
        assert found.objective == pytest.approx(expected, rel=1e-6), seed
        assert found.objective * (1 - 1e-9) <= found.lower_bound <= found.objective, seed
        stays, rows = chains.stay(found.counts), np.arange(len(found.counts))
        saved = int(chains.saved[rows, found.counts].sum())
        rest = solve_exact(losses[stays], costs[stays], budget + saved)
        assert rest.objective + chains.lost(found.counts) == pytest.approx(found.objective)
        assert chains.lost(found.counts) <= chains.most
        left_out += bool(found.counts.any())
    assert left_out > len(seeds) / 4
    assert 0 < infeasible < len(seeds) / 4


def test_what_loses_nothing_at_the_widest_choice_stays_where_bytes_do_not_bind() -> None:
    losses, costs = np.array([[1.0, 0.0]] * 4), np.array([[1, 2]] * 4)
    chains = Chains(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.array([[0, 0, 0.5]] * 2), np.zeros((2, 3)), 1.0)
    assert not solve_leaving(losses, costs, 8, chains).counts.any()
    assert solve_leaving(losses, costs, 6, chains).counts.sum() == 1
