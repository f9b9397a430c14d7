"""Narrow codes out of wide ones, against rounding what the wide ones stand for."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from alphaq.formats.blocks import decode, dequantize, encode
from alphaq.formats.packing import unpack
from alphaq.formats.table import parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.base import rounder_of
from alphaq.quantizers.cutting import can_cut, cut
from alphaq.quantizers.nested import quantize_nested
from alphaq.quantizers.rounded import SourceMatrix
from alphaq.simd.sums import squared_norm

LIVE = [row for row in range(48) if row != 3]  # zeros have either sign at 1 bit


def held(bits: int, group: int = 64, columns: int = 200, scale: float = 0.02) -> QuantizedMatrix:
    weight = scale * torch.randn(48, columns, generator=torch.Generator().manual_seed(bits))
    weight[3] = 0.0
    return quantize_nested(weight, parse_choice(f"{bits}g{group}-nest"))


def narrower(found: QuantizedMatrix) -> list[Choice]:
    own = found.choice
    nested = [parse_choice(f"{bits}g{own.group_size}-nest") for bits in range(2, own.bits)]
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


def source_of(held: QuantizedMatrix) -> SourceMatrix:
    """A matrix of a checkpoint that holds these codes."""
    matrix = MatrixRef("w", held.shape, "F32", 0, 0, "up", Role.EXPERT, "w")
    source = SourceMatrix(cast(Any, None), matrix)
    vars(source).update(codes=held, weight=dequantize(held))
    return source


def test_what_codes_hold() -> None:
    four = parse_choice("4g128-nest")
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
        assert can_cut(four, parse_choice(text)) is can, text
    assert can_cut(parse_choice("2g128"), parse_choice("2g128"))
    assert not can_cut(parse_choice("4g128s"), parse_choice("2g128s"))


def test_what_is_not_cut_stays_as_it_is_or_is_rounded() -> None:
    wide = held(4)
    same, _ = cut(wide, wide.choice)
    assert same.squared_error == 0.0
    assert torch.equal(encode(same), encode(wide))
    source, values = source_of(wide), dequantize(wide)
    usual = parse_choice("2g64")
    assert torch.equal(source.at(usual).native(), encode(rounder_of("debiased")(values, usual, "w")))
    nested = parse_choice("2g64-nest")
    assert torch.equal(source.at(nested).native(), encode(cut(wide, nested)[0]))


def test_errors_are_exact_and_come_with_the_energy() -> None:
    wide = held(4)
    choices = (*narrower(wide), wide.choice)
    errors = source_of(wide).errors(choices)
    assert errors.expected[wide.choice] == 0.0
    assert errors.energy == pytest.approx(squared_norm(dequantize(wide)))
    assert [errors.expected[one] for one in choices] == sorted(errors.expected.values(), reverse=True)
    assert source_of(wide).errors((wide.choice,)).energy == pytest.approx(errors.energy)
    more = source_of(wide).errors((parse_choice("2g64"), *choices))
    assert {one: more.expected[one] for one in choices} == errors.expected
    assert more.energy == errors.energy
