"""The native block: everything one quantized matrix needs, in one uint8 tensor.

    header (16 bytes) | codes | zero points or means | scales | padding to a multiple of 16

Codes are packed least significant bit first along a row, rows padded to whole 32-bit words, so 32
codes of b bits are exactly b words. Zero points are packed the same way along the rows of their
transpose. One tensor per matrix keeps an expert contiguous on disk and its name unchanged, and the
header makes a block decodable without any other file. Layout: docs/formats.md.
"""

from __future__ import annotations

import struct

import numpy as np
import torch

from alphaq.errors import CheckpointError, ChoiceError
from alphaq.records import BLOCK_HEADER_BYTES, Choice, QuantizedMatrix, Shape

_HEADER = struct.Struct("<2sBBHHII")  # magic, version, bits, group size, flags, rows, columns
_MAGIC = b"AQ"
_VERSION = 1
_FLAG_SYMMETRIC = 1


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [rows, n] below 2^bits → int32 words [rows, ⌈n·bits/32⌉]."""
    rows, count = codes.shape
    words = -(-count * bits // 32)
    if bits == 8:
        packed = codes
    else:
        bit_planes = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
        packed = np.packbits(bit_planes.reshape(rows, count * bits), axis=1, bitorder="little")
    padded = np.zeros((rows, words * 4), dtype=np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view("<i4")


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int32 words [rows, ⌈count·bits/32⌉] → uint8 codes [rows, count]."""
    stored = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stored[:, :count]
    bit_planes = np.unpackbits(stored, axis=1, count=count * bits, bitorder="little")
    return np.packbits(bit_planes.reshape(len(words), count, bits), axis=2, bitorder="little")[:, :, 0]


def encode(matrix: QuantizedMatrix) -> torch.Tensor:
    """A quantized matrix as its block: uint8 [choice.storage_bytes(shape)]."""
    choice, (rows, columns) = matrix.choice, matrix.shape
    parts = [
        _HEADER.pack(_MAGIC, _VERSION, choice.bits, choice.group_size, int(choice.symmetric), rows, columns),
        pack(matrix.codes.numpy(), choice.bits).tobytes(),
    ]
    if matrix.offsets is not None:
        if choice.bits == 1:
            parts.append(matrix.offsets.numpy().tobytes())
        else:
            parts.append(pack(np.ascontiguousarray(matrix.offsets.numpy().T), choice.bits).tobytes())
    parts.append(matrix.scales.numpy().tobytes())
    block = bytearray(choice.storage_bytes(matrix.shape))
    content = b"".join(parts)
    block[: len(content)] = content
    return torch.frombuffer(block, dtype=torch.uint8)


def read_block_header(block: torch.Tensor, name: str) -> tuple[Choice, Shape]:
    """Choice and shape of a block. Raises CheckpointError if it is no block or has the wrong length."""
    try:
        magic, version, bits, group_size, flags, rows, columns = _HEADER.unpack(
            bytes(block[:BLOCK_HEADER_BYTES].tolist())
        )
        if magic != _MAGIC or version != _VERSION:
            raise ChoiceError("it does not begin with the block header")
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
    words = stored[start : start + code_bytes].reshape(rows, -1)
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
    return QuantizedMatrix(
        choice,
        shape,
        torch.from_numpy(np.ascontiguousarray(unpack(words, choice.bits, columns))),
        torch.from_numpy(scales),
        None if offsets is None else torch.from_numpy(offsets),
    )


def dequantize(matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values that the codes stand for, [rows, columns]: s·(q − z), or mean ± s for 1 bit."""
    group_size, columns = matrix.choice.group_size, matrix.shape[1]

    def spread(per_group: torch.Tensor) -> torch.Tensor:
        return per_group.float().repeat_interleave(group_size, dim=1)[:, :columns]

    codes = matrix.codes.float()
    if matrix.choice.bits == 1:
        values = (2 * codes - 1) * spread(matrix.scales)
        if matrix.offsets is not None:
            values += spread(matrix.offsets)
    else:
        zero = 2.0 ** (matrix.choice.bits - 1) if matrix.offsets is None else spread(matrix.offsets)
        values = (codes - zero) * spread(matrix.scales)
    return values.to(dtype)
