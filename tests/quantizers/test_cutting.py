"""Narrow codes out of wide ones, against rounding what the wide ones stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.base import rounder_of
from alphaq.quantizers.cutting import can_cut, cut, cut_errors, cutting
from alphaq.quantizers.nested import quantize_nested
from alphaq.quantizers.packing import decode, dequantize, encode, unpack
from alphaq.simd.sums import squared_norm

LIVE = [row for row in range(48) if row != 3]  # zeros have either sign at 1 bit


def held(bits: int, group: int = 64, columns: int = 200, scale: float = 0.02) -> QuantizedMatrix:
    weight = scale * torch.randn(48, columns, generator=torch.Generator().manual_seed(bits))
    weight[3] = 0.0
    return quantize_nested(weight, Choice(bits, group, symmetric=True, mix="nest"))


def narrower(found: QuantizedMatrix) -> list[Choice]:
    own = found.choice
    nested = [Choice(bits, own.group_size, symmetric=True, mix="nest") for bits in range(2, own.bits)]
    return [Choice(1, own.group_size, symmetric=True), *nested]


@pytest.mark.parametrize("columns", [64, 200, 203, 31])
@pytest.mark.parametrize("bits", range(2, 9))
def test_cutting_is_rounding_what_the_codes_stand_for(bits: int, columns: int) -> None:
    wide = held(bits, columns=columns)
    values = dequantize(wide)
    for choice in narrower(wide):
        found, energy = cut(wide, choice)
        slow = rounder_of("debiased")(values, choice, "w")
        assert torch.equal(found.codes[LIVE], slow.codes[LIVE])
        ulps = found.scales.view(torch.int16).int() - slow.scales.view(torch.int16).int()
        assert ulps.abs().max() <= 1  # ours add up whole numbers, theirs float32
        assert energy == pytest.approx(squared_norm(values))
        again = decode(encode(found))
        assert found.squared_error == pytest.approx(float((dequantize(again) - values).double().square().sum()))
        assert np.array_equal(
            unpack(found.codes.numpy(), choice.bits, columns),
            unpack(wide.codes.numpy(), bits, columns) >> (bits - choice.bits),
        )


@pytest.mark.parametrize("scale", [1e-7, 1.0, 4000.0])
def test_small_and_large_weights_are_cut_like_others(scale: float) -> None:
    wide = held(4, scale=scale)
    for choice in narrower(wide):
        found, _ = cut(wide, choice)
        assert torch.isfinite(found.scales).all()
        slow = rounder_of("debiased")(dequantize(wide), choice, "w")
        assert torch.equal(found.codes[LIVE], slow.codes[LIVE]) or scale < 1e-6
        assert float((dequantize(found) - dequantize(wide)).abs().max()) < 16 * scale


def test_what_codes_hold() -> None:
    four = Choice.parse("4g128-nest")
    for text, can in (
        ("4g128-nest", True),
        ("3g128-nest", True),
        ("2g128-nest", True),
        ("1g128s", True),
        ("5g128-nest", False),
        ("3g64-nest", False),
        ("1g128", False),
        ("2g128", False),
        ("2g128s", False),
        ("16", False),
        ("@2", False),
    ):
        assert can_cut(four, Choice.parse(text)) is can, text
    assert can_cut(Choice.parse("2g128"), Choice.parse("2g128"))
    assert not can_cut(Choice.parse("4g128s"), Choice.parse("2g128s"))


def test_what_is_not_cut_stays_as_it_is_or_is_rounded() -> None:
    wide = held(4)
    same, _ = cut(wide, wide.choice)
    assert same.squared_error == 0.0
    assert torch.equal(encode(same), encode(wide))
    quantize = cutting(wide, rounder_of("debiased"))
    values = dequantize(wide)
    usual = Choice.parse("2g64")
    assert torch.equal(encode(quantize(values, usual, "w")), encode(rounder_of("debiased")(values, usual, "w")))
    nested = Choice.parse("2g64-nest")
    assert torch.equal(encode(quantize(values, nested, "w")), encode(cut(wide, nested)[0]))


def test_errors_are_exact_and_come_with_the_energy() -> None:
    wide = held(4)
    choices = (*narrower(wide), wide.choice)
    errors = cut_errors(wide, choices)
    assert errors.expected[wide.choice] == 0.0
    assert errors.energy == pytest.approx(squared_norm(dequantize(wide)))
    assert [errors.expected[one] for one in choices] == sorted(errors.expected.values(), reverse=True)
    assert cut_errors(wide, (wide.choice,)).energy == pytest.approx(errors.energy)
    assert cut_errors(wide, (Choice.parse("2g64"),)).expected == {}
    assert cut_errors(wide, (Choice.parse("2g64"), *choices)) == errors
