"""What every format promises. A new one gets the whole suite by its line in the table."""

from __future__ import annotations

import pytest
import torch

from alphaq.errors import CheckpointError, ChoiceError
from alphaq.formats.base import Format
from alphaq.formats.blocks import decode, dequantize, dequantized_rows, encode, read_block_header
from alphaq.formats.coding import decode_tensor, encode_tensor
from alphaq.formats.native import NativeFormat, Parts
from alphaq.formats.table import FORMATS, format_of, formats, parse_choice, storage_bytes, stored_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.base import DEFAULT, rounder_of
from alphaq.quantizers.ggml import quantize_ggml

SHAPES = [(1, 1), (5, 33), (40, 300)]
NATIVE = [form for form in formats() if isinstance(form, NativeFormat)]
EXAMPLES = [parse_choice(text) for form in NATIVE for text in form.examples]
every_format = pytest.mark.parametrize("form", formats(), ids=lambda form: form.name)
every_example = pytest.mark.parametrize("choice", EXAMPLES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def rounded(choice: Choice, shape: tuple[int, int]) -> QuantizedMatrix:
    """Of weights whose columns differ in size, so that widths and salient weights differ too."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.linspace(-2, 2, shape[1]).exp()
    return rounder_of(DEFAULT)(weight, choice)


# -- names ----------------------------------------------------------------------------------------


def test_the_table_and_the_modules_agree() -> None:
    assert tuple(form.name for form in formats()) == FORMATS


@every_format
def test_every_choice_is_its_own_and_reads_as_it_is_written(form: Format) -> None:
    assert form.choices()
    assert len(set(form.choices())) == len(form.choices())
    for choice in form.choices():
        assert [other.name for other in formats() if other.owns(choice)] == [form.name], choice
        assert parse_choice(str(choice)) == choice
        assert format_of(stored_choice(choice)).stored(stored_choice(choice)) == stored_choice(choice)


@every_format
def test_examples_are_choices_of_the_format(form: Format) -> None:
    assert form.examples
    for text in form.examples:
        assert parse_choice(text) in form.choices()


@every_format
def test_another_grid_is_of_the_same_format_or_nothing_changes(form: Format) -> None:
    choice = form.choices()[0]
    found = form.regrouped(choice, 64, symmetric=True)
    assert form.owns(found)
    assert found == choice if not form.regroups else (found.group_size, found.symmetric) == (64, True)


@every_format
def test_narrower_choices_have_fewer_bits_and_the_same_groups(form: Format) -> None:
    for choice in form.choices():
        for cut in form.narrower(choice):
            assert format_of(cut).owns(cut)
            assert (cut.bits < choice.bits, cut.group_size) == (True, choice.group_size)


# -- bytes ----------------------------------------------------------------------------------------


@every_example
@every_shape
def test_a_block_has_exactly_the_bytes_that_were_promised(choice: Choice, shape: tuple[int, int]) -> None:
    block, form = encode(rounded(choice, shape)), format_of(choice)
    assert isinstance(form, NativeFormat)
    assert block.numel() == storage_bytes(choice, shape)
    assert block.numel() - 16 - sum(form.parts(choice, shape)) in range(16)
    assert isinstance(form.parts(choice, shape), Parts)


def test_kept_matrices_and_ggml_types_have_exact_bytes_too() -> None:
    assert storage_bytes(parse_choice("16"), (5, 33)) == torch.zeros(5, 33, dtype=torch.bfloat16).nbytes
    pytest.importorskip("xllamacpp")
    for choice in (parse_choice("Q4_K"), parse_choice("IQ4_NL")):
        assert quantize_ggml(torch.randn(3, 512), choice).codes.nbytes == storage_bytes(choice, (3, 512))


# -- blocks ---------------------------------------------------------------------------------------


@every_example
@every_shape
def test_a_block_comes_back_as_the_matrix_that_it_was(choice: Choice, shape: tuple[int, int]) -> None:
    matrix = rounded(choice, shape)
    block = encode(matrix)
    again = decode(block)
    assert (again.choice, again.shape) == (stored_choice(choice), shape) == read_block_header(block, "w")
    assert torch.equal(encode(again), block)
    assert torch.equal(again.codes, matrix.codes)
    assert torch.equal(dequantize(again), dequantize(matrix))


@every_example
def test_some_rows_are_those_of_the_whole(choice: Choice) -> None:
    matrix = rounded(choice, (40, 300))
    assert torch.equal(dequantized_rows(matrix, slice(7, 19)), dequantize(matrix)[7:19])
    assert torch.equal(dequantize(matrix, torch.bfloat16, slice(7, 19)), dequantize(matrix)[7:19].bfloat16())


@every_example
@every_shape
def test_a_coded_block_comes_back_to_the_bit(choice: Choice, shape: tuple[int, int]) -> None:
    block = encode(rounded(choice, shape))
    assert torch.equal(decode_tensor(encode_tensor(block)), block)


@every_example
@pytest.mark.parametrize("damage", ["short", "long", "empty", "magic", "version", "bits", "group", "flags", "rows"])
def test_a_damaged_header_is_refused_by_name(choice: Choice, damage: str) -> None:
    block = encode(rounded(choice, (5, 33))).clone()
    places = {"magic": 0, "version": 2, "bits": 3, "group": 4, "flags": 6, "rows": 8}
    if damage in places:
        block[places[damage]] ^= 0x7E if damage == "flags" else 0x7F
    else:
        block = {"short": block[:-16], "long": torch.cat([block, block[:16]]), "empty": block[:0]}[damage]
    with pytest.raises(CheckpointError, match=r"^layers\.3 is not a native block"):
        decode(block, "layers.3")


@every_example
def test_scales_that_are_no_numbers_are_refused_by_name(choice: Choice) -> None:
    block, form = encode(rounded(choice, (5, 33))).clone(), format_of(choice)
    assert isinstance(form, NativeFormat)
    parts = form.parts(choice, (5, 33))
    at = 16 + parts.codes + parts.offsets
    block[at : at + 2] = torch.tensor([float("nan")], dtype=torch.float16).view(torch.uint8)
    with pytest.raises(CheckpointError, match=r"^layers\.3 has scales that are not finite"):
        decode(block, "layers.3")


def test_no_two_formats_have_the_same_number_in_headers() -> None:
    numbers = [
        (number, bits) for form in NATIVE for number in form.kinds.values() for bits in form.widths
    ]  # plain integers and bits share theirs
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("text", ["16", "Q4_K"])
def test_what_has_no_blocks_is_refused(text: str) -> None:
    empty = torch.zeros(1, 144, dtype=torch.uint8)
    with pytest.raises(ChoiceError, match="is not stored in native blocks"):
        encode(QuantizedMatrix(parse_choice(text), (1, 256), empty, None, None))
