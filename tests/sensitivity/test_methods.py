"""Methods on evidence made by hand: what each goes by, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphaq.calibration.traffic import Calibration, ExpertUse, MatrixUse
from alphaq.errors import BudgetError, UnknownNameError
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.research.statistics import WeightStatistics
from alphaq.sensitivity import router, signal
from alphaq.sensitivity.base import Evidence
from alphaq.sensitivity.importance import SPREAD, alpha_importance, automatic_gamma, resolved_gamma
from alphaq.sensitivity.methods import METHODS, method
from conftest import Ran  # noqa: F401 - the fixture `alphaq` returns it

LAYERS, EXPERTS, PROJECTIONS = 2, 3, ("gate", "up", "down")
CHOICES = tuple(Choice(bits, 128) for bits in (1, 2, 3, 4))
MATRICES = tuple(
    MatrixRef(f"{layer}.{expert}.{part}", (64, 128), "BF16", layer, expert, part, Role.EXPERT, "")
    for layer in range(LAYERS)
    for expert in range(EXPERTS)
    for part in PROJECTIONS
)


def use(mean_square_weight: float = 0.1, **others: float) -> ExpertUse:
    settings = {"frequency": 0.3, "mean_weight": 0.5} | others
    return ExpertUse(mean_square_weight=mean_square_weight, tokens=100, **settings)  # type: ignore[arg-type]


def seen(signal: float = 1.0, **others: float) -> MatrixUse:
    return MatrixUse(1.0, others.get("trace", 1.0), others.get("baq", 1.0), dict.fromkeys(CHOICES, 1.0), signal)


def evidence_of(**changes: object) -> Evidence:
    """Equal matrices, of which `changes` makes some differ."""
    count = len(MATRICES)
    errors = np.tile(8192 * np.array([0.36, 0.12, 0.035, 0.009]), (count, 1))
    same = Evidence(
        tuple(matrix.name for matrix in MATRICES),
        CHOICES,
        errors,
        np.full(count, 8192.0),
        np.full(count, 8192),
        np.full(count, 3.0),
        MATRICES,
        {"statistics": tuple(WeightStatistics(0.8, 1.0, 3.0, 5.0, 20.0) for _ in MATRICES)},
        {(matrix.layer or 0, matrix.expert or 0): use() for matrix in MATRICES},
        Calibration(matrices={matrix.name: seen() for matrix in MATRICES}),
    )
    return replace(same, **changes)  # type: ignore[arg-type]


def row(layer: int, expert: int, part: str = "gate") -> int:
    return [matrix.name for matrix in MATRICES].index(f"{layer}.{expert}.{part}")


def test_the_default_weighs_what_the_router_prefers() -> None:
    same = evidence_of()
    assert same.prior is not None
    preferred = evidence_of(prior=dict(same.prior) | {(1, 2): use(0.4)})
    losses = METHODS["auto"].rule(preferred)
    assert np.allclose(METHODS["auto"].rule(same), METHODS["auto"].rule(same)[0])
    # 0.4 among 0.1 and 0.1: twice the mean of its layer, the others half
    assert losses[row(1, 2)] / losses[row(1, 0)] == pytest.approx(4)
    assert losses[row(1, 2)] / losses[row(0, 0)] == pytest.approx(2)
    assert losses[row(0, 0)] == pytest.approx(losses[row(0, 2)])


@given(st.floats(1.01, 100), st.integers(0, EXPERTS - 1), st.floats(0, 3))
def test_a_preferred_expert_gets_no_fewer_bits_than_an_equal_one(times: float, expert: int, price: float) -> None:
    """At any price per byte: the choice of least loss + price · cost."""
    same = evidence_of()
    assert same.prior is not None
    losses = METHODS["auto"].rule(evidence_of(prior=dict(same.prior) | {(0, expert): use(0.1 * times)}))
    bits = (losses + price * 1000 * np.arange(1, 5)).argmin(axis=1)
    other = (expert + 1) % EXPERTS
    for part in PROJECTIONS:
        assert bits[row(0, expert, part)] >= bits[row(0, other, part)]


def test_router_prior_is_relative_to_the_layer_and_1_without_an_expert() -> None:
    prior = {(0, 0): use(0.1), (0, 1): use(0.2), (0, 2): use(0.3), (1, 0): use(0), (1, 1): use(0), (1, 2): use(0)}
    found = router.relative_use(evidence_of(prior=prior))
    assert found[[row(0, 0), row(0, 1), row(0, 2)]] == pytest.approx([0.5, 1, 1.5])
    assert found[[row(1, 0), row(1, 1)]] == pytest.approx(1)
    alone = replace(MATRICES[0], layer=None, expert=None)
    assert router.relative_use(evidence_of(matrices=(alone, *MATRICES[1:]), prior=prior))[0] == 1
    errors = evidence_of(prior=prior).errors
    assert METHODS["router"].rule(evidence_of(prior=prior)) == pytest.approx(found[:, None] * errors)


def test_signal_share_averages_over_experts_and_then_over_all() -> None:
    signals = {matrix.name: float(1 + 4 * (matrix.layer == 0) + (matrix.projection == "down")) for matrix in MATRICES}
    noisy = {name: value * (1 + 0.5 * (int(name[2]) - 1)) for name, value in signals.items()}
    for given_signals in (signals, noisy):  # experts' differences average out
        found = signal.signal_share(
            evidence_of(synthetic=Calibration(matrices={name: seen(value) for name, value in given_signals.items()}))
        )
        assert found.mean() == pytest.approx(1)
        assert found == pytest.approx(np.array(list(signals.values())) / np.mean(list(signals.values())))


def test_a_signal_of_zero_everywhere_tells_nothing_apart() -> None:
    silent = Calibration(matrices={matrix.name: seen(0.0) for matrix in MATRICES})
    assert signal.signal_share(evidence_of(synthetic=silent)).tolist() == [1.0] * len(MATRICES)


def test_the_default_is_what_it_says() -> None:
    signals = Calibration(matrices={m.name: seen(9.0 if m.layer == 0 else 1.0) for m in MATRICES})
    losses = METHODS["auto"].rule(evidence_of(synthetic=signals))
    assert losses[row(0, 0)] / losses[row(1, 0)] == pytest.approx(3)  # the root of the signal
    assert losses[0, 0] / losses[0, 1] == pytest.approx(0.36 / 0.12)
    half = evidence_of(weights=np.where(np.arange(len(MATRICES)) == 0, 4096, 8192))
    assert METHODS["auto"].rule(half)[0] == pytest.approx(METHODS["auto"].rule(half)[1] / 2)


def test_relative_errors_of_a_zero_matrix_are_zero() -> None:
    same = evidence_of()
    errors, energies = same.errors.copy(), same.energies.copy()
    errors[0], energies[0] = 0, 0
    found = replace(same, errors=errors, energies=energies)
    assert found.relative_errors[0].tolist() == [0] * 4
    assert found.relative_errors[1].tolist() == pytest.approx([0.36, 0.12, 0.035, 0.009])
    for name in ("auto", "mint", "distortion", "alphaq", "router", "kurtosis"):
        losses = METHODS[name].rule(found)
        assert np.isfinite(losses).all() and (losses[0] == 0).all()


@pytest.mark.parametrize("name", ["distortion", "alphaq", "router", "mint", "auto", "kurtosis", "outlier", "aimer"])
def test_losses_shrink_as_bits_grow_and_equal_matrices_are_equal(name: str) -> None:
    losses = METHODS[name].rule(evidence_of())
    assert losses.shape == (len(MATRICES), len(CHOICES))
    assert (np.diff(losses, axis=1) < 0).all()
    assert np.allclose(losses, losses[0])


def test_calibrated_rules_are_their_papers() -> None:
    """PMQ: φ · w^1.5 · ε, w over its sum in the layer, shared by three matrices. BAQ: c·4^(−b)."""
    experts = {(m.layer or 0, m.expert or 0): use(frequency=0.2, mean_weight=0.5) for m in MATRICES}
    experts[0, 1] = use(frequency=0.6, mean_weight=1.0)
    errors = {key: {choice: 4.0**-choice.bits for choice in CHOICES} for key in experts}
    found = evidence_of(
        calibration=Calibration(
            experts, {m.name: seen(trace=2.0 + (m.projection == "up"), baq=5.0) for m in MATRICES}, errors
        )
    )
    pmq = METHODS["pmq"].rule(found)
    assert pmq[row(0, 1)] == pytest.approx(0.6 * 0.5**1.5 * 4.0 ** -np.arange(1.0, 5) / 3)
    assert pmq[row(0, 0)] == pytest.approx(0.2 * 0.25**1.5 * 4.0 ** -np.arange(1.0, 5) / 3)
    assert METHODS["baq"].rule(found)[0] == pytest.approx(5 * 4.0 ** -np.arange(1.0, 5))
    hessian = METHODS["hessian"].rule(found)
    assert hessian[row(0, 0, "up")] == pytest.approx(1.5 * hessian[row(0, 0, "gate")])
    assert METHODS["mse-output"].rule(found) == pytest.approx(1.0)


def test_kept_matrices_lose_nothing_by_baq() -> None:
    found = evidence_of(
        choices=(*CHOICES[:3], Choice(16)), calibration=Calibration({}, {m.name: seen() for m in MATRICES})
    )
    assert METHODS["baq"].rule(found)[:, -1].tolist() == [0.0] * len(MATRICES)


def test_scores_of_the_orders() -> None:
    same = evidence_of()
    assert METHODS["uniform"].rule is None
    first = METHODS["first-layers"].rule(same)
    places = [matrix.place for matrix in same.matrices]
    assert sorted(places, key=lambda place: -first[places.index(place)]) == sorted(places)
    draws = [METHODS["random"].rule(replace(same, seed=seed)) for seed in (0, 0, 1)]
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()
    ratio = METHODS["alpha-ratio"].rule(evidence_of(alphas=np.array([np.nan, 2.0, 4.0, *[3.0] * 15])))
    assert ratio[:3].tolist() == [3.0, 2.0, 4.0]


alphas_given = st.lists(st.floats(1.5, 9), min_size=2, max_size=40).filter(lambda values: np.std(np.log(values)) > 1e-3)


@given(alphas_given, st.floats(0.1, 10))
def test_automatic_gamma_is_invariant_to_scale_and_gives_the_spread(alphas: list[float], scale: float) -> None:
    values = np.array(alphas)
    gamma = automatic_gamma(values)
    assert automatic_gamma(scale * values) == pytest.approx(gamma, rel=1e-6)
    assert np.log(alpha_importance(values, gamma)).std() == pytest.approx(SPREAD)
    assert automatic_gamma(np.append(values, np.nan)) == pytest.approx(gamma)


@pytest.mark.parametrize("alphas", [[], [3.0], [3.0, 3.0, 3.0], [np.nan, np.nan], [3.0, np.nan]])
def test_automatic_gamma_is_0_where_nothing_is_to_be_told_apart(alphas: list[float]) -> None:
    values = np.array(alphas)
    assert automatic_gamma(values) == 0
    assert (alpha_importance(values, 0.0) == 1).all()


def test_a_heavier_tail_weighs_more_and_an_undefined_one_as_the_median() -> None:
    found = alpha_importance(np.array([2.0, 3.0, 4.0, np.nan]), 2.0)
    assert found == pytest.approx([2.25, 1, 0.5625, 1])
    with pytest.raises(BudgetError, match="--gamma 1e\\+06 overflows"):
        alpha_importance(np.array([2.0, 3.0, 4.0]), 1e6)


def test_gamma_is_as_given_or_automatic() -> None:
    spread = evidence_of(alphas=np.linspace(2, 4, len(MATRICES)))
    assert resolved_gamma(replace(spread, gamma=7.0)) == 7
    assert resolved_gamma(spread) == automatic_gamma(spread.alphas)
    losses = METHODS["alphaq"].rule(replace(spread, gamma=7.0))
    assert losses == pytest.approx(alpha_importance(spread.alphas, 7.0)[:, None] * spread.errors)


def test_a_mistyped_method_is_refused_with_the_closest_name() -> None:
    with pytest.raises(UnknownNameError, match=r"--method 'alhpaq'.*Did you mean 'alphaq'.*Available: .*uniform"):
        method("alhpaq")


def test_lists_of_engines_and_methods_are_complete(alphaq) -> None:  # type: ignore[no-untyped-def]
    from alphaq.engines.profiles import ENGINES

    methods = {entry["method"]: entry for entry in alphaq("methods", "--json").json}
    assert list(methods) == list(METHODS)
    assert {name for name, entry in methods.items() if entry["needs_text"]} == {"pmq", "baq", "hessian", "mse-output"}
    engines = {entry["engine"]: entry for entry in alphaq("engines", "--json").json}
    assert list(engines) == list(ENGINES)
    assert all(entry["writes"] for entry in engines.values())
    for name, entry in engines.items():
        assert entry["choices"] == [str(choice) for choice in ENGINES[name].choices]
        assert set(entry["defaults"]) <= set(entry["choices"])
    for name in METHODS:
        assert name in alphaq("methods").out
    for name in ENGINES:
        assert name in alphaq("engines").out
