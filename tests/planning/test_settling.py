"""Errors are measured as far as the plan depends on them: what is left out follows from what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from alphaq import planning
from alphaq.allocation.problem import Problem
from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.formats.table import format_of, parse_choice
from alphaq.measuring.resources import Resources
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import PlanInputs, make_plan, measure_for_plan, resolve
from alphaq.planning.estimates import UNSEEN, of_unit
from alphaq.planning.matrices import Survey
from alphaq.planning.samples import Samples
from alphaq.planning.scope import Scope
from alphaq.planning.settling import expected_gain, undecided
from alphaq.quantizers.base import QUANTIZERS
from alphaq.quantizers.ggml import quantize_ggml
from alphaq.work.workers import Workers
from conftest import random_model

TYPES = "IQ3_S,IQ4_XS,IQ4_NL,Q4_K,Q5_K,Q6_K,Q8_0"  # whose tables are built at once
COLUMNS = tuple(map(parse_choice, ("Q4_K", "Q5_K", "Q6_K")))


def request_of(**settings: object) -> planning.Request:
    settings = {"engine": "llama.cpp", "choices": TYPES, "method": "distortion", "budget": Budget(bits=4.0)} | settings
    return resolve(PlanConfig.model_validate(settings))


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How many weights were quantized to each type."""
    weights: Counter[str] = Counter()

    def counting(weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix:
        weights[str(choice)] += weight.numel()
        return quantize_ggml(weight, choice, name)

    monkeypatch.setitem(QUANTIZERS, "ggml", replace(QUANTIZERS["ggml"], function=counting))
    yield weights


# -- what is left out -----------------------------------------------------------------------------


def unit(random: np.random.Generator, members: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Errors [members, 3] and energies: the errors of a matrix differ from others' by 10 %, their ratios by 2 %."""
    energies = random.lognormal(0, 0.5, members)
    level = random.lognormal(0, 0.1, members)
    ratios = np.array([0.1, 0.01, 0.002]) * random.lognormal(0, 0.02, (members, 3))
    return energies[:, None] * level[:, None] * ratios, energies


def test_sums_over_a_unit_are_as_far_off_as_their_standard_errors_say() -> None:
    random, off, told = np.random.default_rng(0), [], []
    for _ in range(200):
        real, energies = unit(random)
        seen = real.copy()
        seen[32:, 0] = seen[32:, 1] = np.nan
        seen[8:, 1] = np.nan
        seen[32:, 2] = np.nan
        found = of_unit(seen, np.zeros_like(seen), energies, np.full(3, np.nan))
        off.append(found.errors.sum(axis=0) / real.sum(axis=0) - 1)
        told.append(found.deviations)
    ratio = np.sqrt(np.mean(np.square(off), axis=0)) / np.sqrt(np.mean(np.square(told), axis=0))
    assert (ratio > 0.7).all() and (ratio < 1.5).all()


def test_few_matrices_in_relation_to_another_choice_tell_more_than_alone() -> None:
    random, off = np.random.default_rng(1), []
    for _ in range(100):
        real, energies = unit(random)
        seen = real.copy()
        seen[32:], seen[8:, 1] = np.nan, np.nan
        with_leader = of_unit(seen, np.zeros_like(seen), energies, np.full(3, np.nan))
        alone = of_unit(seen[:, [1]], np.zeros((128, 1)), energies, np.full(1, np.nan))
        assert (with_leader.errors[:8, 1] == real[:8, 1]).all()
        sums = np.array([with_leader.errors[:, 1].sum(), alone.errors[:, 0].sum()])
        off.append(sums / real[:, 1].sum() - 1)
    led, by_energy = np.sqrt(np.mean(np.square(off), axis=0))
    assert led < 0.7 * by_energy


def test_a_choice_that_was_not_measured_follows_from_gaussian_weights() -> None:
    energies = np.array([1.0, 3.0])
    seen = np.column_stack([0.2 * energies, np.full(2, np.nan)])
    found = of_unit(seen, np.zeros_like(seen), energies, np.array([0.1, 0.05]))
    assert found.errors[:, 1] == pytest.approx(0.1 * energies)
    assert found.deviations.tolist() == pytest.approx([0.0, UNSEEN])


# -- what is worth knowing ------------------------------------------------------------------------


def test_the_expected_gain_is_that_of_a_simulation() -> None:
    drawn = np.random.default_rng(0).standard_normal(1 << 20)
    gaps, uncertain = np.array([0.0, 1.0, 2.0, 5.0]), np.array([1.0, 2.0, 0.5, 0.0])
    simulated = [np.maximum(0, s * drawn - g).mean() for g, s in zip(gaps, uncertain, strict=True)]
    assert expected_gain(gaps, uncertain) == pytest.approx(simulated, abs=2e-3)


def problem(units: int, costs: tuple[int, ...]) -> Problem:
    names = tuple(f"u{number}" for number in range(units))
    table = np.tile(np.array(costs, np.int64), (units, 1))
    return Problem(
        names, np.arange(units), COLUMNS, table, table >= 0, 10**9, np.zeros(units, np.int64), tuple(range(len(costs)))
    )


def test_near_ties_alone_are_undecided() -> None:
    losses = np.array([[10.0, 5.0, 1.0], [6.0, 5.0, 4.3]])  # at a price of 1 the second unit's last two differ by 0.3
    found = undecided(problem(2, (0, 1, 2)), losses, np.full((2, 3), 0.05), 1.0)
    assert found.tolist() == [[False] * 3, [True, True, True]]
    assert not undecided(problem(2, (0, 1, 2)), losses, np.zeros((2, 3)), 1.0).any()


def test_a_unit_is_as_uncertain_as_the_worst_known_of_its_matrices() -> None:
    apart = replace(problem(1, (0, 1, 2)), owner=np.array([0, 0]), costs=np.tile([0, 1, 2], (2, 1)))
    apart = replace(apart, allowed=apart.costs >= 0)
    losses, known, uncertain = np.array([[3.0, 2.5, 2.15]] * 2), np.zeros(3), np.full(3, 0.05)
    for deviations in ([known, uncertain], [uncertain, known]):
        assert undecided(apart, losses, np.array(deviations), 0.5).any()
    assert not undecided(apart, losses, np.array([known, known]), 0.5).any()


def test_what_a_bound_forbids_is_never_undecided() -> None:
    limited = problem(1, (0, 1, 2))
    limited = replace(limited, allowed=np.array([[True, True, False]]))
    found = undecided(limited, np.array([[6.0, 5.0, 4.0]]), np.full((1, 3), 0.2), 1.0)
    assert found.tolist() == [[True, True, False]]


# -- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"budget": Budget(bits=4.0)}, pytest.param({"budget": Budget(size_bytes=6_000_000)}, marks=pytest.mark.slow)],
)
def test_a_plan_loses_no_more_than_a_thousandth_by_what_was_not_measured(
    checkpoint: Checkpoint, measured: Counter[str], monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    monkeypatch.setattr(planning.samples, "FIRST_MEMBERS", 3)
    request = request_of(**settings)
    whole = measure_for_plan(checkpoint, request, settle=False)
    in_full = measured.copy()
    measured.clear()
    staged = measure_for_plan(checkpoint, request)
    slow = [str(choice) for choice in request.choices if format_of(choice).slow(choice)]
    assert sum(measured[name] for name in slow) < 0.7 * sum(in_full[name] for name in slow)
    assert all(measured[name] == in_full[name] for name in in_full.keys() - slow)
    best, made = make_plan(checkpoint, request, whole), make_plan(checkpoint, request, staged)
    columns = {str(choice): number for number, choice in enumerate(request.choices)}
    errors = dict(zip(whole.evidence.names, whole.evidence.errors, strict=True))

    def loss(choices: dict[str, str]) -> float:
        return float(sum(own[columns[choices[name]]] for name, own in errors.items()))

    assert loss(made.choices) <= 1.001 * loss(best.choices)


def test_what_is_chosen_has_been_measured(checkpoint: Checkpoint, measured: Counter[str]) -> None:
    request = request_of(choices="IQ3_S,Q8_0", budget=Budget(bits=3.5))  # nothing comes near IQ3_S
    found = measure_for_plan(checkpoint, request)
    made = make_plan(checkpoint, request, found)
    assert "IQ3_S" in set(made.choices.values()) and measured["IQ3_S"]
    assert made.sampling_error is not None and made.sampling_error < UNSEEN


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"engine": "native", "choices": None, "method": "auto", "check": False}, marks=pytest.mark.slow),
    ],
    ids=["llama.cpp", "default"],
)
def test_the_same_plan_on_any_number_of_workers(checkpoint: Checkpoint, settings: dict[str, object]) -> None:
    request, plans = request_of(**settings), []
    for count in (1, 2):
        with Workers(count, checkpoint) as workers:
            found = measure_for_plan(checkpoint, request, resources=Resources(workers))
        plans.append(make_plan(checkpoint, request, found).to_json())
    assert plans[0] == plans[1]


def test_of_a_large_matrix_few_rows_are_measured_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.samples, "SAMPLE_VALUES", 1 << 13)  # of 2¹⁴ weights
    random_model("mixtral", hidden_size=128, intermediate_size=128).save_pretrained(tmp_path)
    native = open_checkpoint(tmp_path)
    seen: Counter[str] = Counter()
    usual = QUANTIZERS["debiased"]

    def counting(weight: torch.Tensor, choice: Choice, name: str = "matrix", **more: object) -> QuantizedMatrix:
        seen[str(choice)] += weight.numel()
        return usual.function(weight, choice, name, **more)

    monkeypatch.setitem(QUANTIZERS, "debiased", replace(usual, function=counting))
    config = PlanConfig(budget=Budget(bits=3), method="distortion", choices="1g128,2g128,3g128,4g128,8g128")
    request = resolve(config)
    whole = measure_for_plan(native, request, settle=False)
    in_full = seen.copy()
    seen.clear()
    staged = measure_for_plan(native, request)
    assert seen["8g128"] < 0.3 * in_full["8g128"]  # far from what 3 bits take
    made, best = make_plan(native, request, staged), make_plan(native, request, whole)
    assert made.objective == pytest.approx(best.objective, rel=0.05)


def test_rates_around_an_undecided_fraction_are_measured_deeper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.samples, "SAMPLE_VALUES", 1 << 13)  # of 2¹⁴ weights
    random_model("mixtral", hidden_size=128, intermediate_size=128).save_pretrained(tmp_path)
    native = open_checkpoint(tmp_path)
    survey = Survey.of(
        Scope.of(native, resolve(PlanConfig(budget=Budget(bits=3), method="distortion"))), None, (), None
    )
    samples = Samples(replace(survey.planned, staged=True))
    unit = native.planned[0].name
    undecided_of = {unit: frozenset({parse_choice("t2.25")})}
    (deeper,) = samples.further(undecided_of, {})
    assert {name: {*map(str, own)} for name, own in (deeper.matrices or {}).items() if own} == {unit: {"t2", "t3"}}
    assert samples.further(undecided_of, {}) == []


def test_the_plan_goes_by_errors_of_the_importance_and_tells_those_without(checkpoint: Checkpoint) -> None:
    random = np.random.default_rng(0)
    names = [f"blk.{layer}.ffn_{part}_exps.weight" for layer in range(4) for part in ("gate", "up", "down")]
    columns = {name: random.gamma(0.5, 2.0, (8, 256)).astype(np.float32) for name in names}
    given = ImportanceMatrix("i", "0", columns)
    request = request_of(choices="Q3_K,Q4_K", imatrix="i 0")
    found = measure_for_plan(checkpoint, request, PlanInputs(imatrix=given))
    assert found.plain is not None
    weighted, plain = found.evidence.relative_errors, found.plain
    assert (weighted < 0.95 * plain).mean() > 0.9  # columns that matter are met better
    made = make_plan(checkpoint, request, found)
    column = {str(choice): number for number, choice in enumerate(request.choices)}
    for number, name in enumerate(found.evidence.names):
        assert made.expected_error[name] == pytest.approx(plain[number, column[made.choices[name]]], rel=1e-3)
    assert measure_for_plan(checkpoint, request_of(choices="Q3_K,Q4_K")).plain is None
