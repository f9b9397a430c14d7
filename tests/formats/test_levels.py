"""What codes stand for is written once, in `formats.base.levels_of_bits`; kernels that have it inline agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alphaq.formats.base import levels_of_bits
from alphaq.formats.blocks import decode, dequantize, encode, native_format
from alphaq.formats.levels import Grid, grid_of
from alphaq.formats.packing import pack, unpack
from alphaq.formats.table import format_of, formats, parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.base import DEFAULT, rounder_of
from alphaq.quantizers.gptq import quantize_gptq
from alphaq.runtime.lookup import BlockForm, restored_rows
from alphaq.runtime.multiply import multiply
from alphaq.runtime.packed import PackedWeights

SHAPE = (37, 200)
ON_ONE_GRID = [choice for form in formats() if form.one_grid for choice in form.choices() if choice.group_size == 32]


def rounded(choice: Choice) -> QuantizedMatrix:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(choice.bits))
    return rounder_of(DEFAULT)(weight, choice)


def values_of(matrix: QuantizedMatrix, grid: Grid) -> torch.Tensor:
    """ŵ = step·(q − zero) + mean, float64."""
    codes = torch.from_numpy(unpack(matrix.codes.numpy(), matrix.choice.bits, matrix.shape[1])).double()
    spread = (
        part.double().repeat_interleave(matrix.choice.group_size, 1)[:, : matrix.shape[1]]
        for part in (grid.step, grid.zero, grid.mean)
    )
    step, zero, mean = spread
    return step * (codes - zero) + mean


@pytest.mark.parametrize("choice", ON_ONE_GRID, ids=str)
def test_every_kernel_restores_the_levels_of_the_table(choice: Choice) -> None:
    matrix = rounded(choice)
    wanted = values_of(matrix, grid_of(matrix))
    tolerance = dict(rtol=1e-6, atol=1e-6)
    assert torch.allclose(dequantize(matrix).double(), wanted, **tolerance)
    block = encode(matrix)
    rows = restored_rows(block, BlockForm.of(decode(block).choice, SHAPE), torch.arange(SHAPE[0]))
    assert torch.allclose(rows.double(), wanted, **tolerance)
    packed = PackedWeights([["w"]], SHAPE)
    packed.fill([[block]])
    ones, none = torch.eye(SHAPE[1]), torch.zeros(SHAPE[1], dtype=torch.int64)
    columns = multiply(ones, packed, none, torch.arange(SHAPE[1])).T  # many tokens: rows are restored
    assert torch.allclose(columns.double(), wanted, rtol=1e-5, atol=1e-5)
    few = multiply(ones[:8], packed, none[:8], torch.arange(8)).T  # few: codes are multiplied
    assert torch.allclose(few.double(), wanted[:, :8], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("choice", ON_ONE_GRID, ids=str)
def test_the_quantizers_own_error_is_the_one_of_these_levels(choice: Choice) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(choice.bits))
    for matrix in (rounded(choice), quantize_gptq(weight, choice, "w", torch.eye(SHAPE[1]))):
        miss = weight.double() - values_of(matrix, grid_of(matrix))
        assert matrix.squared_error == pytest.approx(float(miss.square().sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["affine", "symmetric16"])
def test_other_engines_levels_are_told_by_their_offsets(name: str) -> None:
    choice = Choice(4, 32, symmetric=name == "symmetric16")
    weight = torch.randn(16, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    matrix = rounder_of(name)(weight, choice, "w")
    assert torch.allclose(dequantize(matrix).double(), values_of(matrix, grid_of(matrix)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_lie_about_zero(bits: int) -> None:
    assert levels_of_bits(bits).zero == 2 ** (bits - 1) if bits > 1 else levels_of_bits(1).zero == 0.5
    codes = np.arange(2**bits)
    for halves in (False, True):
        levels = levels_of_bits(bits, halves)
        values = levels.stretch * (codes - levels.zero)
        assert (values == -values[::-1]).all() or (not halves and bits > 1 and values[1:].sum() == 0)


@pytest.mark.parametrize(("text", "zero"), [("2g32", 2), ("1g32", 0.5), ("2g32-nest", 1.5), ("2g32s@1", 2)])
def test_a_format_says_which_levels_it_has(text: str, zero: float) -> None:
    assert native_format(parse_choice(text)).levels(parse_choice(text)).zero == zero


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_quantizer_packs_like_the_plain_function(bits: int) -> None:
    matrix = rounded(Choice(bits, 64))
    codes = unpack(matrix.codes.numpy(), bits, SHAPE[1])
    assert (pack(codes, bits) == matrix.codes.numpy()).all()
    assert format_of(matrix.choice).one_grid
