import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaq.errors import QuantizationError
from alphaq.formats.blocks import dequantize, restored_error
from alphaq.formats.table import parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.base import rounder_of
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.quantizers.salience import balanced_steps, mixing, quantize_slim

SLIM = ["2g128-slim", "2g32s-slim", "3g64-slim", "4g32-slim", "7g32s-slim"]
SALIENT = ["1g128-pb2", "1g128-pb4", "1g32-pb4", "1g64-pb8", "1g128s-pb8"]
KINDS = ["gaussian", "heavy", "columns", "constant", "two values", "outlier"]
quantize = mixing(quantize_debiased)
every_mix = pytest.mark.parametrize("text", SLIM + SALIENT)


def weights(kind: str, rows: int = 24, columns: int = 300) -> torch.Tensor:
    """Matrices of several kinds, whose last group is ragged."""
    generator = np.random.default_rng(0)
    drawn = generator.standard_normal((rows, columns))
    if kind == "heavy":
        drawn = generator.standard_t(3, (rows, columns))
    elif kind == "columns":
        drawn *= np.repeat(np.exp(generator.standard_normal(-(-columns // 32))), 32)[:columns]
    elif kind == "constant":
        drawn[:] = -0.3
    elif kind == "two values":
        drawn = np.where(drawn > 0.5, 1.25, -0.5)
    elif kind == "outlier":
        drawn[3, 7] = 1e4
    return torch.from_numpy(drawn.astype(np.float32))


def plain(text: str) -> Choice:
    return parse_choice(text.partition("-")[0])


@pytest.mark.parametrize("kind", KINDS)
@every_mix
def test_error_is_no_larger_than_without_the_mix(text: str, kind: str) -> None:
    weight = weights(kind)
    found = quantize(weight, parse_choice(text))
    assert found.squared_error <= quantize_debiased(weight, plain(text)).squared_error * (1 + 1e-6)
    assert found.squared_error == pytest.approx(restored_error(found, weight), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("text", SLIM)
def test_widths_follow_the_columns_that_need_them(text: str) -> None:
    choice = parse_choice(text)
    weight = torch.randn(32, 4 * choice.group_size + 20, generator=torch.Generator().manual_seed(0))
    even = quantize(weight, choice)
    assert even.extra.tolist() == [choice.bits] * 5
    assert even.squared_error == pytest.approx(quantize_debiased(weight, plain(text)).squared_error, rel=1e-6)
    weight[:, choice.group_size : 2 * choice.group_size] *= 10
    weight[:, 4 * choice.group_size :] *= 100  # ragged: it keeps its bits
    found = quantize(weight, choice)
    assert found.extra[1] == choice.bits + 1
    assert found.extra[4] == choice.bits
    assert found.extra.sum() == 5 * choice.bits
    assert found.squared_error < quantize_debiased(weight, plain(text)).squared_error
    for group, bits in enumerate(found.extra.tolist()[:4]):  # each group is what plain rounding makes of it
        columns = slice(group * choice.group_size, (group + 1) * choice.group_size)
        alone = quantize_debiased(weight[:, columns], Choice(bits, choice.group_size, choice.symmetric or bits == 1))
        assert torch.equal(dequantize(found)[:, columns], dequantize(alone))


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_balanced_steps_match_brute_force(seed: int, groups: int) -> None:
    errors = np.random.default_rng(seed).random((3, groups)) * [[3.0], [1.5], [1.0]]
    found = balanced_steps(errors)
    assert found.sum() == 0
    options = (np.array(steps) for steps in itertools.product((-1, 0, 1), repeat=groups) if sum(steps) == 0)
    least = min(errors[steps + 1, np.arange(groups)].sum() for steps in options)
    assert errors[found + 1, np.arange(groups)].sum() == pytest.approx(least)


def test_groups_that_gain_nothing_keep_their_bits() -> None:
    assert not balanced_steps(np.zeros((3, 5))).any()
    assert balanced_steps(np.empty((3, 0))).shape == (0,)  # of a matrix narrower than a group


def test_importance_decides_where_bits_go() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    importance = np.ones(256, np.float32)
    importance[64:128] = 50
    found = quantize_slim(weight, parse_choice("2g64-slim"))
    assert found.extra.tolist() == [2, 2, 2, 2]
    found = rounder_of("debiased")(weight, parse_choice("2g64-slim"), importance=importance)
    assert found.extra[1] == 3
    assert found.squared_error == pytest.approx(restored_error(found, weight), rel=1e-6)
    found = rounder_of("debiased")(weight, parse_choice("1g128-pb4"), importance=importance)
    positions = found.extra.positions[:, 0]
    assert ((positions >= 64) & (positions < 128)).mean() > 0.95
    assert found.squared_error == pytest.approx(restored_error(found, weight), rel=1e-6)


def test_any_quantizer_may_fill_the_groups() -> None:
    asked = []

    def coarse(weight: torch.Tensor, choice: Choice, name: str) -> QuantizedMatrix:
        asked.append((str(choice), name))
        return quantize_debiased(weight.round(), choice, name)

    weight = weights("columns")
    worth = np.ones(300, np.float32)
    found = mixing(coarse)(weight, parse_choice("2g64-slim"), "layers.3", importance=worth)
    assert asked == [(text, "layers.3") for text in ("1g64s", "2g64", "3g64")]
    assert found.squared_error == pytest.approx(restored_error(found, weight), rel=1e-6)
    assert torch.equal(
        mixing(coarse)(weight, parse_choice("3g64")).codes, quantize_debiased(weight.round(), Choice(3, 64)).codes
    )


def test_salient_weights_are_the_outliers_and_nearly_exact() -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).sign() * 0.5
    weight[:, [5, 77, 200]] = torch.tensor([4.0, -3.0, 6.0])
    found = quantize(weight, parse_choice("1g128-pb4"))
    assert (found.extra.positions[:, 0] == np.array([5, 77, 255, 255])).all()
    assert (found.extra.positions[:, 1] == np.array([200 - 128, 255, 255, 255])).all()
    assert float((dequantize(found) - weight).abs().max()) < 4 / 127


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SALIENT)
def test_more_salient_weights_never_hurt_by_much(text: str, kind: str) -> None:
    """Each search ends where it stops helping, so that more may end a little worse, but no more than that."""
    weight = weights(kind)
    errors = [quantize(weight, parse_choice(text[:-1] + count)).squared_error for count in "248"]
    assert errors[1] <= errors[0] * 1.02 + 1e-9
    assert errors[2] <= errors[1] * 1.02 + 1e-9


@every_mix
def test_zeros_and_constants_survive(text: str) -> None:
    choice = parse_choice(text)
    zero = torch.zeros(4, 130)
    assert torch.equal(dequantize(quantize(zero, choice)), zero)
    if not choice.symmetric:
        constant = torch.full((4, 130), -0.75)
        assert torch.allclose(dequantize(quantize(constant, choice)), constant, rtol=2e-3)
    for size in (1e-9, 1e-25):  # below the smallest float16, and with squares below the smallest float32
        tiny = weights("gaussian") * size
        found = quantize(tiny, choice)
        assert torch.isfinite(dequantize(found)).all()
        assert found.squared_error == pytest.approx(restored_error(found, tiny), rel=1e-6, abs=0)


@every_mix
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 33), (33, 31), (2, 129)], ids=str)
def test_tiny_shapes_are_stored(text: str, shape: tuple[int, int]) -> None:
    weight = weights("heavy", *shape)
    found = quantize(weight, parse_choice(text))
    assert found.squared_error <= quantize_debiased(weight, plain(text)).squared_error * (1 + 1e-6) + 1e-12
    assert found.squared_error == pytest.approx(restored_error(found, weight), rel=1e-6, abs=1e-12)


@every_mix
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_what_fp16_cannot_hold_is_refused_by_name(text: str, bad: float) -> None:
    weight = weights("gaussian")
    weight[1, 2] = bad
    with pytest.raises(QuantizationError, match=r"layers\.9"):
        quantize(weight, parse_choice(text), "layers.9")


@every_mix
def test_models_of_float16_keep_room_for_rounding(text: str) -> None:
    weight = weights("gaussian").half()
    weight[1, 2] = 6e4
    with pytest.raises(QuantizationError, match=r"layers\.9 .*beyond 49128"):
        quantize(weight, parse_choice(text), "layers.9")
    quantize(weight.float(), parse_choice(text), "layers.9")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_mix
def test_weights_of_16_bits_are_taken_for_what_they_are(text: str, dtype: torch.dtype) -> None:
    weight, choice = weights("columns").to(dtype), parse_choice(text)
    found, wanted = quantize(weight, choice), quantize(weight.float(), choice)
    assert torch.equal(dequantize(found), dequantize(wanted))
    assert found.squared_error == wanted.squared_error


@every_mix
@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_twice_is_quantizing_once(text: str, kind: str) -> None:
    once = dequantize(quantize(weights(kind), parse_choice(text)))
    again = dequantize(quantize(once, parse_choice(text)))
    if "slim" in text:
        assert torch.equal(again, once)
    assert float((again - once).square().sum()) <= 1e-6 * float(once.square().sum())


@pytest.mark.parametrize("text", ["3g64-slim", "1g128-pb4"])
def test_result_does_not_depend_on_the_number_of_threads(text: str) -> None:
    weight = weights("columns", 300, 1024)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(quantize(weight, parse_choice(text)))
    torch.set_num_threads(threads)
    assert torch.equal(dequantize(results[0]), dequantize(results[1]))
    assert results[0].squared_error == results[1].squared_error
