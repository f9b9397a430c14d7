import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, eye, kron, vstack

from alphaq.allocation.exact import solve_exact
from alphaq.allocation.problem import SOLVERS
from alphaq.errors import BudgetError

Instance = tuple[np.ndarray, np.ndarray, int]


def random_instance(seed: int, units: int, choices: int) -> Instance:
    """Convex, non-convex, tied and degenerate tables in turn."""
    random = np.random.default_rng(seed)
    costs = random.integers(0, 25, (units, choices))
    kind = seed % 5
    if kind == 0:
        losses = random.random((units, choices))
    elif kind == 1:
        losses = random.integers(0, 4, (units, choices)).astype(float)
    elif kind == 2:
        bits = np.arange(1, choices + 1)
        costs = bits * random.choice([3, 7], (units, 1))
        losses = random.lognormal(0, 2, (units, 1)) * 4.0**-bits
    elif kind == 3:
        losses = np.tile(random.random(choices).round(1), (units, 1))
        costs = np.tile(costs[0], (units, 1))
    else:
        losses = np.zeros((units, choices))
    low, high = int(costs.min(axis=1).sum()), int(costs.max(axis=1).sum())
    return losses, costs.astype(np.int64), int(random.integers(low, high + 2))


def brute_force(losses: np.ndarray, costs: np.ndarray, budget: int) -> float:
    units = range(len(losses))
    return min(
        sum(losses[i, j] for i, j in zip(units, columns, strict=True))
        for columns in itertools.product(range(losses.shape[1]), repeat=len(losses))
        if sum(costs[i, j] for i, j in zip(units, columns, strict=True)) <= budget
    )


def highs(losses: np.ndarray, costs: np.ndarray, budget: int) -> float:
    units, choices = losses.shape
    one_each = kron(eye(units), np.ones((1, choices)))
    result = milp(
        losses.ravel(),
        constraints=LinearConstraint(
            vstack([one_each, csr_matrix(costs.reshape(1, -1))]),
            np.append(np.ones(units), 0),
            np.append(np.ones(units), budget),
        ),
        integrality=np.ones(losses.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    return float(result.fun)


def check(instance: Instance, optimum: float, tolerance: float = 1e-9) -> None:
    losses, costs, budget = instance
    solution = solve_exact(losses, costs, budget)
    units = np.arange(len(losses))
    assert solution.objective == pytest.approx(optimum, abs=tolerance)
    assert solution.cost == costs[units, solution.columns].sum() <= budget
    assert solution.objective == pytest.approx(losses[units, solution.columns].sum(), abs=1e-12)
    assert solution.lower_bound <= solution.objective + 1e-12
    assert solution.objective - solution.lower_bound <= tolerance


def test_exact_solver_matches_brute_force() -> None:
    for seed in range(2000):
        random = np.random.default_rng(10_000 + seed)
        instance = random_instance(seed, int(random.integers(1, 6)), int(random.integers(1, 5)))
        check(instance, brute_force(*instance))


def test_exact_solver_matches_highs() -> None:
    for seed in range(10):
        instance = random_instance(5 * seed, 120, 6)
        check(instance, highs(*instance), 1e-6)


def test_no_upgrade_fits_the_slack() -> None:
    for seed in range(200):
        losses, costs, budget = random_instance(5 * seed, 40, 4)
        solution = solve_exact(losses, costs, budget)
        units = np.arange(len(losses))
        extra = costs - costs[units, solution.columns][:, None]
        better = losses < losses[units, solution.columns][:, None] - 1e-12
        assert not (better & (extra <= budget - solution.cost)).any()


def test_many_equal_matrices_are_solved_at_once() -> None:
    losses, costs = np.tile([[1.0, 0.3, 0.1]], (20_000, 1)), np.tile([[1, 2, 3]], (20_000, 1))
    assert solve_exact(losses, costs, 47_001).objective == pytest.approx(4599.8)


def test_the_same_table_gives_the_same_plan() -> None:
    losses, costs, budget = random_instance(0, 300, 4)
    first, again = (solve_exact(losses, costs, budget).columns for _ in range(2))
    assert (first == again).all()


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_infeasible_budget_is_an_error(solver: object) -> None:
    with pytest.raises(BudgetError, match="below"):
        solver(np.ones((2, 2)), np.array([[3, 4], [3, 4]]), 5)  # type: ignore[operator]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_no_number_is_an_error(bad: float) -> None:
    with pytest.raises(BudgetError, match="NaN or infinite"):
        solve_exact(np.array([[1.0, bad]]), np.array([[1, 2]]), 2)


def test_uniform_takes_the_widest_choice_that_fits() -> None:
    losses, costs = np.tile([3.0, 2.0, 1.0], (4, 1)), np.tile([1, 2, 3], (4, 1))
    assert SOLVERS["uniform"](losses, costs, 11).columns.tolist() == [1, 1, 1, 1]
