import itertools

import numpy as np
import pytest

from alphaq.nouns.plan import PlanTable
from alphaq.trials.exchange import Moves, Slopes, Units, best_columns, drawn_states, hull, moves_from, scaled_moves

LOSSES = (8.0, 3.0, 2.9, 1.0, 0.25)
COSTS = (1, 2, 3, 4, 6)


def units_of(count: int, forbidden: tuple[int, ...] = ()) -> Units:
    row = tuple(None if column in forbidden else loss for column, loss in enumerate(LOSSES))
    return Units.of(
        PlanTable(
            choices=("1g32", "2g32", "3g32", "4g32", "6g32"),
            losses={f"unit{number}": row for number in range(count)},
            costs=(COSTS,),
            cost_of=(0,) * count,
        )
    )


def test_neighbours_are_the_nearest_corners_that_are_allowed() -> None:
    units = units_of(1)
    assert hull(units.costs[0], units.losses[0]) == [0, 1, 3, 4]  # 3g32 saves next to nothing
    assert units.neighbours(0, 1) == (0, 3)
    assert units.neighbours(0, 2) == (1, 3)  # from a choice that is no corner itself
    assert units.neighbours(0, 4) == (3,)
    assert units_of(1, forbidden=(0, 2, 3)).neighbours(0, 1) == (4,)


def test_a_pinned_unit_has_no_neighbours() -> None:
    assert units_of(1, forbidden=(0, 1, 3, 4)).neighbours(0, 2) == ()


def test_each_neighbour_is_drawn_in_a_quarter_of_the_plans() -> None:
    units, columns = units_of(5), np.array([0, 1, 2, 3, 4])
    states = drawn_states(units, columns, 16, (0, 0))
    for unit, own in enumerate(columns):
        counts = {one: int((states[:, unit] == one).sum()) for one in units.neighbours(unit, own)}
        assert set(counts.values()) == {4}
        assert (states[:, unit] == own).sum() == 16 - sum(counts.values())
    assert np.array_equal(states, drawn_states(units, columns, 16, (0, 0)))
    assert not np.array_equal(states, drawn_states(units, columns, 16, (0, 1)))


def test_slopes_at_both_ends_tell_what_an_exchange_does_to_a_quadratic() -> None:
    units, columns = units_of(12), np.array([1, 3] * 6)
    generator = np.random.default_rng(3)
    size = 40
    root = generator.normal(size=(size, size)) / np.sqrt(size)
    hessian = root @ root.T
    errors = generator.normal(size=(*units.losses.shape, size)) * np.sqrt(np.array(LOSSES) / size)[None, :, None]
    slopes, states = Slopes(), drawn_states(units, columns, 2000, (0, 0))
    for state in states:
        gradient = hessian @ errors[np.arange(len(state)), state].sum(0)
        for unit, at in enumerate(state.tolist()):
            near = (int(columns[unit]), *units.neighbours(unit, int(columns[unit])))
            slopes.add(unit, at, {column: float(gradient @ errors[unit, column]) for column in near})
    means = np.array([errors[unit, states[:, unit]].mean(0) for unit in range(12)])
    moves = moves_from(units, columns, slopes)
    told, true = [], []
    for unit, column, change in zip(moves.units, moves.columns, moves.changes, strict=True):
        rest = means.sum(0) - means[unit]  # others were away from their own choices at times
        before, after = (rest + errors[unit, one] for one in (columns[unit], column))
        true.append(0.5 * (after @ hessian @ after - before @ hessian @ before))
        told.append(change)
    assert np.corrcoef(told, true)[0, 1] > 0.98
    assert np.sum(told) == pytest.approx(np.sum(true), rel=0.1)


def test_an_end_that_was_seen_once_tells_nothing() -> None:
    slopes = Slopes()
    for at in (0, 0, 1):
        slopes.add(0, at, {0: 1.0, 1: 3.0})
    assert slopes.change(0, 0, 1) is None
    slopes.add(0, 1, {0: 1.0, 1: 5.0})
    assert slopes.change(0, 0, 1) == pytest.approx((2.5, 0.5))
    assert slopes.change(0, 1, 0) == pytest.approx((-2.5, 0.5))


def test_what_is_known_poorly_is_drawn_to_what_losses_say() -> None:
    units, columns = units_of(8), np.full(8, 1)
    slopes = Slopes()
    generator = np.random.default_rng(0)
    for unit in range(8):
        noise = 50.0 if unit == 7 else 0.01
        for at in (0, 1, 1, 0, 3, 3):
            wide, own, narrow = -2.0 * (1 + 0.1 * unit), 0.0, 5.0
            products = {0: narrow, 1: own, 3: wide}
            slopes.add(unit, at, {one: value + noise * generator.normal() for one, value in products.items()})
    moves = moves_from(units, columns, slopes)
    raw = [slopes.change(7, 1, column) for column in (0, 3)]
    drawn = {
        int(one): change
        for unit, one, change in zip(moves.units, moves.columns, moves.changes, strict=True)
        if unit == 7
    }
    for (change, error), column in zip(raw, (0, 3), strict=True):  # type: ignore[misc]
        assert error > 5 and abs(drawn[column] - change) > 1
    assert drawn[0] > 0 > drawn[3]


@pytest.mark.filterwarnings("error")
def test_changes_next_to_nothing_stay_numbers() -> None:
    units, columns = units_of(3), np.full(3, 1)
    slopes = Slopes()
    for unit in range(3):
        for at in (0, 1, 1, 0, 3, 3):
            slopes.add(unit, at, {0: 3e-170, 1: 0.0, 3: -1e-170})
    moves = moves_from(units, columns, slopes)
    assert np.isfinite(moves.changes).all() and np.isfinite(moves.errors).all()


def test_solutions_are_the_best_within_the_budget() -> None:
    units, columns = units_of(5), np.array([1, 1, 3, 3, 4])
    generator = np.random.default_rng(1)
    found = [(unit, column) for unit, own in enumerate(columns) for column in units.neighbours(unit, int(own))]
    changes = generator.normal(size=len(found))
    moves = Moves(*map(np.array, zip(*found, strict=True)), changes, np.zeros(len(found)))
    budget = units.cost(columns)
    value = {pair: change for pair, change in zip(found, changes, strict=True)}

    def total(picked: tuple[int, ...]) -> float:
        return sum(value.get((unit, column), 0.0) for unit, column in enumerate(picked))

    options = [(int(own), *units.neighbours(unit, int(own))) for unit, own in enumerate(columns)]
    fitting = [one for one in itertools.product(*options) if units.cost(np.array(one)) <= budget]
    best = best_columns(units, columns, moves, 0.0, budget)
    assert total(tuple(best.tolist())) == pytest.approx(min(map(total, fitting)))
    assert units.cost(best) <= budget


def test_caution_leaves_out_what_is_uncertain() -> None:
    units, columns = units_of(2), np.array([3, 3])
    moves = Moves(np.array([0, 0, 1, 1]), np.array([1, 4, 1, 4]), np.array([0.1, -1.0, 0.1, -1.0]), np.full(4, 0.6))
    budget = units.cost(columns)
    assert sorted(best_columns(units, columns, moves, 0.0, budget).tolist()) == [1, 4]
    assert best_columns(units, columns, moves, 1.0, budget).tolist() == [3, 3]


def test_losses_scaled_by_group_leave_out_units_without_a_factor() -> None:
    units, columns = units_of(2), np.array([1, 1])
    moves = scaled_moves(units, columns, np.array([2.0, np.nan]))
    assert moves.units.tolist() == [0, 0] and moves.columns.tolist() == [0, 3]
    assert moves.changes.tolist() == [10.0, -4.0] and not moves.errors.any()
