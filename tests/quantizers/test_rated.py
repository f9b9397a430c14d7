"""One step for a whole matrix: what its codes take once coded, and how far it is from what they can do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alphaq.errors import ChoiceError, QuantizationError
from alphaq.formats.blocks import decode, dequantize, encode
from alphaq.formats.coding import encode_tensor
from alphaq.formats.packing import unpack
from alphaq.formats.table import parse_choice, stored_choice
from alphaq.nouns.choice import Choice
from alphaq.quantizers.base import rounder_of
from alphaq.quantizers.rated import quantize_rated
from alphaq.quantizers.rounded import rounded
from alphaq.simd.sums import squared_norm

RATES = (1.0, 1.75, 2.5, 3.25, 4.0, 5.0, 6.0)


def at(rate: float) -> Choice:
    return parse_choice(f"@{rate:g}")


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def squared(weight: torch.Tensor, restored: torch.Tensor) -> float:
    return float((weight.double() - restored.double()).square().sum())


def test_a_rate_is_written_and_read_back() -> None:
    assert str(parse_choice("@2.75")) == "4g128s@2.75"
    assert parse_choice("4g128s@2.75") == parse_choice("@2.75") == Choice(4, 128, True, "4g128s@2.75")
    assert stored_choice(parse_choice("@2.75")) == Choice(4, 128, True)
    for text in ("@0", "4g128@2.75", "2g128s@2.75", "@9", "4g128-nest@2", "16@3"):
        with pytest.raises(ChoiceError):
            parse_choice(text)


@pytest.mark.parametrize("rate", [2.5, 3.25, 4.0, 5.0, 6.0])
@pytest.mark.parametrize("deviation", [1e-3, 1.0, 30.0])
def test_error_of_gaussian_weights_is_a_twelfth_of_the_step_squared(rate: float, deviation: float) -> None:
    weight = deviation * gaussian(256, 512)
    found = quantize_rated(weight, at(rate))
    step = deviation * math.sqrt(2 * math.pi * math.e) * 2**-rate
    assert float(found.scales[0, 0]) == pytest.approx(step, rel=0.05)
    assert found.squared_error == pytest.approx(weight.numel() * step**2 / 12, rel=0.05)
    assert found.squared_error == pytest.approx(squared(weight, dequantize(found)), rel=1e-6)


@pytest.mark.parametrize("rate", RATES)
def test_coded_bytes_and_error_are_near_the_gaussian_bound(rate: float) -> None:
    weight = gaussian(512, 1024)
    found = quantize_rated(weight, at(rate))
    assert found.squared_error is not None
    bits = 8 * encode_tensor(encode(found)).nbytes / weight.numel()
    bound = 0.5 * math.log2(float(weight.double().square().sum()) / found.squared_error)
    assert bound < bits < bound + (0.33 if rate >= 2 else 0.4)  # the step is that of high rates
    assert bits == pytest.approx(rate, abs=0.08 if rate > 2 else 0.25)


@pytest.mark.parametrize("rate", [2.0, 3.0])
def test_groups_with_their_own_scales_take_more_bits_for_the_same_error(rate: float) -> None:
    weight = gaussian(512, 1024)

    def beyond_bound(choice: Choice) -> float:
        found = rounded(weight, choice, "w", rounder_of("debiased"))
        energy = squared_norm(weight)
        return 8 * found.coded_bytes() / weight.numel() - 0.5 * math.log2(energy / found.squared_error)

    assert beyond_bound(at(rate)) < beyond_bound(Choice(int(rate), 128)) - 0.15


def test_all_groups_have_one_scale_and_no_zero_point() -> None:
    weight = gaussian(40, 300) * torch.linspace(0.1, 3, 40)[:, None]
    found = quantize_rated(weight, at(3.0))
    assert found.offsets is None
    assert found.scales.shape == (40, 3)
    assert len(found.scales.unique()) == 1
    assert decode(encode(found)).choice == Choice(4, 128, True)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("columns", [1, 31, 128, 130, 515])
def test_codes_are_those_of_plain_rounding(rate: float, columns: int) -> None:
    weight = gaussian(9, columns).bfloat16()
    found = quantize_rated(weight, at(rate))
    energy = float(weight.double().square().sum())
    step = np.float32(math.sqrt(2 * math.pi * math.e) * 2.0**-rate * math.sqrt(energy / weight.numel()))
    half = 2 ** (found.choice.bits - 1)
    levels = np.clip(np.rint(weight.float().numpy() * (np.float32(1) / step)), -half, half - 1)
    assert np.array_equal(unpack(found.codes.numpy(), found.choice.bits, columns), levels + half)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("unit", [1e-3, 1.0, 100.0])
def test_quantizing_again_changes_nothing(rate: float, unit: float) -> None:
    for seed in range(3):
        once = dequantize(quantize_rated(unit * gaussian(64, 300, seed), at(rate)))
        assert torch.equal(dequantize(quantize_rated(once, at(rate))), once)


def test_zeros_stay_zeros_and_one_value_stays_itself() -> None:
    zeros = torch.zeros(5, 200)
    assert torch.equal(dequantize(quantize_rated(zeros, at(2.0))), zeros)
    for value in (0.3, -0.3, 1e-3):
        for rate in RATES:
            constant = torch.full((5, 200), value)
            found = dequantize(quantize_rated(constant, at(rate)))
            assert torch.allclose(found, constant, rtol=2**-10), (value, rate)
            signs = torch.where(gaussian(5, 200) > 0, constant, -constant)
            assert torch.allclose(dequantize(quantize_rated(signs, at(rate))), signs, rtol=2**-10), (value, rate)


@pytest.mark.parametrize("outlier", [3e4, -3e4, 50.0])
def test_an_outlier_beyond_the_codes_is_clipped_to_the_last(outlier: float) -> None:
    weight = gaussian(64, 512)
    weight[3, 77] = outlier
    found = quantize_rated(weight, at(3.0))
    restored = dequantize(found)
    assert torch.isfinite(restored).all()
    assert float(restored[3, 77]) == float(restored.max() if outlier > 0 else restored.min())
    assert found.squared_error == pytest.approx(squared(weight, restored), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_no_number_is_refused_by_name(bad: float, dtype: torch.dtype) -> None:
    weight = gaussian(4, 256).to(dtype)
    weight[3, 255] = bad
    with pytest.raises(QuantizationError, match=r"layers\.9\.w"):
        quantize_rated(weight, at(2.0), "layers.9.w")


def test_weights_too_large_for_float16_scales_are_refused_by_name() -> None:
    with pytest.raises(QuantizationError, match=r"layers\.9\.w"):
        quantize_rated(gaussian(4, 256) * 1e6, at(2.0), "layers.9.w")


def test_the_number_of_threads_does_not_matter() -> None:
    weight, before = gaussian(700, 1024), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(quantize_rated(weight, at(2.25)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.codes, found[0].codes)
        assert torch.equal(other.scales, found[0].scales)
        assert other.squared_error == found[0].squared_error


@pytest.mark.parametrize("name", ["debiased", "mse", "rtn", "hqq"])
def test_every_plain_quantizer_stores_rates(name: str) -> None:
    weight = gaussian(32, 256)
    assert torch.equal(rounder_of(name)(weight, at(3.0)).codes, quantize_rated(weight, at(3.0)).codes)
