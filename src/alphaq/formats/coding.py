"""Entropy-coded tensors: any stored tensor, smaller on disk and restored to the bit when it is loaded.

    header | dimensions | sizes of planes | planes

A tensor is taken apart into planes whose bytes are alike: of a native block the codes, zero points or means, and both
bytes of the scales; of 16- and 32-bit numbers the first bytes, the second bytes, and so on, since signs and exponents
repeat where mantissas do not. Codes whose bits do not divide 8 become bytes of whole codes first (two at 3 bits). Each
plane is a zstd frame: its Huffman coder comes within a hundredth of a plane's entropy and decodes faster than the ANS
coder tried beside it (docs/research/benchmarks.md). A frame ends with a checksum of what it holds, which shows damage.
Layout: docs/formats.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import Field, replace
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
import zstandard

from alphaq.errors import CheckpointError
from alphaq.formats.blocks import is_block, native_format, read_block_header, split_block
from alphaq.formats.kernels import join_rows, split_rows
from alphaq.formats.native import HEADER_BYTES
from alphaq.formats.versions import CODECS
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Shape

_HEADER = struct.Struct("<2sBBBBHQ")  # magic, version, codec, kind, dimensions, planes, bytes of the tensor
_MAGIC = b"AZ"
_VERSION = 1
_BLOCK = "block"
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U32": torch.uint32,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_KINDS = (_BLOCK, *_DTYPES)  # a header holds the place in this list
_LEVEL = 1  # higher ones look longer for repetitions, which codes do not have
_ALWAYS, _MOST_TIMES = 1 << 28, 256  # bytes that may be claimed by any file; by one of so many times less
_MOST_PLANES, _MOST_DIMENSIONS = 8, 8
PREFIX_BYTES = _HEADER.size + 8 * _MOST_DIMENSIONS + 16 * _MOST_PLANES


class StoredTensor(Protocol):
    """Where a tensor lies in its file: bytes [begin, end); with dtype and shape by which safetensors know it."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def begin(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


Info = TypeVar("Info", bound=StoredTensor)


def encode_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A stored tensor of any shape as its coded form, uint8 [n]; the tensor itself if that would be no smaller.

    Bytes that begin like a coded tensor are always coded.
    """
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    kind, shape = _NAMES[tensor.dtype], tuple(tensor.shape)
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


def _is_whole_block(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a native block, not other bytes that begin like one."""
    with suppress(CheckpointError):
        return is_block(tensor) and bool(read_block_header(tensor, "block"))
    return False


def is_coded(tensor: torch.Tensor) -> bool:
    """Whether a stored tensor, or its first PREFIX_BYTES, is what `encode_tensor` makes."""
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or tensor.numel() < _HEADER.size:
        return False
    return bytes(tensor[:2].tolist()) == _MAGIC


def decoded_info(info: Info, prefix: torch.Tensor) -> Info:
    """What a stored tensor is once decoded, told from its first PREFIX_BYTES; its place stays that of the stored bytes.

    Raises CheckpointError naming the tensor if its header is damaged.
    """
    if info.dtype != "U8" or len(info.shape) != 1 or not is_coded(prefix):
        return info
    kind, shape, _, _ = _read_header(prefix.numpy().tobytes(), info.nbytes, info.name)
    return replace(info, dtype="U8" if kind == _BLOCK else kind, shape=shape)


def block_header(read: Callable[[int, int], torch.Tensor], info: StoredTensor) -> tuple[Choice, Shape] | None:
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
    item = _DTYPES[kind].itemsize
    if [plane.size for plane in planes] != [nbytes // item] * item:
        raise _damaged(name, "its planes are not those of its dtype")
    for place, plane in enumerate(planes):
        raw[place::item] = plane
    return torch.from_numpy(raw).view(_DTYPES[kind]).view(shape)


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
        if dimensions > _MOST_DIMENSIONS or not 0 < count <= _MOST_PLANES:
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
    item = 1 if kind == _BLOCK else _DTYPES[kind].itemsize
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


def _block_planes(raw: np.ndarray) -> list[np.ndarray]:
    """Header, extra and padding together; codes; zero points or both bytes of means; both bytes of scales."""
    choice, shape = read_block_header(torch.from_numpy(raw), "block")
    header, codes, offsets, scales, *rest = split_block(raw, choice, shape)
    if (width := native_format(choice).symbol_bits(choice)) != 8:
        row_bytes = native_format(choice).row_bytes(choice, shape[1])
        symbols = np.empty(shape[0] * -(-8 * row_bytes // width), np.uint8)
        split_rows(codes, row_bytes, width, symbols)
        codes = symbols
    others = np.concatenate([header, *rest])
    return [others, codes, *_byte_planes(offsets, _offset_bytes(choice)), *_byte_planes(scales, 2)]


def _fill_block(planes: list[np.ndarray], raw: np.ndarray, name: str) -> None:
    """The inverse of `_block_planes`."""
    choice, shape = read_block_header(torch.from_numpy(planes[0].copy()), name, raw.size)
    header, codes, offsets, scales, *rest = split_block(raw, choice, shape)
    form, items = native_format(choice), _offset_bytes(choice)
    width, row_bytes = form.symbol_bits(choice), form.row_bytes(choice, shape[1])
    expected = [
        HEADER_BYTES + sum(part.size for part in rest),
        shape[0] * -(-8 * row_bytes // width),
        *[offsets.size // items] * items,
        *[scales.size // 2] * 2,
    ]
    if [plane.size for plane in planes] != expected:
        raise _damaged(name, f"its planes are not those of {choice}")
    at = HEADER_BYTES
    header[:] = planes[0][:at]
    for part in rest:
        part[:], at = planes[0][at : at + part.size], at + part.size
    if width == 8:
        codes[:] = planes[1]
    else:
        join_rows(planes[1], row_bytes, width, codes)
    for place in range(items):
        offsets[place::items] = planes[2 + place]
    for place in range(2):
        scales[place::2] = planes[2 + items + place]


def _offset_bytes(choice: Choice) -> int:
    """Bytes of a number among the offsets: means are float16, zero points a stream of bits."""
    return 2 if native_format(choice).means else 1
