import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import values_of

from alphaq.errors import CheckpointError
from alphaq.quantizers.packing import decode, dequantize, encode, pack, unpack
from alphaq.quantizers.rtn import quantize_rtn
from alphaq.records import Choice, QuantizedMatrix


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


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 8),
    st.sampled_from((32, 64, 128)),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 300),
)
def test_block_round_trips_and_has_the_promised_size(
    bits: int, group: int, symmetric: bool, rows: int, columns: int
) -> None:
    choice = Choice(bits, group, symmetric)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    matrix = quantize_rtn(weight, choice)
    block = encode(matrix)
    assert block.numel() == choice.storage_bytes((rows, columns))
    again = decode(block)
    assert torch.equal(again.codes, matrix.codes)
    assert torch.equal(again.scales, matrix.scales)
    assert torch.equal(dequantize(again), dequantize(matrix))


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


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.sampled_from((32, 64, 128)), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_kernel_packs_and_unpacks_like_the_plain_functions(bits: int, group: int, columns: int, seed: int) -> None:
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    matrix = quantize_rtn(weight, Choice(bits, group))
    codes = unpack(matrix.codes.numpy(), bits, columns)
    assert (pack(codes, bits) == matrix.codes.numpy()).all()
    parts = torch.from_numpy(codes), matrix.scales, matrix.offsets
    assert torch.allclose(dequantize(matrix), values_of(parts, matrix.choice), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("damage", ["short", "magic", "version", "bits", "rows", "empty"])
def test_damaged_block_is_refused_by_name(damage: str) -> None:
    block = encode(quantize_rtn(torch.randn(4, 64), Choice(3, 32))).clone()
    if damage == "short":
        block = block[:-16]
    elif damage == "empty":
        block = block[:0]
    else:
        block[{"magic": 0, "version": 2, "bits": 3, "rows": 8}[damage]] ^= 0x7F
    with pytest.raises(CheckpointError, match=r"layers\.3 is not a native block"):
        decode(block, "layers.3")
