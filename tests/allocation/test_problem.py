"""Pins and bounds as masked tables: whatever a solver picks, only what is allowed comes back."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alphaq.allocation.problem import (
    Problem,
    layer_budgets,
    solve_experts,
    solve_losses,
    solve_order,
    solve_shares,
)
from alphaq.errors import BudgetError
from alphaq.nouns.choice import Choice

CHOICES = tuple(Choice(bits, 128) for bits in (1, 2, 3, 4))


def random_problem(seed: int, matrices: int, units: int, masked: float) -> tuple[Problem, np.ndarray]:
    """Matrices in units of any size, a random mask that leaves every unit a choice, and losses."""
    random = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(units), random.integers(0, units, matrices - units)])
    costs = np.cumsum(random.integers(1, 9, (matrices, len(CHOICES))), axis=1)
    allowed = random.random((matrices, len(CHOICES))) >= masked
    allowed[np.arange(matrices), random.integers(0, len(CHOICES), units)[owner]] = True
    problem = Problem(
        tuple(f"unit {number}" for number in range(units)),
        owner,
        CHOICES,
        costs,
        allowed,
        0,
        np.arange(units) % 2,
        tuple(range(len(CHOICES))),
    )
    least, most = problem.unit_costs.min(axis=1).sum(), problem.unit_costs.max(axis=1).sum()
    return replace(problem, limit=int(random.integers(least, most + 1))), random.random((matrices, len(CHOICES)))


def cost_of(problem: Problem, columns: np.ndarray) -> int:
    return int(problem.costs[np.arange(len(columns)), columns].sum())


def brute_force(problem: Problem, losses: np.ndarray) -> float:
    """Least loss over plans of allowed choices only, from the tables as given."""
    best = np.inf
    for columns in itertools.product(range(len(CHOICES)), repeat=len(problem.units)):
        chosen = np.array(columns)[problem.owner]
        rows = np.arange(len(chosen))
        if problem.allowed[rows, chosen].all() and cost_of(problem, chosen) <= problem.limit:
            best = min(best, float(losses[rows, chosen].sum()))
    return best


instances = st.builds(
    random_problem,
    seed=st.integers(0, 2**32 - 1),
    matrices=st.integers(5, 9),
    units=st.integers(1, 5),
    masked=st.sampled_from((0.0, 0.2, 0.5, 0.9)),
)


@settings(max_examples=150, deadline=None)
@given(instances)
def test_what_comes_back_is_allowed_and_best_among_what_is(instance: tuple[Problem, np.ndarray]) -> None:
    problem, losses = instance
    solution = solve_losses(problem, losses)
    chosen = problem.chosen(solution.columns)
    rows = np.arange(len(chosen))
    assert problem.allowed[rows, chosen].all()
    assert all(len(set(chosen[problem.owner == unit].tolist())) == 1 for unit in range(len(problem.units)))
    assert solution.cost == cost_of(problem, chosen) <= problem.limit
    assert solution.objective == pytest.approx(losses[rows, chosen].sum())
    assert solution.objective == pytest.approx(brute_force(problem, losses))


@settings(max_examples=100, deadline=None)
@given(instances)
def test_tables_hold_only_what_is_allowed(instance: tuple[Problem, np.ndarray]) -> None:
    problem, losses = instance
    totals = problem.per_unit(losses)
    shown = problem.allowed_only(totals)
    assert (shown[problem.unit_allowed] == totals[problem.unit_allowed]).all()
    for unit, columns in enumerate(problem.source):
        assert problem.unit_allowed[unit, columns].all()
        assert (shown[unit] == totals[unit, columns]).all()
        assert set(columns.tolist()) == set(np.flatnonzero(problem.unit_allowed[unit]).tolist())


@settings(max_examples=150, deadline=None)
@given(instances, st.sampled_from(("spread", "order", "shares")))
def test_orders_respect_every_mask(instance: tuple[Problem, np.ndarray], kind: str) -> None:
    problem, losses = instance
    scores = losses[:, 0]
    # An order begins with one rung for all, so that must fit.
    assume(problem.unit_costs[:, 0].sum() <= problem.limit)
    if kind == "shares":
        solution = solve_shares(problem, scores, losses)
    else:
        solution = solve_order(problem, None if kind == "spread" else scores, losses)
    chosen = problem.chosen(solution.columns)
    assert problem.allowed[np.arange(len(chosen)), chosen].all()
    assert solution.cost == cost_of(problem, chosen) <= problem.limit
    assert solution.objective == pytest.approx(losses[np.arange(len(chosen)), chosen].sum())
    assert solution.lower_bound == -np.inf


def plain(units: int, matrices_each: int = 1, limit: int = 0, layers: int = 1) -> Problem:
    owner = np.repeat(np.arange(units), matrices_each)
    return Problem(
        tuple(f"unit {number}" for number in range(units)),
        owner,
        CHOICES,
        np.tile([10, 20, 30, 40], (len(owner), 1)),
        np.ones((len(owner), len(CHOICES)), bool),
        limit,
        np.arange(units) * layers // units,
        (0, 1, 2, 3),
    )


def test_a_ladder_bounded_from_above_does_not_get_cheaper() -> None:
    problem = plain(4, limit=130)
    problem.allowed[0, 2:] = False
    assert problem.unit_costs[0].tolist() == [10, 20, 20, 20]
    chosen = problem.chosen(solve_order(problem, None, np.ones((4, 4))).columns)
    assert chosen[0] == 1
    assert cost_of(problem, chosen) == 130


def test_the_mean_score_of_a_unit_ranks_it() -> None:
    problem = plain(3, 2, limit=140)
    solution = solve_order(problem, np.array([9.0, 0.0, 5.0, 5.0, 1.0, 1.0]), np.ones((6, 4)))
    assert solution.columns.tolist() == [1, 2, 1]


def test_a_unit_without_choice_is_named_with_the_remedies() -> None:
    problem = plain(3, 2)
    problem.allowed[2, [0, 1]] = False
    problem.allowed[3, [2, 3]] = False
    with pytest.raises(BudgetError, match=r"No choice is left for 'unit 1': pins, bounds.*relax one of them"):
        _ = problem.unit_allowed
    problem.allowed[5] = False
    with pytest.raises(BudgetError, match=r"'unit 1' and 1 more"):
        _ = replace(problem).unit_allowed


def test_a_limit_below_the_cheapest_plan_is_an_error() -> None:
    with pytest.raises(BudgetError, match=r"A budget of 2 pies is below the least these choices can reach, 3 pies\."):
        plain(3, limit=29).check("2 pies", "3 pies")
    plain(3, limit=30).check("3 pies", "3 pies")


def test_a_loss_that_is_no_number_is_named() -> None:
    losses = np.ones((3, 4))
    losses[1, 2] = np.nan
    with pytest.raises(BudgetError, match=r"The loss of 'unit 1' is NaN or infinite.*--gamma"):
        solve_losses(plain(3, limit=90), losses)


def test_layers_share_the_limit_by_their_weight() -> None:
    problem = plain(4, limit=81, layers=2)
    heavy = replace(problem, costs=problem.costs * np.array([[1], [1], [3], [3]]), limit=160)
    assert [budget.upper for budget in layer_budgets(problem)] == [40, 40]
    assert [budget.upper for budget in layer_budgets(heavy)] == [40, 120]
    assert [budget.upper for budget in layer_budgets(replace(problem, ladder=()))] == [40, 40]
    losses = np.array([[100.0, 50, 25, 12]] * 2 + [[1.0, 0.5, 0.25, 0.12]] * 2)
    assert solve_losses(problem, losses).columns.tolist() == [2, 2, 0, 0]
    assert solve_losses(problem, losses, per_layer=True).columns.tolist() == [1, 1, 1, 1]


def experts_of(problem: Problem) -> list[str]:
    """Three matrices to an expert."""
    return [f"expert {number // 3}" for number in range(len(problem.owner))]


def test_experts_take_one_choice_and_every_layer_has_one_at_3_and_one_at_2_bits() -> None:
    problem = plain(24, limit=24 * 25, layers=2)
    losses = np.random.default_rng(0).random((24, 1)) * 4.0 ** -np.arange(4)
    columns = solve_experts(problem, losses, experts_of(problem)).columns.reshape(2, 4, 3)
    assert (columns == columns[:, :, :1]).all()
    for layer in columns[:, :, 0]:
        assert {1, 2} <= set(layer.tolist())
        assert (layer + 1).sum() <= 10


def test_experts_are_as_good_as_brute_force() -> None:
    problem = plain(12, limit=12 * 25)
    for seed in range(20):
        losses = np.random.default_rng(seed).random((12, 4)) * 4.0 ** -np.arange(4)
        per_expert = losses.reshape(4, 3, 4).sum(axis=1)
        best = min(
            per_expert[np.arange(4), list(columns)].sum()
            for columns in itertools.product(range(4), repeat=4)
            if {1, 2} <= set(columns) and sum(columns) + 4 <= 10
        )
        assert solve_experts(problem, losses, experts_of(problem)).objective == pytest.approx(best)


@pytest.mark.parametrize("limit", [12 * 20, 12 * 30, 12 * 15, 12 * 37])
def test_no_expert_is_forced_where_the_budget_is_not_between_2_and_3_bits(limit: int) -> None:
    problem = plain(12, limit=limit)
    losses = np.tile(4.0 ** -np.arange(4), (12, 1))
    solution = solve_experts(problem, losses, experts_of(problem))
    assert solution.cost <= limit
    assert solution.cost > limit - 30


def test_an_expert_pinned_to_a_choice_beside_the_ladder_keeps_it() -> None:
    problem = replace(plain(12, limit=12 * 25), ladder=(0, 1, 2))
    problem.allowed[:, 3] = False
    problem.allowed[:3] = [False, False, False, True]
    losses = np.tile(4.0 ** -np.arange(4), (12, 1))
    solution = solve_experts(problem, losses, experts_of(problem))
    chosen = problem.chosen(solution.columns)
    assert chosen[:3].tolist() == [3, 3, 3]
    assert chosen[3:].max() <= 2
    problem.allowed[0] = [True, False, False, False]
    with pytest.raises(BudgetError, match="No choice is left for 'expert 0'"):
        solve_experts(replace(problem), losses, experts_of(problem))


def test_units_that_span_experts_are_refused() -> None:
    with pytest.raises(BudgetError, match="pmq chooses per expert"):
        solve_experts(plain(2, 3, 999), np.ones((6, 4)), ["a", "b"] * 3)
