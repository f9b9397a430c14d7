from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats

from alphaq.errors import QuantizationError
from alphaq.research.statistics import weight_statistics


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def heavy(rows: int, columns: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_t(4, (rows, columns)))


@pytest.fixture
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.parametrize("shape", [(704, 1024), (1024, 300), (40, 3000), (3000, 4), (4, 3000), (1, 7), (7, 1), (2, 2)])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_statistics_match_scipy_and_svd(shape: tuple[int, int], kind: torch.dtype) -> None:
    weight = (heavy(*shape) + 0.5).to(kind)
    found, plain = weight_statistics(weight, "x"), weight.double().numpy()
    singular = np.linalg.svd(plain, compute_uv=False)
    magnitude = np.abs(plain)
    assert found.mean_absolute == pytest.approx(magnitude.mean(), rel=1e-12)
    assert found.root_mean_square == pytest.approx(np.sqrt((plain**2).mean()), rel=1e-12)
    assert found.kurtosis == pytest.approx(stats.kurtosis(plain, axis=None, fisher=False), rel=1e-9)
    assert found.outlier == pytest.approx((magnitude.max(axis=0) / magnitude.mean(axis=0)).max(), rel=1e-12)
    assert found.stable_rank == pytest.approx((singular**2).sum() / singular[0] ** 2, rel=1e-4)


def test_stable_rank_is_accurate_where_top_singular_values_crowd() -> None:
    weight = gaussian(600, 800)
    singular = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    expected = (singular**2).sum() / singular[0] ** 2
    assert weight_statistics(weight, "x").stable_rank == pytest.approx(expected, rel=1e-5)


def test_kurtosis_of_a_gaussian_is_three() -> None:
    assert weight_statistics(gaussian(1000, 1000), "x").kurtosis == pytest.approx(3.0, abs=0.02)


def test_kurtosis_survives_a_large_mean() -> None:
    weight = heavy(300, 400) + 1e4
    expected = stats.kurtosis(weight.numpy(), axis=None, fisher=False)
    assert weight_statistics(weight, "x").kurtosis == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [2.0**-60, 1000.0, 2.0**40])
def test_ratios_do_not_depend_on_scale(scale: float) -> None:
    weight = heavy(200, 333)
    one, other = weight_statistics(weight, "x"), weight_statistics(weight * scale, "x")
    for name in ("kurtosis", "outlier"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-9)
    assert other.stable_rank == pytest.approx(one.stable_rank, rel=1e-5)
    assert other.mean_absolute == pytest.approx(one.mean_absolute * scale, rel=1e-9)
    assert other.root_mean_square == pytest.approx(one.root_mean_square * scale, rel=1e-9)


def test_smallest_numbers_have_statistics() -> None:
    found = weight_statistics(torch.full((64, 96), 2.0**-140), "x")
    assert found.root_mean_square == pytest.approx(2.0**-140, rel=1e-9)
    assert found.stable_rank == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_no_digit_depends_on_the_number_of_threads(threads: None, kind: torch.dtype) -> None:
    weight = heavy(1100, 700).to(kind)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(weight_statistics(weight, "x"))
    assert found[0] == found[1] == found[2]


def test_memory_order_does_not_matter() -> None:
    weight = heavy(128, 200).float()
    assert weight_statistics(weight.T.contiguous().T, "x") == weight_statistics(weight, "x")


def test_outlier_looks_along_input_columns() -> None:
    weight = torch.ones(10, 20)
    weight[:, 3] = 100  # a large column holds no outlier
    assert weight_statistics(weight, "x").outlier == pytest.approx(1)
    weight[4, 7] = 91  # 91 against a mean of 10
    assert weight_statistics(weight, "x").outlier == pytest.approx(9.1)


def test_dead_columns_are_no_outliers() -> None:
    weight = torch.ones(10, 20)
    weight[:, 5] = 0
    assert weight_statistics(weight, "x").outlier == pytest.approx(1)


def test_zeros_are_neutral() -> None:
    found = weight_statistics(torch.zeros(64, 96), "x")
    assert (found.kurtosis, found.outlier, found.stable_rank) == (3, 1, 1)
    assert (found.mean_absolute, found.root_mean_square) == (0, 0)


def test_matrix_without_spread_has_neutral_kurtosis() -> None:
    found = weight_statistics(torch.full((256, 300), 0.1), "x")
    assert found.kurtosis == 3
    assert found.stable_rank == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_equal_singular_values_count_as_the_rank(rank: int) -> None:
    left, right = (torch.linalg.qr(gaussian(size, rank, size))[0] for size in (300, 200))
    assert weight_statistics(left @ right.T, "x").stable_rank == pytest.approx(rank, rel=1e-4)
    assert weight_statistics(torch.eye(90), "x").stable_rank == pytest.approx(90, rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_weights_are_refused_by_name(bad: float) -> None:
    weight = gaussian(64, 64)
    weight[3, 3] = bad
    with pytest.raises(QuantizationError, match=r"layer\.7"):
        weight_statistics(weight, "layer.7")
