"""llama.cpp's own quantizers, compared with the gguf package's inverses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import gguf
import numpy as np
import pytest
import torch

from alphaq.errors import QuantizationError
from alphaq.formats.ggml import GGML_BLOCKS
from alphaq.formats.ggml_library import restore_rows
from alphaq.formats.table import parse_choice
from alphaq.quantizers.base import Rounder
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.quantizers.ggml import quantize_ggml
from alphaq.quantizers.rounded import rounded, squared_errors

pytestmark = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp comes with `pip install xllamacpp`")

FAST = ("Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL")
SLOW = "IQ3_XXS"  # of the types that search in tables


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def outliers(rows: int, columns: int) -> torch.Tensor:
    """Rows and columns of very different size, heavy tails."""
    generator = torch.Generator().manual_seed(1)
    tails = torch.distributions.StudentT(torch.tensor(4.0))
    torch.manual_seed(1)
    scales = torch.rand(rows, 1, generator=generator).mul(3).exp() * torch.rand(columns, generator=generator).exp()
    return tails.sample((rows, columns)) * scales


@pytest.mark.parametrize("scheme", [*FAST, SLOW])
def test_error_and_values_are_those_of_the_gguf_package(scheme: str) -> None:
    weight, choice = outliers(24, 512), parse_choice(scheme)
    found = quantize_ggml(weight, choice)
    codes = found.codes.numpy()
    kind = gguf.GGMLQuantizationType.__members__.get(scheme)
    if kind is None:
        pytest.skip(f"the gguf package has no {scheme}")
    theirs = torch.from_numpy(gguf.quants.dequantize(codes, kind))
    assert np.array_equal(restore_rows(codes, scheme, 512), theirs.numpy())
    error = float((theirs - weight).double().square().sum())
    assert found.squared_error == pytest.approx(error, rel=1e-5)
    assert rounded(weight, choice, "x", quantize_ggml).squared_error == found.squared_error


@pytest.mark.parametrize("scheme", FAST)
def test_rows_do_not_see_one_another(scheme: str) -> None:
    weight, choice = outliers(9, 512), parse_choice(scheme)
    whole = quantize_ggml(weight, choice).codes
    order = torch.tensor([7, 2, 2, 8])
    assert torch.equal(quantize_ggml(weight[order], choice).codes, whole[order])


@pytest.mark.parametrize("scheme", ["Q3_K", "Q4_0"])
def test_result_does_not_depend_on_the_number_of_threads(scheme: str) -> None:
    weight, choice = gaussian(700, 1024), parse_choice(scheme)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            found.append(quantize_ggml(weight, choice))
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert torch.equal(one.codes, found[0].codes)
        assert one.squared_error == found[0].squared_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_quantized_as_the_numbers_they_are(dtype: torch.dtype) -> None:
    weight = gaussian(8, 256).to(dtype)
    for scheme in ("Q4_K", "Q8_0"):
        found, expected = (quantize_ggml(values, parse_choice(scheme)) for values in (weight, weight.float()))
        assert torch.equal(found.codes, expected.codes)
        assert found.squared_error == expected.squared_error


@pytest.mark.parametrize("scheme", FAST)
def test_codes_have_the_bytes_of_their_blocks(scheme: str) -> None:
    _, block, nbytes = GGML_BLOCKS[scheme]
    found = quantize_ggml(gaussian(3, 3 * block), parse_choice(scheme))
    assert found.codes.dtype == torch.uint8
    assert found.codes.shape == (3, 3 * nbytes)
    assert found.scales is None and found.offsets is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e6, 1e18])
def test_weights_that_are_no_numbers_are_refused_by_name(bad: float) -> None:
    weight = gaussian(600, 512)
    weight[599, 3] = bad
    with pytest.raises(QuantizationError, match=r"layers\.9 holds NaN, infinite or too large"):
        quantize_ggml(weight, parse_choice("Q4_K"), "layers.9")


@pytest.mark.parametrize(("scheme", "columns"), [("Q4_K", 128), ("Q8_0", 80), ("Q2_K", 300)])
def test_rows_that_are_not_whole_blocks_are_refused_by_name(scheme: str, columns: int) -> None:
    with pytest.raises(QuantizationError, match=rf"layers\.9: rows of {columns} weights are not whole {scheme} blocks"):
        quantize_ggml(gaussian(2, columns), parse_choice(scheme), "layers.9")


@pytest.mark.parametrize("scheme", FAST)
def test_zeros_and_tiny_weights_stay_finite(scheme: str) -> None:
    choice = parse_choice(scheme)
    assert quantize_ggml(torch.zeros(2, 256), choice).squared_error == 0
    assert np.isfinite(restore_rows(quantize_ggml(gaussian(2, 256) * 1e-9, choice).codes.numpy(), scheme, 256)).all()


def test_important_columns_are_met_better() -> None:
    weight, choice = gaussian(64, 256), parse_choice("Q2_K")
    importance = np.where(np.arange(256) % 4 == 0, 100.0, 1.0).astype(np.float32)

    def error(found: torch.Tensor) -> float:
        return float((torch.from_numpy(restore_rows(found.numpy(), str(choice), 256)) - weight)[:, ::4].square().sum())

    weighed = quantize_ggml(weight, choice, importance=importance)
    assert error(weighed.codes) < 0.9 * error(quantize_ggml(weight, choice).codes)


# -- errors from a sample of rows -----------------------------------------------------------------


@pytest.mark.parametrize(("kind", "most"), [(gaussian, 0.02), (outliers, 0.08)])
@pytest.mark.parametrize(
    ("quantizer", "choices"),
    [(quantize_ggml, ("Q2_K", "Q4_K", "Q8_0")), (quantize_debiased, ("1g128", "2g128", "4g32s"))],
)
def test_sampled_errors_are_as_far_off_as_their_standard_errors_say(
    quantizer: Rounder, choices: tuple[str, ...], kind: Callable[[int, int], torch.Tensor], most: float
) -> None:
    weight, known = kind(2048, 512), [parse_choice(choice) for choice in choices]
    real = {choice: rounded(weight, choice, "x", quantizer).squared_error for choice in known}
    off = []
    for draw in range(12):
        found = squared_errors(weight, known, f"layers.{draw}", quantizer, sample_values=1 << 17)
        for choice in known:
            off.append((found.expected[choice] - real[choice]) / found.deviation[choice])
            assert abs(found.expected[choice] - real[choice]) <= most * real[choice]
    assert 0.5 < np.sqrt(np.mean(np.square(off))) < 1.5


def test_the_rows_drawn_depend_on_the_name_alone() -> None:
    weight, choices = outliers(512, 256), [parse_choice("Q4_K")]
    first, again, other = (
        squared_errors(weight, choices, name, quantize_ggml, sample_values=1 << 14) for name in ("a", "a", "b")
    )
    assert first == again != other


def test_importance_weighs_errors_as_it_weighs_rounding() -> None:
    importance = np.random.default_rng(0).gamma(0.5, 2.0, 256).astype(np.float32)
    weight, choice = outliers(2048, 256), parse_choice("Q2_K")
    rounder = partial(quantize_ggml, importance=importance)
    codes = quantize_ggml(weight, choice, importance=importance).codes
    misses = np.square(restore_rows(codes.numpy(), "Q2_K", 256).astype(np.float64) - weight.numpy())
    whole = squared_errors(weight, [choice], "x", rounder, sample_values=1 << 20, importance=importance)
    assert whole.expected[choice] == pytest.approx(float(misses.sum(axis=0) @ importance), rel=1e-5)
    assert whole.plain[choice] == pytest.approx(float(misses.sum()), rel=1e-5)
    sampled = squared_errors(weight, [choice], "x", rounder, sample_values=1 << 17, importance=importance)
    assert sampled.deviation[choice] > 0
    assert abs(sampled.expected[choice] - whole.expected[choice]) < 5 * sampled.deviation[choice]
    assert sampled.plain[choice] == pytest.approx(whole.plain[choice], rel=0.05)
    assert squared_errors(weight, [choice], "x", quantize_ggml).plain == {}


def test_a_small_matrix_is_measured_whole() -> None:
    weight, choice = gaussian(64, 256), parse_choice("Q4_K")
    found = squared_errors(weight, [choice], "x", quantize_ggml)
    assert found.expected == {choice: rounded(weight, choice, "x", quantize_ggml).squared_error}
    assert found.deviation == {}


def test_a_bad_weight_is_refused_whether_or_not_the_sample_draws_it() -> None:
    choices = [parse_choice("Q8_0")]
    for row in (0, 1000, 4095):
        weight = gaussian(4096, 256)
        weight[row, 0] = float("nan")
        with pytest.raises(QuantizationError, match=r"layers\.9 holds NaN"):
            squared_errors(weight, choices, "layers.9", quantize_ggml, sample_values=1 << 14)
