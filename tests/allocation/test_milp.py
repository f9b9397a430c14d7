import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from alphaq.allocation import milp
from alphaq.allocation.exact import relaxation_price, solve_exact
from alphaq.allocation.milp import SideConstraint, solve_milp
from alphaq.errors import BudgetError

LOSSES = np.tile([4.0, 1.0, 0.2], (4, 1)) * np.array([[1.0], [1.1], [1.2], [1.3]])
COSTS = np.tile([1, 2, 3], (4, 1))


def at_least(label: str, units: list[int], column: int, count: float, upper: float = np.inf) -> SideConstraint:
    """At least `count` of the units take `column`."""
    coefficients = np.zeros((len(units), 3))
    coefficients[:, column] = 1
    return SideConstraint(label, np.array(units, int), coefficients, count, upper)


def constrained_instance(seed: int) -> tuple[np.ndarray, np.ndarray, int, list[SideConstraint]]:
    """Up to two constraints, whole or fractional, over some of the units; losses and costs at three scales."""
    random = np.random.default_rng(seed)
    units, choices = int(random.integers(1, 6)), int(random.integers(2, 5))
    costs = random.integers(0, (25, 10**6, 10**10)[seed % 3], (units, choices))
    losses = random.random((units, choices)) * (1.0, 1e-12, 1e12)[seed // 3 % 3]
    constraints = []
    for label in ("first", "second")[: random.integers(0, 3)]:
        members = np.flatnonzero(random.random(units) < 0.7)
        coefficients = random.integers(-5, 20, (len(members), choices)).astype(float)
        if seed % 2:
            coefficients = random.random((len(members), choices)) * 10.0 ** random.integers(-6, 7)
        reached = coefficients[np.arange(len(members)), random.integers(0, choices, len(members))].sum()
        width = abs(reached) * random.choice([0, 0.1, 0.5])
        upper = reached + width if random.random() < 0.5 else np.inf
        constraints.append(SideConstraint(label, members, coefficients, reached - width, upper))
    low, high = int(costs.min(axis=1).sum()), int(costs.max(axis=1).sum())
    return losses, costs, int(random.integers(low, high + 1)), constraints


def test_constrained_plans_match_brute_force() -> None:
    infeasible = 0
    for seed in range(300):
        losses, costs, budget, constraints = constrained_instance(seed)
        units = np.arange(len(losses))
        plans = (np.array(plan) for plan in itertools.product(range(losses.shape[1]), repeat=len(losses)))
        feasible = (
            float(losses[units, plan].sum())
            for plan in plans
            if costs[units, plan].sum() <= budget and all(constraint.holds(plan) for constraint in constraints)
        )
        optimum = min(feasible, default=None)
        if optimum is None:
            infeasible += 1
            with pytest.raises(BudgetError, match="meets"):
                solve_milp(losses, costs, budget, constraints)
            continue
        solution = solve_milp(losses, costs, budget, constraints)
        assert solution.objective == pytest.approx(optimum, rel=1e-9, abs=0), seed
        assert solution.objective == losses[units, solution.columns].sum()
        assert solution.cost == costs[units, solution.columns].sum() <= budget
        assert all(constraint.holds(solution.columns) for constraint in constraints)
        assert 0 <= solution.objective - solution.lower_bound <= 1e-9 * solution.objective
    assert 20 < infeasible < 150


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_without_constraints_it_equals_the_exact_solver(scale: float) -> None:
    random = np.random.default_rng(0)
    bits = np.arange(2, 9)
    costs = random.integers(1000, 9000, (80, 1)) * bits + random.integers(0, 99, (80, 7))
    losses = scale * random.lognormal(0, 1, (80, 1)) * 4.0**-bits
    budget = int(costs.mean(axis=1).sum() * 0.8)
    ours, theirs = solve_milp(losses, costs, budget), solve_exact(losses, costs, budget)
    assert ours.objective == pytest.approx(theirs.objective, rel=1e-9, abs=0)
    assert ours.price == theirs.price == relaxation_price(losses, costs, budget) > 0


def test_a_constraint_binds_only_its_units() -> None:
    free = solve_milp(LOSSES, COSTS, 8)
    assert free.columns.tolist() == [1, 1, 1, 1]
    bound = solve_milp(LOSSES, COSTS, 8, [at_least("one at the top", [0, 1], column=2, count=1)])
    assert bound.columns.tolist() == [0, 2, 1, 1]
    assert bound.objective > free.objective


def test_whole_coefficients_are_checked_exactly() -> None:
    huge = SideConstraint("bytes", np.array([0, 1]), np.array([[2.0**40, 1.0], [1.0, 1.0]]), -np.inf, 2.0**40)
    assert not huge.holds(np.array([0, 0]))
    assert huge.holds(np.array([1, 0]))


def test_fractional_coefficients_may_round() -> None:
    tenths = SideConstraint("tenths", np.arange(3), np.full((3, 1), 0.1), -np.inf, 0.3)
    assert tenths.holds(np.zeros(3, int))


def test_the_constraint_that_alone_is_infeasible_is_named() -> None:
    rules = [at_least("easy", [0], 1, 1), at_least("greedy", [0, 1, 2, 3], 2, 4)]
    with pytest.raises(BudgetError, match=r"budget of 8 meets 'greedy', even alone"):
        solve_milp(LOSSES, COSTS, 8, rules)


def test_constraints_that_only_together_are_infeasible_are_all_named() -> None:
    rules = [at_least("wide", [0], 2, 1), at_least("narrow", [0], 0, 1)]
    with pytest.raises(BudgetError, match=r"meets 'wide', 'narrow' together"):
        solve_milp(LOSSES, COSTS, 8, rules)


def test_a_budget_below_the_cheapest_plan_is_an_error() -> None:
    with pytest.raises(BudgetError, match="budget of 3 is below 4"):
        solve_milp(LOSSES, COSTS, 3)


def test_no_time_and_no_plan_is_an_error() -> None:
    with pytest.raises(BudgetError, match="No plan was found within 0 s"):
        solve_milp(LOSSES, COSTS, 8, time_limit_s=0)


def answer_of(status: int, columns: list[int], bound: float | None) -> SimpleNamespace:
    return SimpleNamespace(status=status, x=np.eye(3)[columns].ravel(), mip_dual_bound=bound, message="")


@pytest.mark.parametrize("bound", [None, -np.inf, 0.0])
def test_a_plan_found_before_the_time_ran_out_has_an_honest_gap(
    monkeypatch: pytest.MonkeyPatch, bound: float | None
) -> None:
    monkeypatch.setattr(milp, "_highs", lambda *_: answer_of(1, [0, 1, 1, 1], bound))
    solution = solve_milp(LOSSES, COSTS, 8, time_limit_s=1)
    assert solution.objective == pytest.approx(7.6)
    assert solution.lower_bound == LOSSES.min(axis=1).sum()


def test_an_answer_that_misses_the_budget_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milp, "_highs", lambda *_: answer_of(0, [2, 1, 1, 1], 0.0))
    with pytest.raises(BudgetError, match="misses, by rounding, the budget of 8 by 1, rule"):
        solve_milp(LOSSES, COSTS, 8, [at_least("rule", [0], 0, 1)])


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (SideConstraint("a", np.array([0]), np.ones((2, 3)), 0, 1), "coefficients"),
        (SideConstraint("b", np.array([4]), np.ones((1, 3)), 0, 1), "unit outside 0 to 3"),
        (SideConstraint("c", np.array([0]), np.full((1, 3), np.nan), 0, 1), "NaN"),
        (SideConstraint("d", np.array([0]), np.ones((1, 3)), 2, 1), "at least 2 and at most 1"),
    ],
)
def test_a_malformed_constraint_is_named(constraint: SideConstraint, message: str) -> None:
    with pytest.raises(BudgetError, match=f"Constraint '{constraint.label}'.*{message}"):
        solve_milp(LOSSES, COSTS, 8, [constraint])


def test_importing_the_solver_does_not_load_scipys_optimizer() -> None:
    code = "import sys, alphaq.allocation.milp; print('scipy.optimize' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
