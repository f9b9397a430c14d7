import numpy as np
import pytest

from alphaq.allocation.baselines import solve_ratio, solve_uniform_mix
from alphaq.errors import BudgetError

LADDER = (2, 0, 4, 1)


def random_ladder(seed: int, units: int) -> tuple[np.ndarray, int, np.random.Generator]:
    """Costs [units, 5] with uneven steps along LADDER (column 3 is on no rung), and a budget it can meet."""
    random = np.random.default_rng(seed)
    costs = np.zeros((units, 5), np.int64)
    costs[:, LADDER] = np.cumsum(random.integers(0 if seed % 3 else 1, 50, (units, 4)), axis=1)
    totals = costs[:, LADDER].sum(axis=0)
    return costs, int(random.integers(totals[0], totals[-1] + 2)), random


def rungs_of(columns: np.ndarray) -> np.ndarray:
    return np.array([LADDER.index(column) for column in columns])


def spent(costs: np.ndarray, columns: np.ndarray) -> int:
    return int(costs[np.arange(len(columns)), columns].sum())


def test_slack_is_below_the_cheapest_remaining_lift() -> None:
    for seed in range(300):
        costs, budget, random = random_ladder(seed, seed % 40 + 1)
        order = None if seed % 2 else random.permutation(len(costs))
        for columns in (
            solve_uniform_mix(order, LADDER, costs, budget),
            solve_ratio(random.random(len(costs)), LADDER, costs, budget),
        ):
            left = budget - spent(costs, columns)
            assert left >= 0
            for unit, rung in enumerate(rungs_of(columns)):
                if rung < 3:
                    assert costs[unit, LADDER[rung + 1]] - costs[unit, LADDER[rung]] > left


def test_every_unit_has_at_least_the_widest_rung_that_fits_for_all() -> None:
    for seed in range(100):
        costs, budget, random = random_ladder(seed, 30)
        base = max(rung for rung in range(4) if costs[:, LADDER[rung]].sum() <= budget)
        assert rungs_of(solve_uniform_mix(random.permutation(30), LADDER, costs, budget)).min() >= base


def test_the_first_in_order_are_lifted() -> None:
    costs = np.tile([10, 20, 30], (6, 1))
    columns = solve_uniform_mix(np.array([4, 1, 0, 5, 3, 2]), (0, 1, 2), costs, 145)
    assert columns.tolist() == [1, 2, 1, 1, 2, 1]


def test_a_lift_that_does_not_fit_is_passed_over() -> None:
    costs = np.array([[10, 50], [10, 20], [10, 15]])
    assert solve_uniform_mix(np.arange(3), (0, 1), costs, 47).tolist() == [0, 1, 1]


def test_without_order_lifted_units_are_interleaved() -> None:
    units = 24 * 64 * 3  # layers, experts, projections
    costs = np.tile([1, 2], (units, 1))
    for lifts in (units // 8, units // 4, 5 * units // 8):
        lifted = solve_uniform_mix(None, (0, 1), costs, units + lifts)
        assert np.abs(lifted.reshape(24, -1).sum(axis=1) - lifts / 24).max() <= 2
        for period in (2, 3, 4, 6, 8, 12, 16, 24, 48, 64, 96, 192):  # projections or experts that take turns
            assert np.abs(lifted.reshape(-1, period).sum(axis=0) - lifts / period).max() <= 8


def test_the_same_call_gives_the_same_plan() -> None:
    costs, budget, _ = random_ladder(7, 100)
    first, again = (solve_uniform_mix(None, LADDER, costs, budget) for _ in range(2))
    assert (first == again).all()


def test_ratio_moves_a_quarter_up_and_a_quarter_down() -> None:
    costs = np.tile([1, 2, 3], (8, 1))
    scores = np.array([5.0, 1.0, 8.0, 2.0, 3.0, 7.0, 4.0, 6.0])
    assert solve_ratio(scores, (0, 1, 2), costs, 16).tolist() == [1, 2, 0, 2, 1, 0, 1, 1]


def test_ratio_spends_what_is_left_on_the_lowest_scores() -> None:
    costs = np.tile([1, 2, 3, 4], (8, 1))
    assert solve_ratio(np.arange(8.0), (0, 1, 2, 3), costs, 19).tolist() == [3, 3, 2, 1, 1, 1, 0, 0]


def test_ratio_undoes_the_last_ups_that_exceed_the_budget() -> None:
    costs = np.tile([10, 12, 30], (8, 1))  # a step up costs nine times what a step down frees
    columns = solve_ratio(np.arange(8.0), (0, 1, 2), costs, 8 * 12 + 15)
    assert columns.tolist() == [2, 1, 1, 1, 1, 1, 0, 0]


def test_ratio_without_a_rung_below_moves_none_down() -> None:
    costs = np.tile([10, 20], (8, 1))
    assert solve_ratio(np.arange(8.0), (0, 1), costs, 105).tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_ratio_at_the_top_of_the_ladder_stays_there() -> None:
    costs = np.tile([10, 20], (8, 1))
    assert solve_ratio(np.arange(8.0), (0, 1), costs, 160).tolist() == [1] * 8


def test_a_budget_below_the_narrowest_rung_is_an_error() -> None:
    with pytest.raises(BudgetError, match="budget of 5 is below 6"):
        solve_uniform_mix(None, (0, 1), np.array([[3, 4], [3, 4]]), 5)


@pytest.mark.parametrize(("ladder", "message"), [((), "empty"), ((1, 0), "cheaper from column 1 to 0 for unit 0")])
def test_a_ladder_that_does_not_climb_is_an_error(ladder: tuple[int, ...], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        solve_uniform_mix(None, ladder, np.array([[3, 4], [3, 4]]), 9)


def test_scores_in_place_of_an_order_are_an_error() -> None:
    with pytest.raises(ValueError, match="not a permutation of the 2 units"):
        solve_uniform_mix(np.array([0.3, 0.1]), (0, 1), np.array([[3, 4], [3, 4]]), 9)


def test_scores_that_cannot_be_ranked_are_an_error() -> None:
    with pytest.raises(BudgetError, match="NaN"):
        solve_ratio(np.array([np.nan, 0.1]), (0, 1), np.array([[3, 4], [3, 4]]), 9)


def test_a_share_beyond_half_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"share of 0\.6"):
        solve_ratio(np.arange(2.0), (0, 1), np.array([[3, 4], [3, 4]]), 9, share=0.6)
