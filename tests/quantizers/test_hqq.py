"""Half-quadratic quantization against its plain form, brute force, and what its scales promise."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference import half_quadratic
from safetensors import safe_open

import alphaq
from alphaq.formats.blocks import dequantize
from alphaq.nouns.choice import Choice
from alphaq.quantizers.base import Rounder
from alphaq.quantizers.hqq import lp_objective, quantize_hqq, relative_slack
from alphaq.quantizers.rtn import round_to_nearest
from alphaq.simd.vectors import kernel, load, power, splat, store

TINY = Path(alphaq.__file__).parent / "data" / "tiny" / "model.safetensors"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def weights(kind: str, rows: int = 64, columns: int = 512) -> torch.Tensor:
    """A matrix of 0.02 in size: Gaussian, Student's t with 3 degrees of freedom, or an expert of the bundled model."""
    if kind == "expert":
        with safe_open(TINY, "pt") as file:
            return file.get_tensor(EXPERT).float()
    random = np.random.default_rng(5)
    values = random.standard_normal((rows, columns)) if kind == "gaussian" else random.standard_t(3, (rows, columns))
    return torch.from_numpy((0.02 * values).astype(np.float32))


def objective(quantizer: Rounder, weight: torch.Tensor, choice: Choice) -> float:
    return lp_objective(weight, dequantize(quantizer(weight, choice)))


@kernel
def _powers(values, exponent, out):  # type: ignore[no-untyped-def]
    for at in range(0, values.size, 16):
        store(out, at, power(load(values, at), splat(exponent)))


@pytest.mark.parametrize("exponent", [0.7, -0.3, 1.0])
def test_powers_are_good_to_four_digits(exponent: float) -> None:
    values = np.geomspace(1e-30, 1e30, 1 << 14).astype(np.float32)
    found = np.empty_like(values)
    _powers(values, np.float32(exponent), found)
    assert np.abs(found / values.astype(np.float64) ** np.float64(np.float32(exponent)) - 1).max() < 3e-5


@pytest.mark.parametrize("kind", ["gaussian", "student", "expert"])
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_objective_is_that_of_the_plain_form_or_less(bits: int, group_size: int, kind: str) -> None:
    """Although the zero point is an integer here and any float there."""
    weight = weights(kind)
    plain = lp_objective(weight, half_quadratic(weight, bits, group_size))
    assert objective(quantize_hqq, weight, Choice(bits, group_size)) <= 1.01 * plain


@pytest.mark.parametrize("kind", ["gaussian", "student"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_objective_is_below_that_of_min_max(bits: int, symmetric: bool, kind: str) -> None:
    weight, choice = weights(kind), Choice(bits, 128, symmetric)
    assert objective(quantize_hqq, weight, choice) < objective(round_to_nearest, weight, choice)


@pytest.mark.parametrize("bits", [2, 3])
def test_search_comes_close_to_brute_force(bits: int) -> None:
    weight, top = weights("student", 64, 64), 2**bits - 1
    spans = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / top
    best = torch.full((len(weight),), torch.inf, dtype=torch.float64)
    for factor in np.linspace(1 - relative_slack(bits), 1 + relative_slack(bits), 300):
        step = (spans * factor).half().double()
        for zero in range(top + 1):
            restored = ((weight / step).round() + zero).clamp(0, top).sub(zero) * step
            best = torch.minimum(best, (weight - restored).abs().pow(0.7).sum(1))
    assert objective(quantize_hqq, weight, Choice(bits, 64)) <= 1.01 * float(best.sum())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_result_does_not_depend_on_the_unit_of_the_weights(bits: int) -> None:
    weight, choice = weights("student"), Choice(bits, 64)
    as_is, other = (dequantize(quantize_hqq(weight * unit, choice)) / unit for unit in (2.0**4, 2.0**9))
    assert (as_is == other).float().mean() > 0.999  # sums of powers are rounded, which may decide a tie


@pytest.mark.parametrize("choice", [Choice(1, 128), Choice(1, 128, True), Choice(3, 64, True), Choice(4, 64)], ids=str)
def test_another_norm_is_minimized_where_asked(choice: Choice) -> None:
    weight = weights("student")
    restored = {norm: dequantize(quantize_hqq(weight, choice, norm=norm)) for norm in (0.7, 2.0)}
    for norm in restored:
        objectives = {of: lp_objective(weight, found, norm) for of, found in restored.items()}
        assert min(objectives, key=objectives.__getitem__) == norm


def test_objective_is_the_sum_of_powers() -> None:
    weight, restored = torch.tensor([[0.0, 1.0], [2.0, -3.0]]), torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    assert lp_objective(weight, restored, 0.5) == pytest.approx(1 + 2**0.5)
