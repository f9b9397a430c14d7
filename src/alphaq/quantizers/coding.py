"""Entropy-coded tensors: any stored tensor, smaller on disk and restored to the bit when it is loaded.

    header | dimensions | sizes of planes | planes

A tensor is taken apart into planes whose bytes are alike: of a native block the codes, zero points or means, and both
bytes of the scales; of 16- and 32-bit numbers the first bytes, the second bytes, and so on, since signs and exponents
repeat where mantissas do not. Codes whose bits do not divide 8 become bytes of whole codes first (two at 3 bits). Each
plane is a zstd frame: its Huffman coder comes within a hundredth of a plane's entropy and decodes faster than the ANS
coder tried beside it (docs/benchmarks.md). A frame ends with a checksum of what it holds, which shows damage.
Layout: docs/formats.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

import numpy as np
import torch
import zstandard

from alphaq.checkpoint.safetensors_format import DTYPE_NAMES, ITEM_BYTES, MAX_DIMENSIONS, TORCH_DTYPES
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import CheckpointError
from alphaq.nouns.choice import BLOCK_HEADER_BYTES, CODECS, Choice
from alphaq.nouns.matrix import Shape
from alphaq.quantizers.coding_kernels import join_rows, split_rows
from alphaq.quantizers.packing import read_block_header

_HEADER = struct.Struct("<2sBBBBHQ")  # magic, version, codec, kind, dimensions, planes, bytes of the tensor
_MAGIC = b"AZ"
_VERSION = 1
_BLOCK = "block"
_KINDS = (_BLOCK, "BF16", "F16", "F32", "F64", "U8", "I8", "I16", "I32", "I64", "U32", "BOOL", "F8_E4M3", "F8_E5M2")
_LEVEL = 1  # higher ones look longer for repetitions, which codes do not have
_ALWAYS, _MOST_TIMES = 1 << 28, 256  # bytes that may be claimed by any file; by one of so many times less
_MOST_PLANES = 8
PREFIX_BYTES = _HEADER.size + 8 * MAX_DIMENSIONS + 16 * _MOST_PLANES


def encode_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A stored tensor of any shape as its coded form, uint8 [n]; the tensor itself if that would be no smaller.

    Bytes that begin like a coded tensor are always coded.
    """
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    kind, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
    if _is_whole_block(tensor):
        kind, planes = _BLOCK, _block_planes(raw)
    else:
        planes = _byte_planes(raw, tensor.element_size())
    packer = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, write_content_size=True)
    frames = [packer.compress(plane.data) for plane in planes]
    header = _HEADER.pack(_MAGIC, _VERSION, CODECS.index("zstd"), _KINDS.index(kind), len(shape), len(frames), raw.size)
    sizes = [size for frame, plane in zip(frames, planes, strict=True) for size in (len(frame), plane.size)]
    coded = b"".join((header, struct.pack(f"<{len(shape) + len(sizes)}Q", *shape, *sizes), *frames))
    shorter = len(coded) < raw.size <= _most_decoded(len(coded))
    if shorter or is_coded(tensor):  # bytes that look coded would be taken for it
        return torch.frombuffer(bytearray(coded), dtype=torch.uint8)
    return tensor


def _most_decoded(stored_bytes: int) -> int:
    return max(_ALWAYS, _MOST_TIMES * stored_bytes)


def check_claims(decoded_bytes: int, stored_bytes: int, name: str) -> None:
    """CheckpointError if so few bytes claim to stand for so many that memory would fill up with zeros."""
    if decoded_bytes > _most_decoded(stored_bytes):
        raise _damaged(name, f"its {stored_bytes} bytes claim to stand for {decoded_bytes}")


def coder_version(codec: str) -> str:
    """What tells apart the bytes that a codec may leave: its library's version."""
    return f"{codec} {'.'.join(map(str, zstandard.ZSTD_VERSION))}"


def is_block(tensor: torch.Tensor) -> bool:
    """Whether a stored tensor is a native block."""
    return _begins(tensor, b"AQ", BLOCK_HEADER_BYTES)


def _is_whole_block(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a native block, not other bytes that begin like one."""
    with suppress(CheckpointError):
        return is_block(tensor) and bool(read_block_header(tensor, "block"))
    return False


def is_coded(tensor: torch.Tensor) -> bool:
    """Whether a stored tensor, or its first PREFIX_BYTES, is what `encode_tensor` makes."""
    return _begins(tensor, _MAGIC, _HEADER.size)


def _begins(tensor: torch.Tensor, magic: bytes, least: int) -> bool:
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or tensor.numel() < least:
        return False
    return bytes(tensor[:2].tolist()) == magic


def decoded_info(info: TensorInfo, prefix: torch.Tensor) -> TensorInfo:
    """What a stored tensor is once decoded, told from its first PREFIX_BYTES; its place stays that of the stored bytes.

    Raises CheckpointError naming the tensor if its header is damaged.
    """
    if info.dtype != "U8" or len(info.shape) != 1 or not is_coded(prefix):
        return info
    kind, shape, _, _ = _read_header(prefix.numpy().tobytes(), info.nbytes, info.name)
    return TensorInfo(info.name, "U8" if kind == _BLOCK else kind, shape, info.begin, info.end)


def decoded_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor of this dtype and shape, wherever it is stored."""
    return math.prod(info.shape) * ITEM_BYTES[info.dtype]


def block_header(read: Callable[[int, int], torch.Tensor], info: TensorInfo) -> tuple[Choice, Shape] | None:
    """Choice and shape of a native block, coded or not; None if a stored tensor is none.

    read: gives so many bytes from a place of the file on. Raises CheckpointError naming the tensor if it is damaged.
    """
    if info.dtype != "U8" or len(info.shape) != 1:
        return None
    prefix, nbytes = read(info.begin, min(info.nbytes, PREFIX_BYTES)), info.nbytes
    if is_coded(prefix):
        kind, shape, sizes, nbytes = _read_header(prefix.numpy().tobytes(), info.nbytes, info.name)
        if kind != _BLOCK:
            return None
        begin = _HEADER.size + 8 * (len(shape) + 2 * len(sizes))
        prefix = torch.from_numpy(
            _unpacked(read(info.begin + begin, sizes[0][0]).numpy(), sizes[0][1], info.name).copy()
        )
    return read_block_header(prefix, info.name, nbytes) if is_block(prefix) else None


def decode_tensor(stored: torch.Tensor, name: str = "tensor") -> torch.Tensor:
    """The inverse of `encode_tensor`; a tensor that is not coded is returned as it is.

    Raises CheckpointError naming the tensor if it is damaged.
    """
    if not is_coded(stored):
        return stored
    data = stored.contiguous().numpy()
    kind, shape, sizes, nbytes = _read_header(data[:PREFIX_BYTES].tobytes(), data.size, name)
    starts = np.cumsum([_HEADER.size + 8 * (len(shape) + 2 * len(sizes)), *(coded for coded, _ in sizes)]).tolist()
    planes = [_unpacked(data[at : at + coded], size, name) for at, (coded, size) in zip(starts, sizes, strict=False)]
    raw = np.empty(nbytes, np.uint8)
    if kind == _BLOCK:
        _fill_block(planes, raw, name)
        return torch.from_numpy(raw)
    item = ITEM_BYTES[kind]
    if [plane.size for plane in planes] != [nbytes // item] * item:
        raise _damaged(name, "its planes are not those of its dtype")
    for place, plane in enumerate(planes):
        raw[place::item] = plane
    return torch.from_numpy(raw).view(TORCH_DTYPES[kind]).view(shape)


def _damaged(name: str, why: str) -> CheckpointError:
    return CheckpointError(f"{name} is damaged: {why}. Copy the file again, or quantize again.")


def _read_header(
    prefix: bytes, stored_bytes: int, name: str
) -> tuple[str, tuple[int, ...], list[tuple[int, int]], int]:
    """Kind, shape, (coded, decoded) bytes of each plane, bytes of the tensor; all checked: strangers wrote it."""
    try:
        _, version, codec, kind_number, dimensions, count, nbytes = _HEADER.unpack_from(prefix)
        if version != _VERSION or codec >= len(CODECS) or kind_number >= len(_KINDS):
            raise _damaged(name, "its coding is not known to this version of alphaq")
        if dimensions > MAX_DIMENSIONS or not 0 < count <= _MOST_PLANES:
            raise _damaged(name, f"it claims {dimensions} dimensions and {count} planes")
        numbers = struct.unpack_from(f"<{dimensions + 2 * count}Q", prefix, _HEADER.size)
    except struct.error:
        raise _damaged(name, "its header is cut short") from None
    shape, rest = numbers[:dimensions], numbers[dimensions:]
    sizes = list(zip(rest[::2], rest[1::2], strict=True))
    kind = _KINDS[kind_number]
    header_bytes = _HEADER.size + 8 * (dimensions + 2 * count)
    if header_bytes + sum(coded for coded, _ in sizes) != stored_bytes:
        raise _damaged(name, f"its planes do not fill its {stored_bytes} bytes")
    check_claims(max(nbytes, sum(size for _, size in sizes)), stored_bytes, name)
    item = 1 if kind == _BLOCK else ITEM_BYTES[kind]
    if math.prod(shape) * item != nbytes or (kind == _BLOCK and dimensions != 1):
        raise _damaged(name, f"a tensor of shape {list(shape)} does not take {nbytes} bytes")
    if kind != _BLOCK and sum(size for _, size in sizes) != nbytes:
        raise _damaged(name, "its planes do not make up the tensor")
    if kind == _BLOCK and sizes[0][1] > nbytes:
        raise _damaged(name, "its first plane is larger than the block")
    if kind == _BLOCK and nbytes > 8 + 2 * sum(size for _, size in sizes):  # symbols are no shorter than codes
        raise _damaged(name, "its planes do not make up the block")
    return kind, shape, sizes, nbytes


def _unpacked(frame: np.ndarray, size: int, name: str) -> np.ndarray:
    try:
        if zstandard.frame_content_size(frame.data) != size:  # before room is made for what a frame claims
            raise _damaged(name, "a plane has another size than its header says")
        plane = zstandard.ZstdDecompressor().decompress(frame.data)
    except zstandard.ZstdError as error:
        raise _damaged(name, f"a plane cannot be decoded ({error})") from None
    except MemoryError:  # its frame may truly hold that much, all of it zeros
        raise _damaged(name, f"a plane claims {size} bytes, which there is no memory for") from None
    if len(plane) != size:
        raise _damaged(name, "a plane is cut short")
    return np.frombuffer(plane, np.uint8)


# -- planes ---------------------------------------------------------------------------------------


def _byte_planes(raw: np.ndarray, item: int) -> list[np.ndarray]:
    return [np.ascontiguousarray(raw[place::item]) for place in range(item)]


def _symbol_bits(bits: int) -> int:
    """Bits of a symbol that holds whole codes: 8 where they divide a byte."""
    return 8 if 8 % bits == 0 else 6 if bits == 3 else bits


def _block_planes(raw: np.ndarray) -> list[np.ndarray]:
    """Header, mix and padding together; codes; zero points or both bytes of means; both bytes of scales."""
    choice, shape = read_block_header(torch.from_numpy(raw), "block")
    code_bytes, offset_bytes, scale_bytes = choice.parts(shape)
    begin = BLOCK_HEADER_BYTES
    ends = np.cumsum([begin, code_bytes, offset_bytes, scale_bytes])
    codes, offsets, scales = (raw[first:last] for first, last in pairwise(ends))
    rest = np.concatenate([raw[:begin], raw[ends[-1] :]])
    width = _symbol_bits(choice.bits)
    if width != 8:
        row_bytes = choice.row_bytes(shape[1])
        symbols = np.empty(shape[0] * -(-8 * row_bytes // width), np.uint8)
        split_rows(codes, row_bytes, width, symbols)
        codes = symbols
    return [rest, codes, *_byte_planes(offsets, 2 if choice.bits == 1 else 1), *_byte_planes(scales, 2)]


def _fill_block(planes: list[np.ndarray], raw: np.ndarray, name: str) -> None:
    """The inverse of `_block_planes`."""
    choice, shape = read_block_header(torch.from_numpy(planes[0].copy()), name, raw.size)
    parts = choice.parts(shape)
    ends = np.cumsum([BLOCK_HEADER_BYTES, *parts]).tolist()
    width, row_bytes, items = _symbol_bits(choice.bits), choice.row_bytes(shape[1]), 2 if choice.bits == 1 else 1
    expected = [
        BLOCK_HEADER_BYTES + raw.size - ends[-1],
        shape[0] * -(-8 * row_bytes // width),
        *[parts[1] // items] * items,
        *[parts[2] // 2] * 2,
    ]
    if [plane.size for plane in planes] != expected:
        raise _damaged(name, f"its planes are not those of {choice}")
    raw[:BLOCK_HEADER_BYTES], raw[ends[-1] :] = planes[0][:BLOCK_HEADER_BYTES], planes[0][BLOCK_HEADER_BYTES:]
    codes = raw[ends[0] : ends[1]]
    if width == 8:
        codes[:] = planes[1]
    else:
        join_rows(planes[1], row_bytes, width, codes)
    for place in range(items):
        raw[ends[1] + place : ends[2] : items] = planes[2 + place]
    for place in range(2):
        raw[ends[2] + place : ends[3] : 2] = planes[2 + items + place]
