"""Codes whose top bits are codes: what can be cut off, and what that costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaq.errors import ChoiceError
from alphaq.formats.blocks import decode, dequantize, encode
from alphaq.formats.packing import unpack
from alphaq.formats.table import parse_choice, storage_bytes
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.quantizers.nested import quantize_nested

WIDTHS = range(2, 9)


def nest(bits: int, group: int = 128) -> Choice:
    return parse_choice(f"{bits}g{group}-nest")


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def codes_of(matrix: QuantizedMatrix) -> np.ndarray:
    return unpack(matrix.codes.numpy(), matrix.choice.bits, matrix.shape[1])


def squared(weight: torch.Tensor, restored: torch.Tensor) -> float:
    return float((weight.double() - restored.double()).square().sum())


def test_a_nested_choice_is_written_and_read_back() -> None:
    assert str(nest(4)) == "4g128-nest"
    assert parse_choice("4g128-nest") == parse_choice("4-nest") == nest(4)
    for text in ("1g128-nest", "16-nest", "4g16-nest"):
        with pytest.raises(ChoiceError):
            parse_choice(text)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", WIDTHS)
def test_values_are_odd_halves_of_a_step(bits: int, group: int) -> None:
    found = quantize_nested(gaussian(7, 200), nest(bits, group))
    steps = found.scales.float().repeat_interleave(group, 1)[:, :200]
    levels = torch.from_numpy(codes_of(found).astype(np.float32)) - 2 ** (bits - 1) + 0.5
    assert torch.allclose(dequantize(found), levels * steps, rtol=1e-6)
    assert codes_of(found).max() < 2**bits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("bits", WIDTHS)
def test_top_bits_are_the_codes_of_every_narrower_width(bits: int, group: int, seed: int) -> None:
    weight = gaussian(20, 300, seed) ** (3 if seed == 2 else 1)
    wide = quantize_nested(weight, nest(bits, group))
    for narrower in range(2, bits):
        cut = quantize_nested(dequantize(wide), nest(narrower, group))
        assert np.array_equal(codes_of(cut), codes_of(wide) >> (bits - narrower)), narrower


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_top_bit_is_the_sign(bits: int) -> None:
    """To which a slice may come down: one bit without a mean."""
    wide = quantize_nested(gaussian(20, 300), nest(bits))
    signs = quantize_debiased(dequantize(wide), Choice(1, 128, symmetric=True))
    assert np.array_equal(codes_of(signs), codes_of(wide) >> (bits - 1))


def test_cutting_in_two_steps_gives_the_codes_of_one() -> None:
    wide = quantize_nested(gaussian(20, 256), nest(6))
    middle = quantize_nested(dequantize(wide), nest(4))
    assert np.array_equal(
        codes_of(quantize_nested(dequantize(middle), nest(2))), codes_of(quantize_nested(dequantize(wide), nest(2)))
    )


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    bits=st.sampled_from(WIDTHS),
    group=st.sampled_from((32, 64, 128)),
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    unit=st.sampled_from((1e-3, 1.0, 100.0)),
    kind=st.sampled_from(("gaussian", "cubes", "sparse", "positive", "grid")),
    seed=st.integers(0, 2**16),
)
def test_quantizing_again_changes_nothing(
    bits: int, group: int, rows: int, columns: int, unit: float, kind: str, seed: int
) -> None:
    weight = gaussian(rows, columns, seed)
    weight = unit * {
        "gaussian": weight,
        "cubes": weight**3,
        "sparse": weight * (weight > 1),
        "positive": weight.abs() + 1,
        "grid": (3 * weight).round(),
    }.get(kind, weight)
    once = dequantize(quantize_nested(weight, nest(bits, group)))
    assert torch.equal(dequantize(quantize_nested(once, nest(bits, group))), once)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_two_bits_lose_less_than_with_a_zero_point(group: int) -> None:
    """And take fewer bytes."""
    weight = gaussian(128, 512)
    found, plain = quantize_nested(weight, nest(2, group)), quantize_debiased(weight, Choice(2, group))
    assert found.squared_error is not None
    assert plain.squared_error is not None
    assert found.squared_error < plain.squared_error
    assert encode(found).numel() < encode(plain).numel()


@pytest.mark.parametrize("heavy", [False, True])
def test_four_bits_lose_little_for_being_cut_down(heavy: bool) -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(5.0).sample((128, 512)) if heavy else gaussian(128, 512)
    found = quantize_nested(weight, nest(4))
    assert found.squared_error is not None
    assert found.squared_error <= 1.25 * squared(weight, dequantize(quantize_debiased(weight, Choice(4, 128, True))))


@pytest.mark.parametrize("narrower", [2, 3])
def test_a_cut_loses_little_more_than_codes_made_for_its_width(narrower: int) -> None:
    weight = gaussian(128, 512)
    cut = dequantize(quantize_nested(dequantize(quantize_nested(weight, nest(4))), nest(narrower)))
    own = dequantize(quantize_nested(weight, nest(narrower)))
    assert squared(weight, cut) < 1.15 * squared(weight, own)


@pytest.mark.parametrize("bits", WIDTHS)
def test_more_bits_and_smaller_groups_reduce_the_error(bits: int) -> None:
    weight = gaussian(64, 512)
    errors = [quantize_nested(weight, nest(bits, group)).squared_error or 0.0 for group in (32, 64, 128)]
    assert errors == sorted(errors)
    if bits < 8:
        assert (quantize_nested(weight, nest(bits + 1)).squared_error or 0.0) < 0.5 * errors[-1]


@pytest.mark.parametrize("bits", WIDTHS)
def test_zeros_stay_zeros(bits: int) -> None:
    """Though no level is one: the scale is."""
    weight = gaussian(3, 256)
    weight[1, :128] = 0
    restored = dequantize(quantize_nested(weight, nest(bits)))
    assert not restored[1, :128].any()
    assert restored[1, 128:].all()
    assert torch.equal(dequantize(quantize_nested(torch.zeros(3, 200), nest(bits))), torch.zeros(3, 200))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("outlier", [3e4, -3e4])
def test_a_huge_outlier_matters_in_its_group_alone(bits: int, outlier: float) -> None:
    weight = gaussian(4, 512)
    spoiled = weight.clone()
    spoiled[2, 300] = outlier
    before, after = (dequantize(quantize_nested(values, nest(bits))) for values in (weight, spoiled))
    assert torch.isfinite(after).all()
    assert float(after[2, 300]) == pytest.approx(outlier, rel=0.5)
    after[2, 256:384] = before[2, 256:384]
    assert torch.equal(before, after)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [1, 15, 31, 129, 143, 255])
def test_ragged_last_group_is_a_group_by_itself(bits: int, columns: int) -> None:
    weight = gaussian(3, columns)
    together = quantize_nested(weight, nest(bits))
    parts = [quantize_nested(part.contiguous(), nest(bits)) for part in weight.split(128, dim=1)]
    assert np.array_equal(codes_of(together), np.concatenate([codes_of(part) for part in parts], 1))
    assert torch.equal(together.scales, torch.cat([part.scales for part in parts], 1))
    assert together.squared_error == pytest.approx(sum(part.squared_error or 0.0 for part in parts), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_what_is_read_is_what_was_stored_in_as_many_bytes_as_promised(bits: int, dtype: torch.dtype) -> None:
    weight = gaussian(21, 200).to(dtype)
    found = quantize_nested(weight, nest(bits, 64))
    stored = encode(found)
    code_bytes, scale_bytes = 21 * 4 * -(-200 * bits // 32), 2 * 21 * 4
    assert stored.numel() == storage_bytes(nest(bits, 64), (21, 200)) == -(-(16 + code_bytes + scale_bytes) // 16) * 16
    again = decode(stored)
    assert again.choice == nest(bits, 64)
    assert again.offsets is None
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(dequantize(again), dequantize(found))
    assert found.squared_error == pytest.approx(squared(weight, dequantize(found)), rel=1e-5)
