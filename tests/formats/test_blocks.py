import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaq.errors import CheckpointError
from alphaq.formats.blocks import decode, dequantize, encode, native_format
from alphaq.formats.packing import pack, unpack
from alphaq.formats.salient import SalientWeights
from alphaq.formats.table import parse_choice, storage_bytes
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.quantizers.salience import mixing

quantize = mixing(quantize_debiased)
plain_choices = st.builds(Choice, st.integers(1, 8), st.sampled_from((32, 64, 128)), st.booleans())
mixed_choices = st.builds(
    lambda kind, group, symmetric: parse_choice(kind, group, symmetric),
    st.sampled_from([f"{bits}-slim" for bits in range(2, 8)] + ["1-pb2", "1-pb4", "1-pb8"]),
    st.sampled_from((32, 64, 128)),
    st.booleans(),
)


def test_pack_3bit_known_block() -> None:
    # 1, 2, 3, …: bits 100 010 110 001 101 …, least significant first, give 0o…54321
    codes = np.array([[1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]], dtype=np.uint8)
    expected = 0o32107654321 & 0xFFFFFFFF
    words = pack(codes, 3)
    assert words.shape == (1, 8)
    assert words.view(np.uint32).tolist() == [[expected, 3 >> 2]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_agrees_with_compressed_tensors_order(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 64), dtype=np.uint8)
    as_integers = [sum(int(code) << (bits * place) for place, code in enumerate(row)) for row in codes]
    packed = [int.from_bytes(row.tobytes(), "little") for row in pack(codes, bits)]
    assert packed == as_integers


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_unpack_inverts_pack(bits: int, rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, count), dtype=np.uint8)
    words = pack(codes, bits)
    assert words.shape == (rows, 4 * -(-count * bits // 32))
    assert (unpack(words, bits, count) == codes).all()


@settings(deadline=None, max_examples=100)
@given(plain_choices | mixed_choices, st.integers(1, 40), st.integers(1, 300))
def test_block_round_trips_and_has_the_promised_size(choice: Choice, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    weight *= torch.linspace(-2, 2, columns).exp()  # so that widths differ
    matrix = quantize(weight, choice)
    block = encode(matrix)
    assert block.numel() == storage_bytes(choice, (rows, columns))
    again = decode(block)
    assert again.choice == choice
    assert torch.equal(again.codes, matrix.codes)
    assert torch.equal(again.scales, matrix.scales)
    assert torch.equal(dequantize(again), dequantize(matrix))
    assert torch.equal(encode(again), block)


def test_golden_block() -> None:
    matrix = QuantizedMatrix(
        Choice(2, 32),
        (1, 4),
        torch.tensor([[0b11100100, 0, 0, 0]], dtype=torch.uint8),
        torch.tensor([[0.5]], dtype=torch.float16),
        torch.tensor([[1]], dtype=torch.uint8),
    )
    header = b"AQ\x01\x02\x20\x00\x00\x00\x01\x00\x00\x00\x04\x00\x00\x00"
    content = b"\xe4\x00\x00\x00" + b"\x01\x00\x00\x00" + b"\x00\x38"
    assert bytes(encode(matrix).tolist()) == (header + content).ljust(32, b"\0")
    assert dequantize(matrix).tolist() == [[-0.5, 0.0, 0.5, 1.0]]


def test_golden_block_of_several_widths() -> None:
    matrix = QuantizedMatrix(
        parse_choice("2g32-slim"),
        (1, 64),
        torch.tensor([[0b10, 0, 0, 0] + [0b01_010_001, 0, 0, 0] + [0] * 8], dtype=torch.uint8),
        torch.tensor([[0.5, 0.25]], dtype=torch.float16),
        torch.tensor([[0, 1]], dtype=torch.uint8),
        extra=np.array([1, 3], np.uint8),
    )
    header = b"AQ\x01\x02\x20\x00\x02\x00\x01\x00\x00\x00\x40\x00\x00\x00"
    codes = b"\x02\x00\x00\x00" + b"\x51" + bytes(11)
    zero_points = b"\x00\x00\x00\x00" + b"\x01" + bytes(11)
    content = codes + zero_points + b"\x00\x38\x00\x34" + b"\x01\x03"
    assert bytes(encode(matrix).tolist()) == (header + content).ljust(64, b"\0")
    values = dequantize(matrix)[0].tolist()
    assert values[:3] == [-0.5, 0.5, -0.5]
    assert values[32:36] == [0.0, 0.25, 0.0, -0.25]
    stray = encode(matrix).clone()
    stray[32] = 1  # a zero point of 1 bit
    assert torch.equal(dequantize(decode(stray)), dequantize(matrix))


def test_golden_block_of_salient_weights() -> None:
    matrix = QuantizedMatrix(
        parse_choice("1g32-pb2"),
        (1, 4),
        torch.tensor([[0b0110, 0, 0, 0]], dtype=torch.uint8),
        torch.tensor([[0.5]], dtype=torch.float16),
        torch.tensor([[0.25]], dtype=torch.float16),
        extra=SalientWeights(
            np.array([[2.0]], np.float16), np.array([[[2, 255]]], np.uint8), np.array([[[131, 128]]], np.uint8)
        ),
    )
    header = b"AQ\x01\x01\x20\x00\x04\x00\x01\x00\x00\x00\x04\x00\x00\x00"
    content = b"\x06\x00\x00\x00" + b"\x00\x34" + b"\x00\x38" + b"\x00\x40" + b"\x02\xff" + b"\x83\x80"
    assert bytes(encode(matrix).tolist()) == (header + content).ljust(32, b"\0")
    assert dequantize(matrix).tolist() == [[-0.25, 0.75, 6.0, -0.25]]


@pytest.mark.parametrize("damage", ["short", "magic", "version", "bits", "rows", "empty"])
def test_damaged_block_is_refused_by_name(damage: str) -> None:
    block = encode(quantize_debiased(torch.randn(4, 64), Choice(3, 32))).clone()
    if damage == "short":
        block = block[:-16]
    elif damage == "empty":
        block = block[:0]
    else:
        block[{"magic": 0, "version": 2, "bits": 3, "rows": 8}[damage]] ^= 0x7F
    with pytest.raises(CheckpointError, match=r"layers\.3 is not a native block"):
        decode(block, "layers.3")


def mixed_block(text: str) -> tuple[torch.Tensor, int]:
    """A block of 4 × 80 weights whose last group is ragged, and where its mix begins."""
    choice = parse_choice(text)
    weight = torch.randn(4, 80, generator=torch.Generator().manual_seed(0)) * torch.linspace(-2, 2, 80).exp()
    return encode(quantize(weight, choice)).clone(), 16 + sum(native_format(choice).parts(choice, (4, 80))[:3])


@pytest.mark.parametrize(
    "widths",
    [
        (1, 2, 3),  # the ragged group has its own
        (1, 2, 2),
        (3, 3, 2),
        (0, 4, 2),
        (255, 1, 2),
    ],
)
def test_widths_that_cannot_be_are_refused_by_name(widths: tuple[int, ...]) -> None:
    block, begin = mixed_block("2g32-slim")
    assert block[begin : begin + 3].tolist() == [1, 3, 2]
    block[begin : begin + 3] = torch.tensor(widths)
    with pytest.raises(CheckpointError, match=r"layers\.3 has groups of .* bits"):
        decode(block, "layers.3")


@pytest.mark.parametrize(
    ("group", "positions"),
    [
        (0, (0, 32, 255, 255)),  # the next group
        (2, (0, 16, 255, 255)),  # beyond the row
        (0, (3, 3, 255, 255)),
        (0, (4, 3, 5, 6)),
        (0, (0, 255, 5, 255)),
        (0, (254, 255, 255, 255)),
    ],
)
def test_salient_weights_that_have_no_place_are_refused_by_name(group: int, positions: tuple[int, ...]) -> None:
    block, begin = mixed_block("1g32-pb4")
    at = begin + 2 * 4 * 3 + (3 + group) * 4  # of the second row
    block[at : at + 4] = torch.tensor(positions)
    with pytest.raises(CheckpointError, match=r"layers\.3 has salient weights where"):
        decode(block, "layers.3")


def test_salient_scales_that_are_no_numbers_are_refused_by_name() -> None:
    block, begin = mixed_block("1g32-pb4")
    block[begin : begin + 2] = torch.tensor([float("inf")], dtype=torch.float16).view(torch.uint8)
    with pytest.raises(CheckpointError, match=r"layers\.3 has scales that are not finite"):
        decode(block, "layers.3")


@pytest.mark.parametrize(("bits", "flags"), [(2, 4), (1, 2), (8, 2), (1, 10), (2, 255)])
def test_flags_that_mean_nothing_are_refused_by_name(bits: int, flags: int) -> None:
    block, _ = mixed_block("2g32-slim")
    block[3], block[6] = bits, flags
    with pytest.raises(CheckpointError, match=r"layers\.3 is not a native block"):
        decode(block, "layers.3")
