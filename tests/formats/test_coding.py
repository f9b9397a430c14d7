"""Coded tensors: the same to the bit, or refused by name."""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from alphaq.checkpoint.safetensors_format import DTYPE_NAMES
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import CheckpointError
from alphaq.formats import coding
from alphaq.formats.blocks import encode
from alphaq.formats.coding import (
    PREFIX_BYTES,
    block_header,
    coder_version,
    decode_tensor,
    decoded_info,
    encode_tensor,
    is_coded,
)
from alphaq.formats.kernels import join_rows, split_rows
from alphaq.formats.native import CHOICE_BITS
from alphaq.formats.packing import unpack
from alphaq.formats.table import parse_choice, stored_choice
from alphaq.nouns.choice import Choice
from alphaq.quantizers.base import rounder_of
from alphaq.runtime.replace import stored_tensors

HEADER = struct.Struct("<2sBBBBHQ")
BLOCKS = [
    *(Choice(bits, group, symmetric) for bits in CHOICE_BITS for group, symmetric in ((32, False), (128, True))),
    *(parse_choice(f"{bits}g64-nest") for bits in range(2, 9)),
    *(parse_choice(f"{bits}g32-slim") for bits in range(2, 8)),
    *(parse_choice(f"1g128-{kind}") for kind in ("pb2", "pb4", "pb8")),
    parse_choice("8g128s@2.75"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block(choice: Choice, rows: int, columns: int) -> torch.Tensor:
    return encode(rounder_of("debiased")(gaussian(rows, columns), choice))


def sparse_block(choice: Choice, rows: int, columns: int) -> torch.Tensor:
    """Of weights that are mostly zero."""
    weight = gaussian(rows, columns)
    return encode(rounder_of("debiased")(weight * (weight > 1.5), choice))


def info_of(stored: torch.Tensor, begin: int = 100) -> TensorInfo:
    return TensorInfo("w", DTYPE_NAMES[stored.dtype], tuple(stored.shape), begin, begin + stored.nbytes)


def reading(stored: torch.Tensor, begin: int = 100) -> Callable[[int, int], torch.Tensor]:
    """A file in which the tensor begins at some byte."""
    raw = stored.reshape(-1).view(torch.uint8)
    return lambda place, count: raw[place - begin : place - begin + count]


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether everything agrees, NaN included."""
    parts = [one.contiguous().reshape(-1).view(torch.uint8) for one in (found, wanted)]
    return found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(*parts)


# -- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [choice for choice in BLOCKS if choice.bits > 1], ids=str)
@pytest.mark.parametrize("shape", [(96, 256), (133, 200)], ids=str)
def test_a_block_comes_back_to_the_bit_and_is_smaller(choice: Choice, shape: tuple[int, int]) -> None:
    """Signs of one bit are as many as bits of entropy."""
    plain = block(choice, *shape)
    coded = encode_tensor(plain)
    assert is_coded(coded)
    assert coded.nbytes < plain.nbytes
    assert same(decode_tensor(coded), plain)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.sampled_from(BLOCKS), st.integers(1, 40), st.integers(1, 300))
def test_a_block_of_any_shape_comes_back_to_the_bit(choice: Choice, rows: int, columns: int) -> None:
    plain = block(choice, rows, columns)
    assert same(decode_tensor(encode_tensor(plain)), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (50, 40), (7, 5, 30)], ids=str)
def test_a_tensor_of_any_type_and_shape_comes_back_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    plain = (gaussian(*shape) * 10).abs().to(dtype)
    assert same(decode_tensor(encode_tensor(plain)), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_floats_become_smaller_and_keep_nan_and_negative_zero(dtype: torch.dtype) -> None:
    plain = gaussian(100, 100).to(dtype)
    plain[0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), -float("inf")])
    coded = encode_tensor(plain)
    assert coded.nbytes < 0.95 * plain.nbytes
    assert same(decode_tensor(coded), plain)


def test_a_tensor_that_does_not_lie_in_rows_comes_back_as_its_values() -> None:
    plain = gaussian(60, 50).bfloat16().T
    assert same(decode_tensor(encode_tensor(plain)), plain.contiguous())


INCOMPRESSIBLE = torch.randint(0, 256, (4000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("values", [INCOMPRESSIBLE, torch.tensor(1.5)], ids=["bytes", "scalar"])
def test_what_coding_does_not_make_smaller_stays_as_it_is(values: torch.Tensor) -> None:
    assert encode_tensor(values) is values
    assert decode_tensor(values) is values


@pytest.mark.parametrize("magic", [b"AQ", b"AZ"])
@pytest.mark.parametrize("noisy", [False, True])
def test_bytes_that_only_begin_like_a_block_or_a_coded_tensor_come_back(magic: bytes, noisy: bool) -> None:
    random = np.random.default_rng(0).integers(0, 256 if noisy else 3, 2000, np.uint8)
    random[:2] = list(magic)
    plain = torch.from_numpy(random)
    assert same(decode_tensor(encode_tensor(plain)), plain)


def test_equal_tensors_have_equal_codes() -> None:
    plain = block(Choice(3, 64), 64, 256)
    assert torch.equal(encode_tensor(plain), encode_tensor(plain.clone()))
    assert coder_version("zstd").startswith("zstd 1.")


@pytest.mark.parametrize("choice", [Choice(bits, 64) for bits in (2, 3, 4, 8)], ids=str)
def test_codes_take_hardly_more_than_their_entropy(choice: Choice) -> None:
    rows, columns = 256, 1024
    found = rounder_of("debiased")(gaussian(rows, columns), choice)
    codes = unpack(found.codes.numpy(), choice.bits, columns)
    shares = np.bincount(codes.reshape(-1)) / codes.size
    entropy = -float(np.sum(shares[shares > 0] * np.log2(shares[shares > 0]))) / 8 * codes.size
    others = encode(found).nbytes - found.codes.numpy().nbytes
    assert encode_tensor(encode(found)).nbytes < 1.02 * (entropy + others)


# -- what is told without decoding ----------------------------------------------------------------


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("choice", BLOCKS, ids=str)
def test_the_beginning_tells_what_a_block_is(choice: Choice, coded: bool) -> None:
    plain = block(choice, 70, 300)
    stored = encode_tensor(plain) if coded else plain
    info = info_of(stored)
    assert is_coded(stored) is coded or choice.bits == 1  # whose signs may be incompressible
    assert block_header(reading(stored), info) == (stored_choice(choice), (70, 300))
    told = decoded_info(info, stored[:PREFIX_BYTES])
    assert (told.dtype, told.shape) == ("U8", tuple(plain.shape))
    assert (told.name, told.begin, told.end) == (info.name, info.begin, info.end)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.uint8], ids=str)
def test_the_beginning_tells_what_another_tensor_is(dtype: torch.dtype) -> None:
    plain = (gaussian(3, 40, 20) * 3).abs().to(dtype)
    stored = encode_tensor(plain)
    assert is_coded(stored)
    told = decoded_info(info_of(stored), stored[:PREFIX_BYTES])
    assert (told.dtype, told.shape) == (DTYPE_NAMES[dtype], (3, 40, 20))
    assert block_header(reading(stored), info_of(stored)) is None
    assert decoded_info(info_of(plain), plain) == info_of(plain)
    assert block_header(reading(plain), info_of(plain)) is None


# -- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plain",
    [block(parse_choice("8g128s@2"), 8, 64), sparse_block(Choice(3, 64), 10, 128), gaussian(12, 60).bfloat16()],
    ids=["symmetric", "asymmetric", "bfloat16"],
)
def test_every_changed_byte_is_refused_by_name_or_changes_nothing(plain: torch.Tensor) -> None:
    coded = encode_tensor(plain)
    assert is_coded(coded)
    refused = 0
    for place in range(2, coded.numel()):
        for change in (0x01, 0x80, 0xFF):
            damaged = coded.clone()
            damaged[place] ^= change
            try:
                found = decode_tensor(damaged, "layers.7.w")
            except CheckpointError as error:
                assert "layers.7.w" in str(error)
                refused += 1
            else:
                assert same(found, plain), place
    assert refused > 2.9 * coded.numel()


@pytest.mark.parametrize(
    "plain", [block(parse_choice("8g128s@2"), 8, 64), gaussian(12, 60).bfloat16()], ids=["block", "bfloat16"]
)
def test_a_tensor_cut_short_or_too_long_is_refused_by_name(plain: torch.Tensor) -> None:
    coded = encode_tensor(plain)
    assert is_coded(coded)
    for length in range(HEADER.size, coded.numel()):
        with pytest.raises(CheckpointError, match=r"layers\.7\.w"):
            decode_tensor(coded[:length].clone(), "layers.7.w")
    with pytest.raises(CheckpointError, match="do not fill"):
        decode_tensor(torch.cat([coded, torch.zeros(1, dtype=torch.uint8)]))


def frame(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def made_up(
    kind: int,
    shape: tuple[int, ...],
    planes: list[tuple[bytes, int]],
    nbytes: int,
    version: int = 1,
    codec: int = 1,
    dimensions: int | None = None,
) -> torch.Tensor:
    """A coded tensor with any header."""
    sizes = [number for data, size in planes for number in (len(data), size)]
    head = HEADER.pack(
        b"AZ", version, codec, kind, len(shape) if dimensions is None else dimensions, len(planes), nbytes
    )
    raw = head + struct.pack(f"<{len(shape) + len(sizes)}Q", *shape, *sizes) + b"".join(data for data, _ in planes)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


TEN = frame(bytes(10))
HUGE = 2**63
BF16, U8, BLOCK = 1, 5, 0


def claims_block(rows: int, columns: int, nbytes: int) -> bytes:
    """Header of a 4-bit block of any shape."""
    return struct.pack("<2sBBHHII", b"AQ", 1, 4, 128, 1, rows, columns)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (made_up(U8, (10,), [(TEN, 10)], 10, version=2), "not known"),
        (made_up(U8, (10,), [(TEN, 10)], 10, codec=9), "not known"),
        (made_up(99, (10,), [(TEN, 10)], 10), "not known"),
        (made_up(U8, (10,), [], 10), "0 planes"),
        (made_up(U8, (10,), [(TEN, 1)] * 9, 10), "9 planes"),
        (made_up(U8, (10,), [(TEN, 10)], 10, dimensions=200), "200 dimensions"),
        (made_up(U8, (11,), [(TEN, 10)], 10), "does not take 10 bytes"),
        (made_up(U8, (HUGE, HUGE), [(TEN, 10)], 10), "does not take"),
        (made_up(U8, (HUGE,), [(TEN, HUGE)], HUGE), "claim to stand for"),
        (made_up(U8, (1 << 20,), [(TEN, 1 << 20)], 1 << 20), "another size"),
        (made_up(U8, (9,), [(TEN, 9)], 9), "another size"),
        (made_up(U8, (10,), [(b"not a frame of zstd at all", 10)], 10), "cannot be decoded"),
        (made_up(U8, (10,), [(TEN[:-1], 10)], 10), "cannot be decoded"),
        (made_up(BF16, (5,), [(TEN, 10)], 10), "not those of its dtype"),
        (made_up(BF16, (10,), [(TEN, 10), (frame(b"123456789"), 9)], 20), "do not make up"),
        (made_up(BLOCK, (2, 5), [(TEN, 10)], 10), "does not take"),
        (made_up(BLOCK, (10,), [(TEN, 10)], 10), "not a native block"),
        (made_up(BLOCK, (HUGE,), [(frame(claims_block(2**32 - 1, 2**32 - 1, 0)), 16)], HUGE), "claim to stand for"),
        (made_up(BLOCK, (1 << 20,), [(frame(claims_block(9, 9, 0)), 16)], 1 << 20), "make up the block"),
        (made_up(BLOCK, (32,), [(frame(claims_block(9, 9, 0)), 16)], 32), "not a native block"),
    ],
)
def test_a_header_that_lies_is_refused_by_name(stored: torch.Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        decode_tensor(stored, "layers.7.w")
    assert "layers.7.w" in str(caught.value)


def test_a_block_with_the_planes_of_another_is_refused() -> None:
    plain = block(Choice(4, 128, True), 4, 128)
    planes = [plain[:16].numpy().tobytes(), bytes(100), b"", bytes(100), bytes(100)]
    stored = made_up(BLOCK, (plain.numel(),), [(frame(data), len(data)) for data in planes], plain.numel())
    with pytest.raises(CheckpointError, match="not those of 4g128s"):
        decode_tensor(stored)


def test_a_frame_that_claims_more_than_any_memory_is_refused() -> None:
    """Of 64 MiB a frame may make 4 TiB; here it only says so."""
    claimed = 1 << 42
    lying = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", claimed) + bytes(64 << 20)
    with pytest.raises(CheckpointError, match=r"layers\.7\.w"):
        decode_tensor(made_up(U8, (claimed,), [(lying, claimed)], claimed), "layers.7.w")


def test_what_would_claim_too_much_is_not_coded(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros(1 << 20, dtype=torch.bfloat16)
    assert encode_tensor(zeros).nbytes < zeros.nbytes / 1000
    coded = encode_tensor(zeros)
    monkeypatch.setattr(coding, "_ALWAYS", 1 << 20)
    assert encode_tensor(zeros) is zeros
    with pytest.raises(CheckpointError, match=r"layers\.7\.w .*claim to stand for 2097152"):
        decode_tensor(coded, "layers.7.w")


def test_many_tensors_cannot_claim_what_one_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coded = {f"w{number}": encode_tensor(torch.zeros(1 << 18, dtype=torch.bfloat16)) for number in range(4)}
    save_file(coded, tmp_path / "model.safetensors")
    assert len(stored_tensors([str(tmp_path / "model.safetensors")])) == 4
    monkeypatch.setattr(coding, "_ALWAYS", 1 << 20)
    with pytest.raises(CheckpointError, match=r"The checkpoint is damaged: .*claim to stand for 2097152"):
        stored_tensors([str(tmp_path / "model.safetensors")])


# -- kernels --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_symbols_of_rows_are_those_of_numpy_and_join_to_the_rows(width: int, rows: int, words: int, seed: int) -> None:
    packed = np.random.default_rng(seed).integers(0, 256, (rows, 4 * words), np.uint8)
    count = -(-32 * words // width)
    symbols = np.empty(rows * count, np.uint8)
    split_rows(packed.reshape(-1), 4 * words, width, symbols)
    padded = np.pad(packed, ((0, 0), (0, 8)))
    assert np.array_equal(symbols.reshape(rows, count), unpack(padded, width, count))
    joined = np.empty(packed.size, np.uint8)
    join_rows(symbols, 4 * words, width, joined)
    assert np.array_equal(joined, packed.reshape(-1))


def test_bits_of_symbols_beyond_their_width_are_dropped() -> None:
    packed = np.random.default_rng(0).integers(0, 256, 40, np.uint8)
    symbols = np.empty(2 * -(-160 // 5), np.uint8)
    split_rows(packed, 20, 5, symbols)
    joined = np.empty_like(packed)
    join_rows(symbols | np.uint8(0b11100000), 20, 5, joined)
    assert np.array_equal(joined, packed)


def test_planes_fill_the_coded_tensor_one_after_the_other() -> None:
    """The layout of docs/formats.md, read by other code."""
    plain = gaussian(40, 30).bfloat16()
    raw = encode_tensor(plain).numpy().tobytes()
    magic, version, codec, kind, dimensions, count, nbytes = HEADER.unpack_from(raw)
    assert (magic, version, codec, kind, dimensions, count, nbytes) == (b"AZ", 1, 1, BF16, 2, 2, 2400)
    numbers = struct.unpack_from("<6Q", raw, HEADER.size)
    assert numbers[:2] == (40, 30)
    ends = np.cumsum([HEADER.size + 48, numbers[2], numbers[4]]).tolist()
    assert ends[-1] == len(raw)
    planes = [zstandard.ZstdDecompressor().decompress(raw[first:last]) for first, last in pairwise(ends)]
    assert np.stack([np.frombuffer(plane, np.uint8) for plane in planes], 1).tobytes() == (
        plain.view(torch.int16).numpy().tobytes()
    )
