import pytest
import torch
from reference import quantize_groups, values_of

from alphaq.errors import QuantizationError
from alphaq.formats.blocks import dequantize, restored_error
from alphaq.formats.packing import unpack
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.base import Rounder, rounder_of
from alphaq.quantizers.debiased import BIAS_WEIGHT, quantize_debiased
from alphaq.quantizers.rounded import rounded

ALL = [Choice(bits, group, symmetric) for bits in range(1, 9) for group in (32, 128) for symmetric in (False, True)]


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def codes_of(matrix: QuantizedMatrix) -> torch.Tensor:
    return torch.from_numpy(unpack(matrix.codes.numpy(), matrix.choice.bits, matrix.shape[1]))


def min_max_error(weight: torch.Tensor, choice: Choice) -> float:
    """Plain round to nearest over each group's full range, float16 scales."""
    total = 0.0
    for start in range(0, weight.shape[1], choice.group_size):
        group = weight[:, start : start + choice.group_size].double()
        top = 2**choice.bits - 1
        if choice.symmetric:
            zero = torch.full((len(group), 1), float(2 ** (choice.bits - 1)), dtype=torch.float64)
            scale = group.abs().amax(1, keepdim=True) / max(1, top - 2 ** (choice.bits - 1))
        else:
            low = group.amin(1, keepdim=True).clamp_max(0)
            scale = (group.amax(1, keepdim=True).clamp_min(0) - low) / top
            zero = (-low / scale).round()
        scale = scale.half().double()
        codes = ((group / scale).round() + zero).clamp(0, top)
        total += float(((codes - zero) * scale - group).square().sum())
    return total


@pytest.fixture
def quantizer() -> Rounder:
    return rounder_of("debiased")


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_error_is_no_larger_than_plain_min_max(quantizer: Rounder, choice: Choice) -> None:
    weight = gaussian(16, 300)
    assert rounded(weight, choice, "x", quantizer).squared_error <= min_max_error(weight, choice) * (1 + 1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_more_bits_and_smaller_groups_reduce_the_error(quantizer: Rounder, symmetric: bool) -> None:
    weight = gaussian(64, 512)
    by_bits = [rounded(weight, Choice(bits, 64, symmetric), "x", quantizer).squared_error for bits in range(1, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_group = [rounded(weight, Choice(3, group, symmetric), "x", quantizer).squared_error for group in (32, 64, 128)]
    assert by_group == sorted(by_group)


@pytest.mark.parametrize("bits", range(2, 9))
def test_unclipped_error_is_at_most_half_a_step(bits: int) -> None:
    """Within the grid's range, rounding to nearest by least squares is never off by more than half a step."""
    weight = gaussian(8, 64)
    found = quantize_debiased(weight, Choice(bits, 64), bias_weight=1.0)
    step = found.scales.float()
    codes = codes_of(found)
    inside = (codes > 0) & (codes < 2**bits - 1)
    off = (dequantize(found) - weight).abs()
    assert (off <= step / 2 * (1 + 1e-3))[inside].all()


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_edge_groups_are_exact_or_close(quantizer: Rounder, choice: Choice) -> None:
    zero = torch.zeros(4, 130)
    assert torch.equal(dequantize(quantizer(zero, choice)), zero)
    if not choice.symmetric:
        constant = torch.full((4, 130), -0.75)
        assert torch.allclose(dequantize(quantizer(constant, choice)), constant, rtol=2e-3)
    outlier = gaussian(4, 130)
    outlier[2, 7] = 1e4
    restored = dequantize(quantizer(outlier, choice))
    assert torch.isfinite(restored).all()


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_quantizing_is_deterministic_and_codes_are_in_range(quantizer: Rounder, choice: Choice) -> None:
    weight = gaussian(7, 200).bfloat16()
    first, second = quantizer(weight, choice), quantizer(weight, choice)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)
    assert codes_of(first).shape == (7, 200)
    assert first.scales.dtype == torch.float16
    assert first.scales.shape == (7, choice.groups(200))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_on_a_grid_survive_a_second_quantization(quantizer: Rounder, bits: int) -> None:
    choice = Choice(bits, 32)
    once = dequantize(quantizer(gaussian(8, 64), choice))
    again = dequantize(quantizer(once, choice))
    assert float((again - once).square().sum()) <= 0.02 * float(once.square().sum())


def test_tiny_weights_do_not_divide_by_zero(quantizer: Rounder) -> None:
    weight = gaussian(4, 64) * 1e-9  # below the smallest float16
    assert torch.isfinite(dequantize(quantizer(weight, Choice(4, 32)))).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_what_fp16_cannot_hold_is_refused_by_name(quantizer: Rounder, bad: float) -> None:
    weight = gaussian(4, 64)
    weight[1, 2] = bad
    with pytest.raises(QuantizationError, match=r"layers\.9"):
        quantizer(weight, Choice(4, 32), "layers.9")


def test_one_bit_is_the_mean_and_sign() -> None:
    weight = torch.tensor([[1.0, 3.0, -1.0, -3.0] * 8])
    restored = dequantize(rounder_of("mse")(weight, Choice(1, 32)))
    assert restored.tolist() == [[2.0, 2.0, -2.0, -2.0] * 8]


def test_sixteen_bits_lose_nothing_of_bf16() -> None:
    assert rounded(gaussian(4, 64).bfloat16(), Choice(16), "x").squared_error == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [33, 300, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 15, 128, 1024))])
@pytest.mark.parametrize("choice", ALL, ids=str)
@pytest.mark.parametrize("bias_weight", [1.0, BIAS_WEIGHT])
def test_kernel_agrees_with_plain_torch(choice: Choice, columns: int, dtype: torch.dtype, bias_weight: float) -> None:
    weight = (gaussian(12, columns, columns) - 0.2).to(dtype)
    parts = quantize_groups(weight, choice, bias_weight)
    plain = float((values_of(parts, choice) - weight.float()).double().square().sum())
    found = quantize_debiased(weight, choice, bias_weight=bias_weight)
    assert found.squared_error == pytest.approx(plain, rel=1e-4, abs=1e-9)
    assert restored_error(found, weight) == pytest.approx(plain, rel=1e-4, abs=1e-9)
    assert (codes_of(found) != parts[0]).float().mean() < 0.02  # ties between steps may fall either way


@pytest.mark.parametrize("choice", [Choice(bits, 128, symmetric) for bits in (1, 2, 3) for symmetric in (False, True)])
def test_without_bound_the_weight_of_bias_restores_the_weights_at_full_length(choice: Choice) -> None:
    weight = gaussian(40, 300)
    restored = dequantize(quantize_debiased(weight, choice, bias_weight=1e6))
    for ours, theirs in zip(weight.split(128, 1), restored.split(128, 1), strict=True):
        assert torch.allclose((ours * theirs).sum(1) / ours.square().sum(1), torch.ones(len(ours)), atol=1.5e-3)


def test_the_largest_weights_are_not_stretched_beyond_fp16() -> None:
    weight = torch.full((1, 128), 58200.0)
    weight[0, :19], weight[0, 19] = 65000.0, -65000.0
    for choice in (Choice(1, 128), Choice(1, 128, symmetric=True), Choice(2, 128), Choice(2, 128, symmetric=True)):
        found, plain = quantize_debiased(weight, choice), quantize_debiased(weight, choice, bias_weight=1.0)
        assert torch.equal(dequantize(found), dequantize(plain))
    weight = torch.full((1, 128), -1.0)
    weight[0, 0], weight[0, 1] = 49000.0, -48900.0
    assert torch.isfinite(dequantize(quantize_debiased(weight.half(), Choice(1, 128))).half()).all()


def test_codes_all_alike_are_left_alone() -> None:
    weight = torch.full((4, 100), 0.3)
    weight[:, :3] = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0))
    for bits in (1, 2, 3):
        found, plain = (quantize_debiased(weight, Choice(bits, 128), bias_weight=weight_) for weight_ in (4.0, 1.0))
        assert found.squared_error is not None and plain.squared_error is not None
        assert found.squared_error <= 1.01 * plain.squared_error


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    weight = gaussian(300, 1024)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(quantize_debiased(weight, Choice(3, 128)))
    torch.set_num_threads(threads)
    assert torch.equal(results[0].codes, results[1].codes)
    assert results[0].squared_error == results[1].squared_error
