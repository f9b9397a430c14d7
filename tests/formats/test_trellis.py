"""Trellis codes: names, bytes, and values told bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alphaq.errors import ChoiceError
from alphaq.formats.blocks import dequantize, encode
from alphaq.formats.table import code_bits, parse_choice, storage_bytes
from alphaq.formats.trellis import FORMAT, LEVELS, LINEAR, SQUARE, state_levels
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix

RATES = [str(choice) for choice in FORMAT.choices()]


def random_matrix(text: str, rows: int = 3, columns: int = 77) -> QuantizedMatrix:
    """Random bits: every stream stands for something."""
    choice, generator = parse_choice(text), torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, (rows, FORMAT.row_bytes(choice, columns)), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(rows, choice.groups(columns), generator=generator) + 0.1).half()
    return QuantizedMatrix(choice, (rows, columns), codes, scales, None)


def values_told_bit_by_bit(matrix: QuantizedMatrix) -> np.ndarray:
    """As the format's page says it, in Python's own numbers."""
    quarters, (rows, columns) = int(4 * float(str(matrix.choice)[1:])), matrix.shape
    values = np.empty((rows, columns), np.float32)
    for row in range(rows):
        stream = int.from_bytes(matrix.codes[row].numpy().tobytes(), "little") << 10  # zeros before the row
        for column in range(columns):
            state = stream >> ((column + 1) * quarters // 4) & 1023
            level = LEVELS[state * (LINEAR + SQUARE * state) % 1024 // 8]
            values[row, column] = np.float32(matrix.scales[row, 0]) / np.float32(128) * np.float32(level)
    return values


@pytest.mark.parametrize("text", RATES)
def test_each_value_is_told_by_the_ten_bits_before_its_end(text: str) -> None:
    matrix = random_matrix(text)
    assert np.array_equal(dequantize(matrix).numpy(), values_told_bit_by_bit(matrix))


def test_rates_are_quarters_from_1_to_4() -> None:
    assert RATES[:6] == ["t1", "t1.25", "t1.5", "t1.75", "t2", "t2.25"]
    assert (len(RATES), RATES[-1]) == (13, "t4")
    assert [code_bits(choice) for choice in FORMAT.choices()] == [quarters / 4 for quarters in range(4, 17)]
    assert parse_choice("t2.50") == parse_choice("t2.5") == Choice(2, 65535, symmetric=True, name="t2.5")


@pytest.mark.parametrize("text", ["t0", "t0.75", "t4.25", "t5", "t2.1", "t2.125"])
def test_other_rates_are_refused(text: str) -> None:
    with pytest.raises(ChoiceError, match=r"1 to 4 bits in quarters.*Write for example t2\.25"):
        parse_choice(text)


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        ("t2", (1408, 2048), 16 + 1408 * 512 + 2 * 1408),
        ("t2.25", (1408, 2048), 16 + 1408 * 576 + 2 * 1408),
        ("t1.25", (3, 33), 16 + 3 * 8 + 6 + 2),  # 41 bits take two words; padded
        ("t4", (2, 70000), 16 + 2 * 35000 + 2 * 2 * 2 + 8),  # two scales a row
    ],
)
def test_bytes_are_streams_and_scales(text: str, shape: tuple[int, int], expected: int) -> None:
    assert storage_bytes(parse_choice(text), shape) == expected


def test_a_block_has_these_bytes() -> None:
    choice = parse_choice("t1.5")
    codes = torch.tensor([[0x96, 0x01, 0, 0]], dtype=torch.uint8)
    block = encode(QuantizedMatrix(choice, (1, 6), codes, torch.tensor([[2.0]]).half(), None))
    header = [*b"AQ", 1, 1, 255, 255, 19, 0, 1, 0, 0, 0, 6, 0, 0, 0]  # kind 9 and no zero points: 9·2 + 1
    assert block.tolist() == [*header, 0x96, 1, 0, 0, 0, 0x40, *[0] * 10]


def test_all_levels_occur_equally_often_and_on_both_sides() -> None:
    levels = state_levels().astype(int)
    assert sorted(levels) == sorted(np.repeat(LEVELS.astype(int), 8))
    assert sorted(levels) == sorted(-levels)
    assert (levels.min(), levels.max()) == (-127, 127)


def test_rows_beyond_the_largest_group_have_several_scales() -> None:
    matrix = random_matrix("t1", rows=1, columns=65537)
    one = QuantizedMatrix(matrix.choice, matrix.shape, matrix.codes, torch.ones(1, 2).half(), None)
    assert torch.allclose(
        dequantize(matrix), dequantize(one) * matrix.scales.float().repeat_interleave(65535, 1)[:, :65537]
    )
