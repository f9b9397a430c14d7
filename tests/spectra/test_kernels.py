import math
from pathlib import Path

import numpy as np
import pytest
import torch

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import DeviceError, QuantizationError
from alphaq.simd.sums import squared_distance, squared_norm, squares_by_row, sums
from alphaq.spectra.device import device_spectra
from alphaq.spectra.eigenvalues import largest_eigenvalues, pooled_eigenvalues
from alphaq.spectra.farms import blocks
from alphaq.spectra.measure import spectrum, streamed_spectrum
from alphaq.spectra.tail import hill_exponent

SHAPES = [(64, 64), (100, 130), (256, 256), (300, 700), (512, 640), (8, 64), (40, 24)]
LARGE = [(768, 2048), (2304, 2304)]  # the second has more blocks than are sampled
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def heavy(rows: int, columns: int, tail: float = 3.0, seed: int = 0) -> torch.Tensor:
    """Gaussian entries under heavy-tailed row scales."""
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.normal(size=(rows, columns)) * (random.pareto(tail, (rows, 1)) + 0.1) * 0.02).float()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, dtype) for shape in SHAPES for dtype in DTYPES), *((shape, torch.bfloat16) for shape in LARGE)],
    ids=str,
)
def test_kernel_agrees_with_the_reference_in_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = heavy(*shape).to(dtype)
    largest, count = largest_eigenvalues(weight, "layer.1", squared_norm(weight) / weight.numel())
    reference = pooled_eigenvalues(blocks(weight, "layer.1").double())
    assert count == len(reference)
    assert torch.allclose(largest, reference[-len(largest) :], rtol=1e-5, atol=0)
    assert spectrum(weight, "layer.1").alpha == pytest.approx(hill_exponent(reference), abs=1e-4)


@pytest.mark.parametrize("factor", [1e-18, 1e-6, 1e12])
def test_scale_does_not_matter(factor: float) -> None:
    weight = heavy(256, 512)
    found, scaled = spectrum(weight, "x"), spectrum(weight * factor, "x")
    assert scaled.alpha == pytest.approx(found.alpha, abs=1e-4)
    assert math.sqrt(scaled.largest_eigenvalue) == pytest.approx(math.sqrt(found.largest_eigenvalue) * factor, rel=1e-5)


def test_equal_eigenvalues_have_no_tail() -> None:
    found = spectrum(torch.eye(64).repeat(4, 4), "x")
    assert found.alpha is None
    assert "equal" in found.reason or "rank" in found.reason


def test_rarer_float_types_are_measured_as_float32() -> None:
    """A router or head may be stored so; experts may not."""
    weight = heavy(256, 256)
    assert spectrum(weight.double(), "x") == spectrum(weight, "x")


def test_zeros_have_no_tail() -> None:
    found = spectrum(torch.zeros(256, 256), "x")
    assert found.alpha is None
    assert found.largest_eigenvalue == 0


def test_rank_one_has_no_tail() -> None:
    weight = torch.outer(torch.linspace(1, 2, 512), torch.linspace(1, 3, 512))
    assert "rank is too low" in spectrum(weight, "x").reason


@pytest.mark.parametrize("noise", [1e-9, 1e-10, 3e-11, 1e-11, 1e-13, 0.0])
def test_one_huge_weight_over_tiny_ones_is_measured_safely(noise: float) -> None:
    """The other blocks' squares leave the range of float32; that must neither crash nor invent eigenvalues."""
    weight = torch.randn(512, 640, generator=torch.Generator().manual_seed(0)) * noise
    weight[3, 5] = 1.0
    largest, _ = largest_eigenvalues(weight, "x", squared_norm(weight) / weight.numel())
    assert torch.isfinite(largest).all()
    assert float(largest[-1]) == pytest.approx(1.0, rel=1e-5)
    assert float(largest[-2]) < 1e-6


def test_few_dominant_blocks_are_found_in_full() -> None:
    """Nearly the whole tail lies in two of sixty-four blocks."""
    weight = heavy(1024, 1024)
    weight[:128, :256] *= 300
    largest, _ = largest_eigenvalues(weight, "x", squared_norm(weight) / weight.numel())
    reference = pooled_eigenvalues(blocks(weight, "x").double())[-len(largest) :]
    assert torch.allclose(largest, reference, rtol=1e-5, atol=1e-7 * float(reference[-1]))


@pytest.mark.parametrize("shape", [(3000, 256), (2048, 640), (5000, 24)], ids=str)
def test_a_matrix_read_in_pieces_has_the_same_spectrum(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alphaq.spectra.measure.PANEL_VALUES", 1 << 17)
    weight = heavy(*shape).bfloat16()
    asked: list[slice] = []
    found = streamed_spectrum(lambda part: asked.append(part) or weight[part], shape, "x")
    whole = spectrum(weight, "x")
    assert found.alpha == whole.alpha
    assert found.variance == pytest.approx(whole.variance, rel=1e-12)
    assert [row for part in asked for row in range(part.start, part.stop)] == list(range(shape[0]))
    assert len(asked) > 1 or shape[1] == 24


def test_spectrum_does_not_depend_on_the_number_of_threads() -> None:
    weight = heavy(768, 2048)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(spectrum(weight, "x"))
    torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (1, 16), (7, 40), (300, 1408), (64, 2049)], ids=str)
def test_squares_of_rows_are_those_of_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, worth = torch.randn(shape, generator=generator).to(dtype), torch.rand(shape[1], generator=generator)
    counted, plain = squares_by_row(weight, worth.numpy())
    squares = weight.double().square()
    assert counted == pytest.approx((squares @ worth.double()).numpy(), rel=1e-6)
    assert plain == pytest.approx(squares.sum(1).numpy(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 300, 5000])
def test_sums_are_those_of_float64(size: int, dtype: torch.dtype) -> None:
    first = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    second = torch.randn(size, generator=torch.Generator().manual_seed(size + 1))
    assert sums(first)[0] == pytest.approx(float(first.double().sum()), abs=1e-4)
    assert sums(first)[1] == pytest.approx(float(first.double().square().sum()), rel=1e-6)
    distance = float((first.double() - second.double()).square().sum())
    assert squared_distance(first, second) == pytest.approx(distance, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 40, 100_000])
def test_device_path_agrees_with_the_kernel(tiny: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that a GPU takes, on the CPU: many matrices to a launch, whatever its size."""
    monkeypatch.setattr("alphaq.spectra.device.BLOCKS_AT_ONCE", batch)
    checkpoint = open_checkpoint(str(tiny))
    matrices = checkpoint.matrices[:40]
    found = list(device_spectra(checkpoint, matrices, "cpu"))
    assert len(found) == len(matrices)
    for matrix, one in zip(matrices, found, strict=True):
        ours = spectrum(checkpoint.read(matrix), matrix.name)
        assert one.alpha == pytest.approx(ours.alpha, abs=1e-4)
        assert one.variance == ours.variance
        assert one.eigenvalue_count == ours.eigenvalue_count


def test_device_path_hands_errors_on(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(tiny))
    monkeypatch.setattr(type(checkpoint), "read", lambda self, matrix: torch.full((64, 64), math.nan))
    with pytest.raises(QuantizationError, match="NaN"):
        list(device_spectra(checkpoint, checkpoint.matrices[:3], "cpu"))


def test_absent_device_is_an_error(tiny: Path) -> None:
    checkpoint = open_checkpoint(str(tiny))
    with pytest.raises(DeviceError, match="Use cpu"):
        list(device_spectra(checkpoint, checkpoint.matrices[:1], "nonsense"))
