"""Two budgets at once: stored bytes and a token's time."""

import numpy as np
import pytest

from alphaq.allocation.exact import solve_exact
from alphaq.allocation.milp import InfeasibleError, SideConstraint, solve_milp
from alphaq.allocation.pair import NoPairError, solve_pair
from alphaq.errors import BudgetError


def instance(seed: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray, int]:
    """Experts of which some are read, and others that every token reads; widths with losses that fall by four a bit, in
    formats that are read at rates of their own; up to seconds a token in all."""
    random = np.random.default_rng(seed)
    units, choices = int(random.integers(4, 30)), int(random.integers(2, 7))
    parameters = random.integers(1, 50, units) * (1, 64, 30_000)[seed % 3]
    costs = parameters[:, None] * np.arange(2, 2 + choices) + random.integers(0, 3, (units, choices))
    losses = random.lognormal(0, 2, units)[:, None] * 4.0 ** -np.arange(choices) * random.uniform(0.8, 1.2, costs.shape)
    shares, ns_per_byte = random.choice([0.05, 0.125, 1.0], units), random.uniform(10, 80, choices)
    times = np.ceil(np.ceil(costs * shares[:, None]) * ns_per_byte).astype(np.int64)
    budget, least = (int(one.min(axis=1).sum()) for one in (costs, times))
    budget += int(random.uniform(0.1, 0.8) * np.ptp(costs, axis=1).sum())
    alone = int(times[np.arange(units), solve_exact(losses, costs, budget).columns].sum())
    limit = least + int(random.uniform(0.5, 1.05) * (alone - least))
    return losses * (1.0, 1e-9, 1e6)[seed // 3 % 3], costs.astype(np.int64), budget, times, limit


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(20, 220), marks=pytest.mark.slow)])
def test_two_budgets_are_solved_as_highs_solves_them(seeds: range) -> None:
    binding = excluded = 0
    for seed in seeds:
        losses, costs, budget, times, limit = instance(seed)
        units = np.arange(len(losses))
        side = SideConstraint("times", units, times.astype(float), 0, limit)
        try:
            whole = solve_milp(losses, costs, budget, [side])
        except InfeasibleError:  # where what is small is slow
            with pytest.raises(NoPairError):
                solve_pair(losses, costs, budget, times, limit)
            excluded += 1
            continue
        found = solve_pair(losses, costs, budget, times, limit)
        assert found.objective == pytest.approx(whole.objective, rel=1e-9), seed
        assert found.objective - found.lower_bound <= 1e-9 * found.objective, seed
        assert found.lower_bound <= whole.objective * (1 + 1e-9)
        assert costs[units, found.columns].sum() == found.cost <= budget
        assert times[units, found.columns].sum() <= limit
        binding += found.objective > 1.0001 * max(
            solve_exact(losses, costs, budget).objective, solve_exact(losses, times, limit).objective
        )
    assert binding > len(seeds) / 3 and excluded < len(seeds) / 20  # of both budgets together, not of one


@pytest.mark.parametrize(
    ("losses", "costs", "budget", "times", "limit"),
    [
        ([[4, 3, 8], [3, 5, 3]], [[4, 8, 2], [6, 4, 6]], 7, [[7, 3, 6], [6, 4, 1]], 4),
        ([[0, 2], [3, 7], [4, 0]], [[3, 5], [7, 6], [8, 2]], 11, [[8, 1], [5, 3], [2, 6]], 7),
    ],
)
def test_prices_that_rise_without_end_prove_that_budgets_exclude_each_other(
    losses: list[list[int]], costs: list[list[int]], budget: int, times: list[list[int]], limit: int
) -> None:
    with pytest.raises(NoPairError, match="kept alone"):
        solve_pair(np.array(losses, float), np.array(costs), budget, np.array(times), limit)


def test_budgets_that_exclude_each_other_are_told_from_ones_too_small() -> None:
    losses, costs, times = np.zeros((1, 2)), np.array([[1, 5]]), np.array([[5, 1]])
    assert solve_pair(losses, costs, 5, times, 1).columns.tolist() == [1]
    with pytest.raises(NoPairError, match="kept alone"):
        solve_pair(losses, costs, 4, times, 4)
    with pytest.raises(BudgetError, match="below"):
        solve_pair(losses, costs, 9, times, 0)
