"""The native block: everything one quantized matrix needs, in one uint8 tensor.

    header (16 bytes) | codes | zero points or means | scales | padding to a multiple of 16

Codes are packed least significant bit first along a row, rows padded to whole 32-bit words, so 32
codes of b bits are exactly b words. Zero points are packed the same way along the rows of their
transpose. One tensor per matrix keeps an expert contiguous on disk and its name unchanged, and the
header makes a block decodable without any other file. Layout: docs/formats.md.
"""

from __future__ import annotations

import math
import struct

import numpy as np
import torch

from alphaq.errors import CheckpointError, ChoiceError
from alphaq.numerics import in_threads, row_parts, squared_distance
from alphaq.quantizers.kernels import dequantize_rows
from alphaq.records import BLOCK_HEADER_BYTES, CHOICE_BITS, Choice, QuantizedMatrix, Shape

_HEADER = struct.Struct("<2sBBHHII")  # magic, version, bits, group size, flags, rows, columns
_MAGIC = b"AQ"
_VERSION = 1
_FLAG_SYMMETRIC = 1


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [rows, n] below 2^bits → packed uint8 [rows, 4·⌈n·bits/32⌉]."""
    rows, count = codes.shape
    bit_planes = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
    packed = np.packbits(bit_planes.reshape(rows, count * bits), axis=1, bitorder="little")
    padded = np.zeros((rows, 4 * -(-count * bits // 32)), dtype=np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """packed uint8 [rows, 4·⌈count·bits/32⌉] → uint8 codes [rows, count]."""
    bit_planes = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little")
    return np.packbits(bit_planes.reshape(len(packed), count, bits), axis=2, bitorder="little")[:, :, 0]


def encode(matrix: QuantizedMatrix) -> torch.Tensor:
    """A quantized matrix as its block: uint8 [choice.storage_bytes(shape)]."""
    choice, (rows, columns) = matrix.choice, matrix.shape
    header = _HEADER.pack(_MAGIC, _VERSION, choice.bits, choice.group_size, int(choice.symmetric), rows, columns)
    parts = [np.frombuffer(header, np.uint8), matrix.codes.numpy().reshape(-1)]
    if matrix.offsets is not None:
        offsets = matrix.offsets.numpy()
        stored = offsets if choice.bits == 1 else pack(np.ascontiguousarray(offsets.T), choice.bits)
        parts.append(stored.reshape(-1).view(np.uint8))
    parts.append(matrix.scales.numpy().reshape(-1).view(np.uint8))
    content = np.concatenate(parts)
    padding = np.zeros(choice.storage_bytes(matrix.shape) - len(content), np.uint8)
    return torch.from_numpy(np.concatenate([content, padding]))


def read_block_header(block: torch.Tensor, name: str) -> tuple[Choice, Shape]:
    """Choice and shape of a block. Raises CheckpointError if it is no block or has the wrong length."""
    try:
        if block.dtype != torch.uint8 or block.ndim != 1:
            raise ChoiceError(f"it is {block.dtype} {list(block.shape)}, not a row of bytes")
        magic, version, bits, group_size, flags, rows, columns = _HEADER.unpack(
            bytes(block[:BLOCK_HEADER_BYTES].tolist())
        )
        if magic != _MAGIC or version != _VERSION or flags > _FLAG_SYMMETRIC or bits not in CHOICE_BITS:
            raise ChoiceError("it does not begin with the block header")
        if not rows or not columns:
            raise ChoiceError(f"a matrix of shape {[rows, columns]} has no elements")
        choice, shape = Choice(bits, group_size, bool(flags & _FLAG_SYMMETRIC)), (rows, columns)
        if choice.storage_bytes(shape) != block.numel():
            raise ChoiceError(f"{choice} of shape {shape} does not take {block.numel()} bytes")
    except (struct.error, ChoiceError) as error:
        raise CheckpointError(
            f"{name} is not a native block ({error}). Quantize the model again or update alphaq."
        ) from None
    return choice, shape


def decode(block: torch.Tensor, name: str = "tensor") -> QuantizedMatrix:
    """The inverse of `encode`. Raises CheckpointError naming the tensor if the block is damaged."""
    choice, shape = read_block_header(block, name)
    rows, columns = shape
    groups = choice.groups(columns)
    stored = block.contiguous().numpy()
    code_bytes, offset_bytes, scale_bytes = choice.parts(shape)
    start = BLOCK_HEADER_BYTES
    codes = stored[start : start + code_bytes].reshape(rows, -1)
    start += code_bytes
    offset_part = stored[start : start + offset_bytes]
    start += offset_bytes
    scales = stored[start : start + scale_bytes].copy().view("<f2").reshape(rows, groups)
    offsets = None
    if not choice.symmetric:
        if choice.bits == 1:
            offsets = offset_part.copy().view("<f2").reshape(rows, groups)
        else:
            offsets = np.ascontiguousarray(unpack(offset_part.reshape(groups, -1), choice.bits, rows).T)
    if not np.isfinite(scales).all() or (offsets is not None and not np.isfinite(offsets).all()):
        raise CheckpointError(f"{name} has scales that are not finite. Quantize the model again.")
    return QuantizedMatrix(
        choice,
        shape,
        torch.from_numpy(codes),
        torch.from_numpy(scales),
        None if offsets is None else torch.from_numpy(offsets),
    )


def dequantize(matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values that the codes stand for, [rows, columns]: s·(q − z), or mean ± s for 1 bit."""
    values = torch.empty(matrix.shape, dtype=dtype)

    def restore(part: slice) -> None:
        values[part] = dequantized_rows(matrix, part).to(dtype)

    in_threads(restore, row_parts(*matrix.shape))
    return values


def dequantized_rows(matrix: QuantizedMatrix, part: slice) -> torch.Tensor:
    """Some rows of `dequantize`, float32."""
    choice, (_, columns) = matrix.choice, matrix.shape
    scales = matrix.scales[part].float().numpy()
    if matrix.offsets is None:
        offsets = np.full_like(scales, 0 if choice.bits == 1 else 2.0 ** (choice.bits - 1))
    else:
        offsets = matrix.offsets[part].float().numpy()
    values = np.empty((part.stop - part.start, columns), np.float32)
    dequantize_rows(
        matrix.codes[part].numpy().reshape(-1),
        columns,
        choice.bits,
        choice.group_size,
        scales.reshape(-1),
        offsets.reshape(-1),
        values.reshape(-1),
    )
    return torch.from_numpy(values)


def restored_error(matrix: QuantizedMatrix, weight: torch.Tensor) -> float:
    """Σ(w − ŵ)² against the [rows, columns] weights, float64, a few rows in memory at a time."""

    def error(part: slice) -> float:
        return squared_distance(weight[part], dequantized_rows(matrix, part))

    return math.fsum(map(error, row_parts(*matrix.shape)))
