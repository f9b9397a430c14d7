"""The Gaussian bound: the closed forms, and that no plan is below it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from alphaq.allocation.bound import rate_distortion, water_filling
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import RateDistortion

Arrays = tuple[np.ndarray, np.ndarray]


def matrices(seed: int, count: int) -> Arrays:
    """Losses when left out, and weights."""
    random = np.random.default_rng(seed)
    return random.lognormal(0, 2, count), random.integers(100, 5000, count)


def scored(
    rates: np.ndarray, whole: np.ndarray, weights: np.ndarray, columns: np.ndarray, factor: float = 1.0
) -> RateDistortion | None:
    """A plan with choices on D = factor · 2^(−2R), R in bits per weight, the same for all matrices."""
    relative = np.minimum(1.0, factor * 4.0**-rates)
    choices = [Choice(1 + number % 8, (32, 64, 128)[number // 8 % 3], number >= 24) for number in range(len(rates))]
    errors = np.tile(relative, (len(whole), 1))
    nbytes = np.outer(weights, rates) / 8
    return rate_distortion(choices, whole[:, None] * relative, errors, np.ones(len(whole)), nbytes, weights, columns)


# -- water filling --------------------------------------------------------------------------------


def test_equal_matrices_share_the_bits_equally() -> None:
    assert water_filling(np.full(5, 3.0), np.full(5, 100), 5 * 100 * 2.5) == pytest.approx(5 * 3.0 * 4.0**-2.5)


def test_without_bits_everything_is_lost_and_with_many_next_to_nothing() -> None:
    whole, weights = matrices(0, 6)
    assert water_filling(whole, weights, 0.0) == pytest.approx(whole.sum())
    assert water_filling(whole, weights, 30.0 * weights.sum()) < 1e-12 * whole.sum()
    assert water_filling(np.zeros(3), np.ones(3), 10.0) == 0.0


def test_a_matrix_whose_loss_is_below_the_water_gets_no_bits() -> None:
    """The first alone takes the bits: log₂(a₁/n₁) − 2·bits/n₁ is still above log₂(a₂/n₂)."""
    whole, weights = np.array([1.0, 1e-6]), np.array([100.0, 100.0])
    assert water_filling(whole, weights, 200.0) == pytest.approx(4.0**-2.0 + 1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_the_loss_is_the_least_that_an_optimizer_finds(seed: int) -> None:
    whole, weights = matrices(seed, 4)
    bits = float(weights.sum()) * (0.2, 1.0, 2.5)[seed % 3]
    found = minimize(
        lambda rates: float(whole @ 4.0**-rates) / whole.sum(),
        np.full(4, bits / weights.sum()),
        bounds=[(0, 40)] * 4,
        constraints={"type": "eq", "fun": lambda rates: (float(weights @ rates) - bits) / weights.sum()},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    assert water_filling(whole, weights, bits) == pytest.approx(found.fun * whole.sum(), rel=1e-4)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(1, 20), st.floats(0, 8), st.integers(0, 2**16))
def test_no_rates_within_the_bits_lose_less(count: int, mean: float, seed: int) -> None:
    whole, weights = matrices(seed, count)
    rates = np.random.default_rng(seed).random(count)
    rates *= mean * weights.sum() / (weights @ rates)
    bound = water_filling(whole, weights, float(weights @ rates))
    assert bound <= float(whole @ 4.0**-rates) * (1 + 1e-9)


# -- plans ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 9), st.floats(1, 3), st.integers(0, 2**16))
def test_no_plan_of_choices_above_the_bound_is_below_it(count: int, widths: int, factor: float, seed: int) -> None:
    whole, weights = matrices(seed, count)
    random = np.random.default_rng(seed)
    found = scored(np.sort(random.random(widths) * 8), whole, weights, random.integers(0, widths, count), factor)
    assert found is not None
    assert found.times_bound is not None
    assert found.times_bound >= 1 - 1e-9
    assert 1 <= found.whole_widths <= found.times_bound * (1 + 1e-6)


def test_the_best_mix_of_fine_steps_on_the_bound_reaches_it() -> None:
    whole, weights = matrices(1, 30)
    rates = np.arange(0, 12, 1 / 16)
    bits = 3.0 * weights.sum()
    height = np.log2(whole / weights)
    levels = np.linspace(height.min() - 30, height.max(), 20_000)
    spent = [weights @ np.maximum(0, height - level) / 2 for level in levels]
    best = np.maximum(0, height - levels[int(np.argmin(np.abs(np.array(spent) - bits)))]) / 2
    found = scored(rates, whole, weights, np.abs(rates - best[:, None]).argmin(axis=1))
    assert found is not None
    assert found.times_bound == pytest.approx(1, abs=2e-3)
    assert found.whole_widths == pytest.approx(1, abs=2e-3)


def test_what_quantizers_lose_and_what_whole_widths_lose_are_told_apart() -> None:
    """Equal matrices, half of them at 2 bits and half at 4, each with 1.5 times the least error."""
    whole, weights = np.ones(40), np.full(40, 1000)
    columns = np.repeat([0, 2], 20)
    found = scored(np.array([2.0, 3.0, 4.0]), whole, weights, columns, factor=1.5)
    assert found is not None
    assert found.times_bound == pytest.approx(1.5 * (4.0**-2 + 4.0**-4) / 2 / 4.0**-3)
    assert found.whole_widths == pytest.approx((4.0**-2 + 4.0**-4) / 2 / 4.0**-3, rel=1e-3)
    even = scored(np.array([2.0, 3.0, 4.0]), whole, weights, np.full(40, 1), factor=1.5)
    assert even is not None
    assert even.times_bound == pytest.approx(1.5)
    assert even.whole_widths == pytest.approx(1, abs=1e-6)


def test_points_tell_rate_error_and_distance_from_the_bound_of_each_choice() -> None:
    whole, weights = matrices(2, 5)
    found = scored(np.array([2.0, 3.5]), whole, weights, np.array([0, 1, 0, 1, 0]), factor=1.25)
    assert found is not None
    assert found.points == {
        "1g32": (2.0, pytest.approx(1.25 / 16, rel=1e-3), 1.25),
        "2g32": (3.5, pytest.approx(1.25 / 128, rel=1e-3), 1.25),
    }


def test_losses_that_are_not_in_proportion_to_errors_have_no_bound() -> None:
    rates = np.array([1.0, 2.0, 3.0])
    errors = np.tile(4.0**-rates, (3, 1))
    losses = np.array([[3.0, 2.0, 1.0]] * 3)
    nbytes, weights = np.tile(rates * 100 / 8, (3, 1)), np.full(3, 100)
    choices = [Choice(1, 32), Choice(2, 32), Choice(3, 32)]
    assert rate_distortion(choices, losses, errors, np.ones(3), nbytes, weights, np.zeros(3, int)) is None


@pytest.mark.parametrize("kept", [False, True])
def test_one_matrix_of_one_choice_is_judged_and_no_loss_is_not(kept: bool) -> None:
    choice, error = (Choice(16), 0.0) if kept else (Choice(2, 128), 0.1)
    found = rate_distortion(
        [choice],
        np.array([[2.0 * error]]),
        np.array([[error]]),
        np.ones(1),
        np.array([[250]]),
        np.array([1000]),
        np.zeros(1, int),
    )
    if kept:
        assert found is None
    else:
        assert found is not None
        assert found.times_bound == pytest.approx(0.1 * 4.0**2)
        assert found.whole_widths == pytest.approx(1)


def test_matrices_of_zeros_and_choices_that_are_not_allowed_do_no_harm() -> None:
    rates = np.array([1.0, 2.0, 4.0])
    relative = 4.0**-rates * 1.1
    losses = np.array([3.0, 0.0, 1.0])[:, None] * relative
    losses[0, 0] = losses[2, 2] = np.nan
    energies = np.array([2.0, 0.0, 5.0])
    found = rate_distortion(
        [Choice(1, 32), Choice(2, 32), Choice(4, 32)],
        losses,
        energies[:, None] * relative,
        energies,
        np.tile(rates * 1000 / 8, (3, 1)),
        np.full(3, 1000),
        np.array([2, 0, 1]),
    )
    assert found is not None
    assert found.times_bound is not None
    assert found.times_bound > 1
    assert found.points["1g32"][0] == 1.0
