import numpy as np
import pytest

from alphaq.allocation import exact
from alphaq.allocation.exact import relaxation_price, solve_exact
from alphaq.allocation.milp import solve_milp
from alphaq.allocation.solution import Solution
from alphaq.errors import BudgetError

Instance = tuple[np.ndarray, np.ndarray, int]
KINDS = 8


def random_instance(seed: int, units: int, choices: int) -> Instance:
    """Convex, non-convex, tied and degenerate tables in turn, at three scales of loss; extreme budgets among others."""
    random = np.random.default_rng(seed)
    costs = random.integers(0, 25, (units, choices))
    kind = seed % KINDS
    bits = np.arange(1, choices + 1)
    if kind == 0:  # neither convex nor monotone
        losses = random.random((units, choices))
    elif kind == 1:  # ties
        losses = random.integers(0, 4, (units, choices)).astype(float)
    elif kind == 2:  # convex, two shapes
        costs = bits * random.choice([3, 7], (units, 1))
        losses = random.lognormal(0, 2, (units, 1)) * 4.0**-bits
    elif kind == 3:  # equal units
        losses = np.tile(random.random(choices).round(1), (units, 1))
        costs = np.tile(costs[0], (units, 1))
    elif kind == 4:
        losses = np.zeros((units, choices))
    elif kind == 5:  # equal costs
        losses = random.random((units, choices))
        costs = np.full((units, choices), 7)
    else:  # uneven byte steps, noise that makes some choices dominated
        costs = np.sort(random.integers(1000, 9000, (units, 1)) * bits + random.integers(0, 3000, (units, choices)))
        losses = random.lognormal(0, 1, (units, 1)) * 4.0**-bits * random.lognormal(0, 0.3, (units, choices))
    if kind == 7:  # duplicated columns; a masked cell repeats an allowed one of its unit
        allowed = np.where(random.random((units, choices)) < 0.4, random.integers(0, choices, (units, 1)), bits - 1)
        losses, costs = (np.take_along_axis(table, allowed, 1) for table in (losses, costs))
    low, high = int(costs.min(axis=1).sum()), int(costs.max(axis=1).sum())
    budget = (
        (low, high, high + 1)[seed // KINDS % 12] if seed // KINDS % 12 < 3 else int(random.integers(low, high + 1))
    )
    return losses * (1.0, 1e-12, 1e12)[seed % 3], costs.astype(np.int64), budget


def brute_force(losses: np.ndarray, costs: np.ndarray, budget: int) -> float:
    units = np.arange(len(losses))[:, None]
    columns = np.indices([losses.shape[1]] * len(losses)).reshape(len(losses), -1)
    fits = costs[units, columns].sum(axis=0) <= budget
    return float(losses[units, columns].sum(axis=0)[fits].min())


def check(instance: Instance, solution: Solution) -> None:
    """What the solution says of itself is true, and it is proven optimal."""
    losses, costs, budget = instance
    units = np.arange(len(losses))
    assert solution.cost == costs[units, solution.columns].sum() <= budget
    assert solution.objective == pytest.approx(losses[units, solution.columns].sum(), rel=1e-12, abs=0)
    assert 0 <= solution.objective - solution.lower_bound <= 1e-9 * solution.objective


def test_exact_solver_matches_brute_force() -> None:
    for seed in range(2000):
        random = np.random.default_rng(10_000 + seed)
        instance = random_instance(seed, int(random.integers(1, 6)), int(random.integers(1, 5)))
        solution = solve_exact(*instance)
        check(instance, solution)
        assert solution.objective == pytest.approx(brute_force(*instance), rel=1e-9, abs=0), seed


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_exact_solver_matches_highs(count: int) -> None:
    for seed in range(count):
        instance = random_instance(seed, 500, 15)
        ours, theirs = solve_exact(*instance), solve_milp(*instance, time_limit_s=60)
        check(instance, ours)
        assert ours.objective <= theirs.objective * (1 + 1e-9), seed
        assert theirs.lower_bound <= ours.objective * (1 + 1e-9), seed
        assert theirs.objective <= ours.objective * (1 + 1e-9) or theirs.lower_bound < theirs.objective, seed


def test_one_forbidding_loss_does_not_hide_the_others() -> None:
    random = np.random.default_rng(14)
    bits = np.arange(1, 7)
    costs = bits * random.integers(1000, 5000, (500, 1))
    losses = random.lognormal(0, 1, (500, 1)) * 4.0**-bits
    losses[:, 0] = 1e12
    check((losses, costs, 5_000_000), solve_exact(losses, costs, 5_000_000))


def subset_sum(seed: int, units: int, choices: int) -> Instance:
    """Loss proportional to cost, costs without common step: every plan that spends all is optimal, few do."""
    random = np.random.default_rng(seed)
    costs = np.sort(random.integers(1, 10**6, (units, choices)), axis=1)
    return 1.0 - costs * 1e-6, costs, int(costs.mean(axis=1).sum())


@pytest.mark.slow
def test_losses_proportional_to_uneven_costs_stay_within_memory_and_a_millionth() -> None:
    losses, costs, budget = subset_sum(0, 500, 15)
    solution = solve_exact(losses, costs, budget)
    assert solution.cost <= budget
    assert 0 <= solution.objective - solution.lower_bound <= 1e-6 * solution.objective


def test_a_search_cut_short_still_proves_an_honest_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "FRONT_LIMIT", 6)
    monkeypatch.setattr(exact, "POLISH_LIMIT", 6)
    gaps = 0
    for seed in range(300):
        losses, costs, budget = subset_sum(seed, 5, 4) if seed % 2 else random_instance(seed, 5, 4)
        solution = solve_exact(losses, costs, budget)
        optimum = brute_force(losses, costs, budget)
        assert solution.cost == costs[np.arange(5), solution.columns].sum() <= budget
        assert solution.lower_bound <= optimum * (1 + 1e-9) and optimum <= solution.objective * (1 + 1e-9)
        gaps += solution.lower_bound < solution.objective
    assert gaps > 10


def test_price_is_the_multiplier_of_the_dual() -> None:
    for seed in (2, 6, 14, 18, 22, 30):
        losses, costs, budget = random_instance(seed + 24 * KINDS, 300, 5)
        budget = int(costs.mean(axis=1).sum())
        solution = solve_exact(losses, costs, budget)
        dual = (losses + solution.price * costs).min(axis=1).sum() - solution.price * budget
        assert dual * (1 - 1e-12) <= solution.objective <= dual + np.ptp(losses, axis=1).max()
        assert solution.price == relaxation_price(losses, costs, budget) > 0
        assert solve_exact(losses, 16 * costs, 16 * budget).price == pytest.approx(solution.price / 16)


def test_price_is_zero_where_the_budget_does_not_bind() -> None:
    losses, costs, _ = random_instance(6, 20, 4)
    assert solve_exact(losses, costs, int(costs.sum())).price == 0


def test_no_upgrade_fits_the_slack() -> None:
    for seed in range(200):
        losses, costs, budget = random_instance(seed, 40, 4)
        solution = solve_exact(losses, costs, budget)
        units = np.arange(len(losses))
        extra = costs - costs[units, solution.columns][:, None]
        better = losses < losses[units, solution.columns][:, None] * (1 - 1e-12)
        assert not (better & (extra <= budget - solution.cost)).any()


def test_many_equal_matrices_are_solved_at_once() -> None:
    losses, costs = np.tile([[1.0, 0.3, 0.1]], (20_000, 1)), np.tile([[1, 2, 3]], (20_000, 1))
    assert solve_exact(losses, costs, 47_001).objective == pytest.approx(4599.8)


def test_the_same_table_gives_the_same_plan() -> None:
    losses, costs, budget = random_instance(0, 300, 4)
    first, again = (solve_exact(losses, costs, budget).columns for _ in range(2))
    assert (first == again).all()


def test_infeasible_budget_is_an_error() -> None:
    with pytest.raises(BudgetError, match="below"):
        solve_exact(np.ones((2, 2)), np.array([[3, 4], [3, 4]]), 5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_no_number_is_an_error(bad: float) -> None:
    with pytest.raises(BudgetError, match="NaN or infinite"):
        solve_exact(np.array([[1.0, bad]]), np.array([[1, 2]]), 2)
