"""Rows of a block, restored alone, are those of the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alphaq.engines.native import PROFILE
from alphaq.formats.blocks import decode, dequantize, encode
from alphaq.formats.native import kind_of
from alphaq.formats.table import format_of, parse_choice
from alphaq.nouns.choice import Choice
from alphaq.quantizers.base import rounder_of
from alphaq.runtime.lookup import BlockForm, restored_rows

KINDS = sorted({(choice.bits, choice.symmetric, kind_of(choice)) for choice in PROFILE.choices if not choice.kept})


def block_of(choice: Choice, shape: tuple[int, int]) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(choice.bits))
    return encode(rounder_of("debiased")(weight, choice, "table"))


@pytest.mark.parametrize("shape", [(37, 200), (64, 96)], ids=["ragged", "whole"])
@pytest.mark.parametrize(("bits", "symmetric", "mix"), KINDS)
def test_rows_are_those_of_the_whole_matrix(bits: int, symmetric: bool, mix: str, shape: tuple[int, int]) -> None:
    rows = torch.tensor([shape[0] - 1, 0, 7, 7, 31])
    for group_size in (32, 64, 128):
        choice = parse_choice(f"{bits}g{group_size}{'s' * symmetric}{mix and '-' + mix}")
        block = block_of(choice, shape)
        assert torch.equal(restored_rows(block, BlockForm.of(choice, shape), rows), dequantize(decode(block))[rows])


@pytest.mark.parametrize("choice", format_of(parse_choice("t2")).choices(), ids=str)
@pytest.mark.parametrize("shape", [(32, 203), (40, 1)], ids=["ragged", "thin"])
def test_rows_of_trellis_codes_are_told_without_those_before(choice: Choice, shape: tuple[int, int]) -> None:
    rows, block = torch.tensor([shape[0] - 1, 0, 7, 7]), block_of(choice, shape)
    assert torch.equal(restored_rows(block, BlockForm.of(choice, shape), rows), dequantize(decode(block))[rows])


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that was made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.most = max(self.most, made.numel() if isinstance(made, torch.Tensor) else 0)
        return made


def test_nothing_made_is_larger_than_what_is_looked_up_however_wide_groups_are() -> None:
    choice, shape, rows = parse_choice("t2"), (32, 64), torch.arange(32).repeat(4)
    block = block_of(choice, shape)
    with Largest() as largest:
        restored_rows(block, BlockForm.of(choice, shape), rows)
    assert largest.most == len(rows) * shape[1]


def test_no_rows_are_no_error() -> None:
    choice, none = Choice(3, 32), torch.zeros(0, dtype=torch.int64)
    assert restored_rows(block_of(choice, (8, 64)), BlockForm.of(choice, (8, 64)), none).shape == (0, 64)


@pytest.mark.parametrize("row", [8, -1])
def test_a_row_that_is_not_there_is_an_error(row: int) -> None:
    choice = Choice(4, 64)
    with pytest.raises((IndexError, RuntimeError)):
        restored_rows(block_of(choice, (8, 64)), BlockForm.of(choice, (8, 64)), torch.tensor([row]))
