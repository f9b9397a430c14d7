import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaq.allocation.exact import solve_exact
from alphaq.nouns.plan import PlanTable
from alphaq.report.path import BudgetPath, budget_path, tables_of

Tables = tuple[np.ndarray, np.ndarray]


@st.composite
def tables(draw: st.DrawFn, most_units: int = 12) -> Tables:
    """Losses with ties and forbidden choices, and costs with ties."""
    units, choices = draw(st.integers(1, most_units)), draw(st.integers(1, 6))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    costs = generator.integers(1, draw(st.sampled_from([4, 1000])), (units, choices))
    losses = generator.integers(0, draw(st.sampled_from([3, 10**6])), (units, choices)).astype(float)
    forbidden = generator.random(losses.shape) < 0.2
    forbidden[np.arange(units), generator.integers(0, choices, units)] = False
    losses[forbidden] = np.inf
    return losses, costs


def direct(path: BudgetPath, given_tables: Tables, steps: int) -> tuple[float, int]:
    losses, costs = given_tables
    units, columns = np.arange(len(losses)), path.columns_after(steps)
    return float(losses[units, columns].sum()), int(costs[units, columns].sum())


@given(tables())
@settings(max_examples=150, deadline=None)
def test_prefix_sums_equal_direct_evaluation(made: Tables) -> None:
    path = budget_path(*made)
    for steps in range(len(path) + 1):
        loss, cost = direct(path, made, steps)
        assert path.costs[steps] == cost
        assert path.losses[steps] == pytest.approx(loss, rel=1e-12, abs=1e-9)


@given(tables())
@settings(max_examples=100, deadline=None)
def test_the_path_falls_and_its_rates_never_rise(made: Tables) -> None:
    path = budget_path(*made)
    assert (path.added > 0).all()
    assert (path.saved > 0).all()
    rates = path.saved / path.added
    assert (rates[1:] <= rates[:-1] * (1 + 1e-12)).all()


@given(tables())
@settings(max_examples=100, deadline=None)
def test_it_starts_at_the_cheapest_plan_and_ends_at_the_best_choice_of_every_unit(made: Tables) -> None:
    losses, costs = made
    path = budget_path(losses, costs)
    allowed = np.where(np.isfinite(losses), costs, 10**9)
    assert path.costs[0] == allowed.min(axis=1).sum()
    units = np.arange(len(losses))
    assert (losses[units, path.columns_after(len(path))] == losses.min(axis=1)).all()


@given(tables(most_units=4))
@settings(max_examples=60, deadline=None)
def test_every_point_is_the_best_plan_of_its_cost_by_brute_force(made: Tables) -> None:
    losses, costs = made
    path = budget_path(losses, costs)
    plans = [
        (sum(costs[unit, column] for unit, column in enumerate(columns)), losses[range(len(losses)), columns].sum())
        for columns in itertools.product(range(losses.shape[1]), repeat=len(losses))
    ]
    for cost, loss in zip(path.costs, path.losses, strict=True):
        best = min(found for spent, found in plans if spent <= cost)
        assert loss == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_an_exact_plan_lies_between_the_point_below_its_budget_and_the_one_above() -> None:
    generator = np.random.default_rng(3)
    costs = np.tile([100, 190, 310, 420, 800], (300, 1)) + generator.integers(0, 9, (300, 5))
    losses = generator.lognormal(0, 1, (300, 1)) * 4.0 ** -np.arange(1, 6) * generator.uniform(0.9, 1.1, (300, 5))
    path = budget_path(losses, costs)
    for share in (0.1, 0.37, 0.8):
        budget = int(path.costs[0] + share * (path.costs[-1] - path.costs[0]))
        steps, exact = path.steps_within(budget), solve_exact(losses, costs, budget)
        assert path.costs[steps] <= budget < path.costs[steps + 1]
        assert path.losses[steps + 1] <= exact.objective <= path.losses[steps]


def test_a_budget_outside_the_path_gives_its_nearest_end() -> None:
    path = budget_path(np.array([[4.0, 1.0]]), np.array([[10, 20]]))
    assert [path.steps_within(budget) for budget in (0, 10, 19.9, 20, 99)] == [0, 0, 0, 1, 1]


def test_a_plans_table_becomes_arrays_with_forbidden_choices_infinite() -> None:
    table = PlanTable(
        choices=("2g128", "4g128"),
        losses={"a": (2.0, 1.0), "b": (None, 3.0)},
        costs=((5, 9), (6, 10)),
        cost_of=(1, 0),
    )
    losses, costs = tables_of(table)
    assert losses.tolist() == [[2.0, 1.0], [np.inf, 3.0]]
    assert costs.tolist() == [[6, 10], [5, 9]]
    assert budget_path(losses, costs).start.tolist() == [0, 1]
