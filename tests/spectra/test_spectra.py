import math
from pathlib import Path

import numpy as np
import pytest
import torch

from alphaq.errors import QuantizationError, SpectrumError, StatsError
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.spectrum import Spectrum
from alphaq.spectra.eigenvalues import pooled_eigenvalues
from alphaq.spectra.farms import block_size, blocks, sampled_blocks
from alphaq.spectra.measure import read_stats, spectrum, write_stats
from alphaq.spectra.tail import hill_exponent, tail_count

GOLDEN_SAMPLE = [4, 5, 10, 19, 20, 24]


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def reference_alpha(weight: torch.Tensor, size: int) -> float:
    """The method written as plainly as possible: an SVD per block, float64."""
    pooled: list[float] = []
    for top in range(0, weight.shape[0] - size + 1, size):
        for left in range(0, weight.shape[1] - size + 1, size):
            block = weight[top : top + size, left : left + size].double().numpy()
            pooled.extend(np.linalg.svd(block, compute_uv=False) ** 2)
    ordered = sorted(pooled)
    n = len(ordered)
    k = max(1, min(n - 1, max(10, int(0.1 * n))))
    return 1 + k / sum(math.log(value / ordered[n - k - 1]) for value in ordered[n - k :])


@pytest.mark.parametrize(("rows", "columns", "size"), [(512, 640, 128), (256, 256, 64), (96, 160, 16), (640, 512, 128)])
def test_alpha_matches_plain_per_block_svd(rows: int, columns: int, size: int) -> None:
    weight = gaussian(rows, columns) * torch.rand(rows, 1).exp()
    assert block_size(rows, columns) == size
    assert spectrum(weight, "x").alpha == pytest.approx(reference_alpha(weight, size), abs=1e-4)


def test_alpha_of_a_gaussian_matrix_is_the_published_value() -> None:
    assert spectrum(gaussian(1408, 2048), "x").alpha == pytest.approx(6.34, abs=0.05)


def test_eigenvalues_match_svd() -> None:
    tiles = gaussian(256, 384).reshape(2, 128, 384)
    expected = torch.linalg.svdvals(tiles.double()).square().flatten().sort().values
    found = pooled_eigenvalues(tiles)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=float(expected[-1]) * 1e-6)


def test_hill_recovers_pareto_exponent() -> None:
    uniform = np.random.default_rng(0).random(200_000)
    for exponent in (2.0, 3.5, 6.0):  # density λ^(−α) has survival λ^(1−α)
        eigenvalues = torch.from_numpy(np.sort(uniform ** (-1 / (exponent - 1))))
        assert hill_exponent(eigenvalues) == pytest.approx(exponent, rel=0.02)


@pytest.mark.parametrize(("count", "k"), [(2, 1), (5, 4), (50, 10), (100, 10), (1000, 100), (1009, 100)])
def test_tail_count(count: int, k: int) -> None:
    assert tail_count(count) == k


def test_alpha_does_not_depend_on_scale_but_on_name_only_through_sampling() -> None:
    weight = gaussian(256, 256)
    assert spectrum(weight * 1000, "a").alpha == pytest.approx(spectrum(weight, "b").alpha, abs=1e-4)


def test_sampling_is_seeded_by_the_name() -> None:
    first, again, other = (sampled_blocks(name, 3584) for name in ("a", "a", "b"))
    assert (first == again).all()
    assert (first != other).any()
    assert len(set(first.tolist())) == 256
    assert (np.diff(first) > 0).all()


def test_sampling_is_the_same_on_every_machine() -> None:
    assert sampled_blocks("model.layers.0", 1000)[:6].tolist() == GOLDEN_SAMPLE


def test_blocks_cover_the_matrix_without_overlap() -> None:
    weight = torch.arange(256 * 256.0).reshape(256, 256)
    tiles = blocks(weight, "x")
    assert tiles.shape == (16, 64, 64)
    assert torch.equal(tiles.flatten().sort().values, weight.flatten())
    assert torch.equal(tiles[1], weight[:64, 64:128])


@pytest.mark.parametrize("shape", [(8, 8), (1, 100), (15, 2000), (40, 40)])
def test_tiny_matrices_are_used_whole(shape: tuple[int, int]) -> None:
    assert blocks(gaussian(*shape), "x").shape == (1, *shape)


def test_heavier_tail_has_smaller_alpha() -> None:
    light = gaussian(512, 512)
    heavy = light * torch.from_numpy(np.random.default_rng(0).pareto(1.5, (512, 1)) + 1).float()
    heavy_alpha, light_alpha = spectrum(heavy, "x").alpha, spectrum(light, "x").alpha
    assert heavy_alpha is not None
    assert light_alpha is not None
    assert heavy_alpha < light_alpha


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(64, 64), torch.ones(256, 256), gaussian(256, 1) @ gaussian(1, 256), torch.eye(64), torch.ones(1, 5)],
    ids=["zero", "constant", "rank one", "identity", "one row"],
)
def test_undefined_alpha_is_reported_not_nan(weight: torch.Tensor) -> None:
    found = spectrum(weight, "x")
    assert found.alpha is None
    assert found.reason
    assert math.isfinite(found.variance)


def test_one_eigenvalue_is_no_spectrum() -> None:
    with pytest.raises(SpectrumError, match="two eigenvalues"):
        hill_exponent(torch.ones(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_weights_are_refused_by_name(bad: float) -> None:
    weight = gaussian(64, 64)
    weight[3, 3] = bad
    with pytest.raises(QuantizationError, match=r"layer\.7"):
        spectrum(weight, "layer.7")


def test_variance() -> None:
    weight = gaussian(128, 64) + 3
    assert spectrum(weight, "x").variance == pytest.approx(float(weight.double().var(correction=0)), rel=1e-5)


def reference(name: str, role: Role = Role.EXPERT) -> MatrixRef:
    return MatrixRef(name, (4, 8), "BF16", 0, 0, "up", role, name)


def test_stats_round_trip_keeps_every_digit(tmp_path: Path) -> None:
    found = Spectrum(2.1234567890123456, 10, 100, 1e-300, 0.1 + 0.2, 1 / 3)
    undefined = Spectrum(None, 10, 100, 0.5, 0.5, 0.0, "rank, too low")
    write_stats(tmp_path / "s.csv", [(reference("a"), found), (reference("b"), undefined)])
    stats = read_stats(tmp_path / "s.csv")
    assert stats.spectra == {"a": found, "b": undefined}
    assert stats.parameters == {"a": 32, "b": 32}


def test_rows_that_cannot_be_planned_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("name,alpha,variance,role\na,2,1,expert\nb,,,\nc,nan,1,\nd,3,1,attention\n")
    stats = read_stats(path)
    assert set(stats.spectra) == {"a"}
    assert stats.left_out == {"b": "no alpha and no variance", "c": "no alpha", "d": "role attention, not an expert"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks the column"),
        ("name,alpha\na,1\n", "variance"),
        ("name,alpha,variance\na,x,1\n", r"line 2: alpha 'x'"),
        ("name,alpha,variance\na,inf,1\n", "finite"),
        ("name,alpha,variance\na,-1,1\n", "positive"),
        ("name,alpha,variance\na,1,-1\n", "positive"),
        ("name,alpha,variance\na,1,1\na,2,1\n", "twice"),
        ("name,alpha,variance\n,1,1\n", "empty"),
        ("name,alpha,variance\n", "no matrix"),
    ],
)
def test_bad_stats_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.csv"
    path.write_text(text)
    with pytest.raises(StatsError, match=message):
        read_stats(path)


def test_stats_from_a_spreadsheet_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("name,alpha,variance\na,2.5,0.1\n", encoding="utf-8-sig")
    assert read_stats(path).spectra["a"].alpha == 2.5


def test_binary_stats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(StatsError, match="not a CSV"):
        read_stats(tmp_path / "s.csv")


def test_numbers_of_no_matrix_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("name,alpha,variance\na,1,1e300\n")
    with pytest.raises(StatsError, match="variance '1e300' cannot come from float32 weights"):
        read_stats(path)


@pytest.mark.parametrize("cell", ["1e70", "0.5", "-4", "0"])
def test_senseless_shapes_in_stats_are_refused(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "s.csv"
    path.write_text(f"name,alpha,variance,rows,columns\na,1,1,{cell},4\n")
    with pytest.raises(StatsError, match="positive whole numbers"):
        read_stats(path)
