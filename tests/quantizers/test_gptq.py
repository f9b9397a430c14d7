"""GPTQ is what its definition says, in float64, and never reads what it is not given."""

import pytest
import torch

from alphaq.errors import QuantizationError
from alphaq.formats.blocks import dequantize, encode
from alphaq.formats.coding import encode_tensor
from alphaq.formats.levels import grid_of
from alphaq.formats.table import parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers import factoring, gptq
from alphaq.quantizers.base import rounder_of
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.quantizers.gptq import quantize_gptq
from alphaq.quantizers.nested import quantize_nested
from alphaq.quantizers.rated import quantize_rated
from moments import moments, objective, seeded

CHOICES = [parse_choice(text) for text in ("1g64", "1g32s", "2g32", "2g128s", "3g64", "4", "8g32s")]


def plain_gptq(weight: torch.Tensor, hessian: torch.Tensor, matrix: QuantizedMatrix) -> torch.Tensor:
    """As published (arXiv 2210.17323): by the inverse's Cholesky factor, column by column, in float64."""
    grid, top, columns = grid_of(matrix), 2**matrix.choice.bits - 1, weight.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    damped = hessian.double()[order][:, order]
    damped += factoring.DAMPING * damped.diagonal().mean() * torch.eye(columns)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, restored = weight.double()[:, order], torch.zeros(weight.shape, dtype=torch.float64)
    for place, column in enumerate(order.tolist()):
        step, start = (part[:, column // matrix.choice.group_size].double() for part in (grid.step, grid.start))
        codes = ((left[:, place] - start) / step).round().nan_to_num().clamp(0, top)
        restored[:, column] = codes * step + start
        error = (left[:, place] - restored[:, column]) / factor[place, place]
        left[:, place + 1 :] -= error[:, None] * factor[place, place + 1 :]
    return restored


@pytest.mark.parametrize("shape", [(40, 128), (33, 300), (5, 517)], ids=str)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_equals_the_published_algorithm_in_float64(choice: Choice, shape: tuple[int, int]) -> None:
    weight, hessian = seeded(*shape), moments(shape[1])
    found = quantize_gptq(weight, choice, "matrix", hessian)
    expected = plain_gptq(weight, hessian, found)
    error = objective(weight, dequantize(found), hessian)
    assert error == pytest.approx(objective(weight, expected, hessian), rel=1e-5)
    assert ((dequantize(found) - expected).abs() > 1e-4).double().mean() < 1e-3  # ties of float32
    assert found.squared_error == pytest.approx(float((weight - dequantize(found)).double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_moves_outputs_less_than_rounding_to_nearest(choice: Choice) -> None:
    weight, hessian = seeded(64, 256), moments(256)
    nearest = objective(weight, dequantize(quantize_debiased(weight, choice)), hessian)
    assert objective(weight, dequantize(quantize_gptq(weight, choice, "matrix", hessian)), hessian) < 0.8 * nearest


@pytest.mark.parametrize("hessian", [None, torch.ones(96), torch.eye(96), torch.zeros(96, 96)], ids=type)
def test_without_correlations_the_nearest_levels_stay(hessian: torch.Tensor | None) -> None:
    weight, choice = seeded(20, 96), Choice(3, 32)
    nearest = quantize_debiased(weight, choice, bias_weight=1.0)
    found = quantize_gptq(weight, choice, "matrix", hessian, nearest)
    assert torch.equal(found.codes, nearest.codes)
    assert torch.equal(found.scales, nearest.scales)


def test_fewer_tokens_than_columns_are_damped() -> None:
    weight, inputs = seeded(16, 128), seeded(20, 128, seed=3)
    hessian, choice = inputs.T @ inputs, Choice(2, 64)
    error = objective(weight, dequantize(quantize_gptq(weight, choice, "matrix", hessian)), hessian)
    assert error < objective(weight, dequantize(quantize_debiased(weight, choice)), hessian)


def test_moments_that_need_more_damping_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative eigenvalue, as float32 sums of nearly dependent inputs can have."""
    hessian = moments(64)
    worst = torch.linalg.eigh(hessian)[1][:, 0]
    hessian -= 0.05 * hessian.diagonal().mean() * torch.outer(worst, worst)
    weight, choice = seeded(8, 64), Choice(3, 32)
    quantize_gptq(weight, choice, "matrix", hessian)
    monkeypatch.setattr(factoring, "RETRIES", 1)
    with pytest.raises(QuantizationError, match=r"layers\.0\.up: .*not positive definite.*Calibrate"):
        quantize_gptq(weight, choice, "layers.0.up", hessian)


@pytest.mark.parametrize("hessian", [torch.eye(63), torch.eye(64) * torch.nan], ids=["shape", "nan"])
def test_moments_of_other_inputs_are_refused(hessian: torch.Tensor) -> None:
    with pytest.raises(QuantizationError, match=r"layers\.0\.up: second moments"):
        quantize_gptq(seeded(8, 64), Choice(3, 32), "layers.0.up", hessian)


def test_llama_types_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"layers\.0\.up: Q4_K .*--imatrix"):
        quantize_gptq(seeded(8, 256), parse_choice("Q4_K"), "layers.0.up", torch.eye(256))


def test_threads_change_nothing() -> None:
    weight, hessian, choice = seeded(700, 160), moments(160), Choice(2, 32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(quantize_gptq(weight, choice, "matrix", hessian).codes)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("text", ["4g64-nest", "2g128-nest"])
def test_rounds_to_nested_levels_as_published(text: str) -> None:
    choice, weight, hessian = parse_choice(text), seeded(40, 256), moments(256)
    plain = quantize_nested(weight, choice)
    found = quantize_gptq(weight, choice, "matrix", hessian, plain)
    error = objective(weight, dequantize(found), hessian)
    expected = objective(weight, plain_gptq(weight, hessian, found), hessian)
    assert error == pytest.approx(expected, rel=1e-3)  # a code or two fall on the other side of a tie
    assert error < 0.8 * objective(weight, dequantize(plain), hessian)


def rated(weight: torch.Tensor, rate: str) -> QuantizedMatrix:
    return quantize_rated(weight, parse_choice(rate))


@pytest.mark.parametrize("rate", ["@1.25", "@2", "@3", "@4.5"])
def test_codes_of_a_rate_move_outputs_less_in_no_more_bytes(rate: str) -> None:
    weight, hessian = seeded(96, 384), moments(384, 2000)
    plain = rated(weight, rate)
    found = quantize_gptq(weight, plain.choice, "matrix", hessian, plain)
    sizes = [encode_tensor(encode(matrix)).nbytes for matrix in (found, plain)]
    assert 0.98 * sizes[1] < sizes[0] <= sizes[1]
    error, nearest = (objective(weight, dequantize(matrix), hessian) for matrix in (found, plain))
    assert error < 0.6 * nearest
    assert len(found.scales.unique()) == 1
    assert found.squared_error == pytest.approx(float((weight - dequantize(found)).double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("rate", ["@1.5", "@2.5"])
def test_the_rate_term_is_worth_its_bits(rate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same bytes, rounding what is best with the rate beats rounding the weights themselves."""
    weight, hessian = seeded(128, 384), moments(384, 2000)
    plain = rated(weight, rate)
    with_rate = quantize_gptq(weight, plain.choice, "matrix", hessian, plain)
    monkeypatch.setattr(gptq, "_shrunk", lambda weight, *_: weight)
    without = quantize_gptq(weight, plain.choice, "matrix", hessian, plain)
    errors = [objective(weight, dequantize(matrix), hessian) for matrix in (with_rate, without)]
    assert errors[0] < 0.85 * errors[1]


def test_what_is_best_with_a_rate_is_that_of_its_equation() -> None:
    weight, hessian, mu = seeded(7, 50), moments(50), 0.3
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    found = gptq._shrunk(weight, factoring.factor_of(hessian, order, "matrix", mu), mu, order)
    damped = hessian.double() + factoring.DAMPING * hessian.double().diagonal().mean() * torch.eye(50)
    expected = weight.double() @ damped @ torch.linalg.inv(damped + mu * torch.eye(50))
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_a_rate_of_zeros_stays_zeros() -> None:
    plain = rated(torch.zeros(8, 96), "@2")
    found = quantize_gptq(torch.zeros(8, 96), plain.choice, "matrix", moments(96), plain)
    assert not dequantize(found).any()


@pytest.mark.parametrize("choice", ["1g64", "2g128", "3g64s", "4g128", "4g128-nest", "8g128"])
def test_codes_that_will_be_coded_take_no_more_bytes_than_those_they_improve_on(choice: str) -> None:
    weight, hessian = seeded(96, 384), moments(384, 2000)
    plain = rounder_of("debiased")(weight, parse_choice(choice), "matrix")
    found = quantize_gptq(weight, plain.choice, "matrix", hessian, plain, coded=True)
    sizes = [encode_tensor(encode(matrix)).nbytes for matrix in (found, plain)]
    assert sizes[0] <= sizes[1]
    error, nearest = (objective(weight, dequantize(matrix), hessian) for matrix in (found, plain))
    assert error < 0.7 * nearest or found.codes is plain.codes
    assert (found.codes is plain.codes) is (choice == "8g128" and sizes[0] == sizes[1])


def test_where_no_codes_fit_those_to_nearest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, plain = seeded(96, 384), rated(seeded(96, 384), "@2")
    monkeypatch.setattr(gptq, "_coded_bytes", lambda matrix: 100 if matrix is plain else 101)
    found = quantize_gptq(weight, plain.choice, "matrix", moments(384), plain)
    assert torch.equal(found.codes, plain.codes) and torch.equal(found.scales, plain.scales)
