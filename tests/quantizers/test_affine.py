"""Scales in 16 bits: the error promised is the error of what is decoded, and it is no larger than it has to be."""

import numpy as np
import pytest
import torch

from alphaq.errors import QuantizationError
from alphaq.formats.native import GROUP_SIZES
from alphaq.formats.packing import unpack
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.affine import quantize_affine, quantize_symmetric16
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.simd.vectors import as_brain, kernel, load, store

SYMMETRIC = [Choice(bits, group, symmetric=True) for bits in (4, 8) for group in GROUP_SIZES]
AFFINE = [Choice(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in GROUP_SIZES]
DTYPES = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float16, torch.float32: torch.bfloat16}

every_choice = pytest.mark.parametrize("choice", [*SYMMETRIC, *AFFINE], ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gaussian(rows: int = 24, columns: int = 384, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) + 0.1).to(dtype)


def quantized(weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix:
    """With least squares to the last."""
    if choice.symmetric:
        return quantize_symmetric16(weight, choice, name)
    return quantize_affine(weight, choice, name, bias_weight=1.0)


def codes_of(matrix: QuantizedMatrix) -> torch.Tensor:
    return torch.from_numpy(unpack(matrix.codes.numpy(), matrix.choice.bits, matrix.shape[1]))


def decoded(matrix: QuantizedMatrix, codes: torch.Tensor) -> torch.Tensor:
    """By the formulas: s·(q − 2^(b−1)) in 16 bits, or s·q + β in float32."""

    def spread(per_group: torch.Tensor) -> torch.Tensor:
        return per_group.float().repeat_interleave(matrix.choice.group_size, dim=1)[:, : codes.shape[1]]

    if matrix.offsets is None:
        values = (codes.float() - 2.0 ** (matrix.choice.bits - 1)) * spread(matrix.scales)
        return values.to(matrix.scales.dtype).float()
    return codes.float() * spread(matrix.scales) + spread(matrix.offsets)


def restored(matrix: QuantizedMatrix) -> torch.Tensor:
    return decoded(matrix, codes_of(matrix))


def error_of(matrix: QuantizedMatrix, weight: torch.Tensor) -> float:
    return float((restored(matrix) - weight.float()).double().square().sum())


@every_choice
@every_dtype
def test_error_is_that_of_what_is_decoded(choice: Choice, dtype: torch.dtype) -> None:
    weight = gaussian(dtype=dtype)
    found = quantized(weight, choice)
    assert found.squared_error == pytest.approx(error_of(found, weight), rel=1e-5)
    assert found.scales.dtype == DTYPES[dtype]
    assert found.scales.shape == (24, choice.groups(384))
    assert (found.offsets is None) == choice.symmetric
    if found.offsets is not None:
        assert found.offsets.dtype == DTYPES[dtype]


@every_choice
@every_dtype
def test_refitting_beats_rounding_the_numbers_of_rtn(choice: Choice, dtype: torch.dtype) -> None:
    weight = gaussian(dtype=dtype)
    plain = quantize_debiased(weight, choice, bias_weight=1.0)
    scales = plain.scales.to(DTYPES[dtype])
    offsets = None if plain.offsets is None else (-scales.float() * plain.offsets).to(DTYPES[dtype])
    rounded = QuantizedMatrix(choice, plain.shape, plain.codes, scales, offsets)
    assert error_of(quantized(weight, choice), weight) <= error_of(rounded, weight) * (1 + 1e-6)


@pytest.mark.parametrize("choice", AFFINE, ids=str)
def test_error_is_below_that_of_mlx_itself(choice: Choice) -> None:
    mx = pytest.importorskip("mlx.core")
    weight = gaussian(64, 1024)
    settings = {"group_size": choice.group_size, "bits": choice.bits}
    codes, *rest = mx.quantize(mx.array(weight.float().numpy()).astype(mx.bfloat16), **settings)
    restored = np.array(mx.dequantize(codes, *(part.astype(mx.float32) for part in rest), **settings))
    theirs = float((torch.from_numpy(restored) - weight.float()).double().square().sum())
    assert error_of(quantized(weight, choice), weight) < theirs


@pytest.mark.parametrize("choice", AFFINE, ids=str)
def test_every_code_is_the_nearest_on_its_grid(choice: Choice) -> None:
    weight = gaussian(8, 256)
    found = quantized(weight, choice)
    codes = codes_of(found).int()
    misses = (decoded(found, codes) - weight.float()).abs()
    for step in (-1, 1):
        other = codes + step
        inside = (other >= 0) & (other < 2**choice.bits)
        worse = (decoded(found, other) - weight.float()).abs()
        assert (misses <= worse * (1 + 1e-5))[inside].all()


@pytest.mark.parametrize("choice", AFFINE, ids=str)
def test_last_fit_weighs_errors_along_the_weights(choice: Choice) -> None:
    """Codes stay, means of groups stay, and |e|² + 3·(e·w)²/|w|² of deviations from the mean is least."""
    weight, size = gaussian(8, 256), choice.group_size
    found, plain = quantize_affine(weight, choice), quantized(weight, choice)
    assert torch.equal(found.codes, plain.codes)
    assert found.squared_error == pytest.approx(error_of(found, weight), rel=1e-5)
    groups = weight.double().reshape(-1, size)
    target = groups - groups.mean(1, keepdim=True)

    def loss(values: torch.Tensor) -> torch.Tensor:
        miss = values.double().reshape(-1, size) - groups
        along = (miss * target).sum(1) / target.norm(dim=1)
        return miss.square().sum(1) + 3 * along.square()

    level = codes_of(found).double().reshape(-1, size)
    level -= level.mean(1, keepdim=True)
    for factor in (0.98, 1.02):  # more than bfloat16 rounds
        other = groups.mean(1, keepdim=True) + factor * found.scales.double().reshape(-1, 1) * level
        assert (loss(restored(found)) <= loss(other) * (1 + 1e-9)).float().mean() > 0.9
        assert loss(restored(found)).sum() < loss(other).sum()
    if choice.bits == 2:
        assert loss(restored(found)).sum() < 0.95 * loss(restored(plain)).sum()


@every_dtype
@pytest.mark.parametrize("spread", [0.3, 0.1, 1e-3])
@pytest.mark.parametrize("choice", AFFINE, ids=str)
def test_weights_far_from_zero_do_not_spoil_the_last_fit(choice: Choice, spread: float, dtype: torch.dtype) -> None:
    """Their deviations are small differences of large numbers."""
    weight = (1 + spread * gaussian(200, 256, torch.float32)).to(dtype)
    found, plain = quantize_affine(weight, choice), quantized(weight, choice)
    assert found.squared_error is not None and plain.squared_error is not None
    assert found.squared_error <= 1.35 * plain.squared_error


@every_choice
def test_edge_groups_are_exact(choice: Choice) -> None:
    zero = torch.zeros(4, 128, dtype=torch.bfloat16)
    assert torch.equal(restored(quantized(zero, choice)), zero.float())
    if not choice.symmetric:
        constant = torch.full((4, 128), -0.734375, dtype=torch.bfloat16)
        assert torch.equal(restored(quantized(constant, choice)), constant.float())
    tiny = gaussian(4, 128) * 1e-9  # below the smallest float16
    assert torch.isfinite(restored(quantized(tiny, choice))).all()


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    weight = gaussian(300, 1024)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(quantize_affine(weight, Choice(3, 64)))
    torch.set_num_threads(threads)
    assert torch.equal(results[0].codes, results[1].codes)
    assert results[0].squared_error == results[1].squared_error


@pytest.mark.parametrize("choice", [Choice(4, 128, symmetric=True), Choice(4, 128)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_what_cannot_be_held_is_refused_by_name(choice: Choice, bad: float) -> None:
    weight = gaussian(4, 128)
    weight[1, 2] = bad
    with pytest.raises(QuantizationError, match=r"layers\.9"):
        quantized(weight, choice, "layers.9")


def test_rows_of_odd_length_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"x: rows of 100 weights are not in multiples of 16"):
        quantize_affine(gaussian(4, 100), Choice(4, 32), "x")


@kernel
def _rounded(values, out):  # type: ignore[no-untyped-def]
    for at in range(0, values.size, 16):
        store(out, at, as_brain(load(values, at)))
    return as_brain(values[0])


def test_rounding_to_bfloat16_is_torch_s() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 16, dtype=np.uint32)
    bits[: 1 << 12] = bits[: 1 << 12] & 0xFFFF0000 | 0x8000  # ties
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    values = values[: values.size // 16 * 16].copy()
    out = np.empty_like(values)
    first = _rounded(values, out)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(out, expected)
    assert first == expected[0]
