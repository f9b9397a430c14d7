import math
from typing import get_args

import numpy as np
import pytest
import torch

from alphaq.errors import QuantizationError, SpectrumError, UnknownNameError
from alphaq.nouns.settings import Blocks, Tail
from alphaq.research.tails import MAX_CANDIDATES, variant_exponent, variant_spectrum
from alphaq.spectra.eigenvalues import whole_eigenvalues
from alphaq.spectra.measure import spectrum
from alphaq.spectra.variants import SpectrumVariant

TAILS = get_args(Tail)
VARIANTS = [SpectrumVariant(blocks, tail) for blocks in get_args(Blocks) for tail in TAILS]


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def pareto(exponent: float, count: int, seed: int = 0) -> np.ndarray:
    """Ascending eigenvalues of density λ^(−exponent) above 1, so of survival λ^(1−exponent)."""
    return np.sort(np.random.default_rng(seed).random(count) ** (-1 / (exponent - 1)))


def plain_least_distance(values: np.ndarray) -> tuple[float, int]:
    """The search written as plainly as possible: every start, no running sums."""
    found = []
    for start in range(len(values) - 1):
        tail = values[start:]
        count = len(tail)
        exponent = 1 + count / sum(math.log(value / tail[0]) for value in tail)
        distances = [abs(1 - (value / tail[0]) ** (1 - exponent) - j / count) for j, value in enumerate(tail)]
        found.append((max(distances), exponent, count))
    return min(found)[1:]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("exponent", [2.0, 3.5, 6.0])
def test_every_tail_recovers_a_pareto_exponent(tail: Tail, exponent: float) -> None:
    found, count = variant_exponent(torch.from_numpy(pareto(exponent, 32_768)), tail)
    assert abs(found - exponent) < max(5 * (exponent - 1) / math.sqrt(count), 0.01)


@pytest.mark.parametrize("tail", ["finger", "ks"])
def test_search_finds_where_a_power_law_begins(tail: Tail) -> None:
    body = np.random.default_rng(1).random(6000) * 0.9 + 0.1  # flat below 1, with its mode in ln λ at its end
    values = torch.from_numpy(np.sort(np.concatenate([body, pareto(3.0, 6000)])))
    found, count = variant_exponent(values, tail)
    assert found == pytest.approx(3.0, rel=0.05)
    assert 3000 < count < 6600


def test_ks_matches_a_plain_search_of_every_start() -> None:
    values = np.sort(np.random.default_rng(2).gamma(2.0, 1.0, 300))
    expected = plain_least_distance(values)
    assert variant_exponent(torch.from_numpy(values), "ks") == (pytest.approx(expected[0], rel=1e-9), expected[1])


def test_limiting_the_starts_changes_alpha_little() -> None:
    values = np.sort(np.concatenate([np.random.default_rng(3).random(1000), pareto(2.5, 1000)]))
    assert len(values) > 3 * MAX_CANDIDATES
    expected, _ = plain_least_distance(values)
    assert variant_exponent(torch.from_numpy(values), "ks")[0] == pytest.approx(expected, rel=0.02)


def test_finger_is_not_pulled_up_by_separated_eigenvalues() -> None:
    values = pareto(3.0, 1000)
    fingers = torch.from_numpy(np.concatenate([values, values[-1] * np.linspace(50, 60, 8)]))
    assert variant_exponent(fingers, "finger")[0] == pytest.approx(3.0, rel=0.15)


def test_median_tail_is_the_upper_half() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0])
    assert variant_exponent(values, "median") == (pytest.approx(1 + 3 / math.log(4 / 3 * 8 / 3)), 3)


@pytest.mark.parametrize("shape", [(1408, 512), (256, 256), (96, 160), (20, 30)])
def test_farms_hill_is_the_fast_path(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape) * torch.rand(shape[0], 1).exp()
    found, fast = variant_spectrum(weight, "x", SpectrumVariant()), spectrum(weight, "x")
    assert found.alpha == pytest.approx(fast.alpha, abs=1e-4)
    assert found.largest_eigenvalue == pytest.approx(fast.largest_eigenvalue, rel=1e-4)
    assert (found.tail_count, found.eigenvalue_count) == (fast.tail_count, fast.eigenvalue_count)
    assert (found.variance, found.mean_square) == (fast.variance, fast.mean_square)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_alpha_does_not_depend_on_scale(variant: SpectrumVariant) -> None:
    weight = gaussian(256, 320) * torch.from_numpy(np.random.default_rng(0).pareto(3, (256, 1)) + 1).float()
    expected = variant_spectrum(weight, "x", variant).alpha
    assert expected is not None
    for scale in (1000.0, 2.0**-40):
        assert variant_spectrum(weight * scale, "x", variant).alpha == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_alpha_of_a_gaussian_matrix_is_the_published_value() -> None:
    weight = gaussian(1408, 2048)
    assert variant_spectrum(weight, "x", SpectrumVariant("farms")).alpha == pytest.approx(6.34, abs=0.05)
    assert variant_spectrum(weight, "x", SpectrumVariant("whole")).alpha == pytest.approx(7.27, abs=0.05)


@pytest.mark.parametrize("shape", [(64, 300), (300, 64), (40, 5000), (7, 7)])
def test_whole_eigenvalues_match_svd(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape).bfloat16()
    expected = torch.linalg.svdvals(weight.double()).square().sort().values
    assert torch.allclose(whole_eigenvalues(weight), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(64, 64), torch.ones(256, 256), gaussian(256, 1) @ gaussian(1, 256), torch.eye(64), torch.ones(1, 5)],
    ids=["zero", "constant", "rank one", "identity", "one row"],
)
def test_undefined_alpha_is_reported_not_nan(weight: torch.Tensor, variant: SpectrumVariant) -> None:
    found = variant_spectrum(weight, "x", variant)
    assert found.alpha is None
    assert found.reason
    assert math.isfinite(found.variance)


@pytest.mark.parametrize("tail", TAILS)
def test_one_eigenvalue_is_no_spectrum(tail: Tail) -> None:
    with pytest.raises(SpectrumError, match="two eigenvalues"):
        variant_exponent(torch.ones(1), tail)


@pytest.mark.parametrize("tail", TAILS)
def test_two_eigenvalues_suffice(tail: Tail) -> None:
    assert variant_exponent(torch.tensor([1.0, 2.0]), tail)[0] > 1


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_weights_are_refused_by_name(bad: float, variant: SpectrumVariant) -> None:
    weight = gaussian(64, 64)
    weight[3, 3] = bad
    with pytest.raises(QuantizationError, match=r"layer\.7"):
        variant_spectrum(weight, "layer.7", variant)


def test_variants_have_stable_keys() -> None:
    assert str(SpectrumVariant()) == "farms-hill"
    assert [str(variant) for variant in VARIANTS[-2:]] == ["whole-finger", "whole-ks"]
    assert len({variant: str(variant) for variant in VARIANTS}) == 8


def test_unknown_variant_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'median'"):
        SpectrumVariant("farms", "medain")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="farms, whole"):
        SpectrumVariant("farm")  # type: ignore[arg-type]
