"""The native block: everything one quantized matrix needs, in one uint8 tensor.

    header (16 bytes) | codes | zero points or means | scales | mix | padding to a multiple of 16

Codes are packed least significant bit first along a row, rows padded to whole 32-bit words, so 32
codes of b bits are exactly b words. Zero points are packed the same way along the rows of their
transpose. The mix is the widths of groups where they differ, or the salient weights of a binary
matrix. One tensor per matrix keeps an expert contiguous on disk and its name unchanged, and the
header makes a block decodable without any other file. Layout: docs/formats.md.
"""

from __future__ import annotations

import math
import struct

import numpy as np
import torch

from alphaq.errors import CheckpointError, ChoiceError
from alphaq.nouns.choice import BLOCK_HEADER_BYTES, CHOICE_BITS, MIXES, Choice
from alphaq.nouns.matrix import Shape
from alphaq.nouns.quantized import QuantizedMatrix, SalientWeights
from alphaq.quantizers.kernels import dequantize_rows, dequantize_widths
from alphaq.quantizers.salience_kernels import UNUSED, restore_salient
from alphaq.simd.sums import in_threads, row_parts, squared_distance

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
    flags = int(choice.symmetric) | MIXES.index(choice.mix) << 1
    header = _HEADER.pack(_MAGIC, _VERSION, choice.bits, choice.group_size, flags, rows, columns)
    parts = [np.frombuffer(header, np.uint8), matrix.codes.numpy()]
    if matrix.offsets is not None:
        parts.append(_packed_offsets(matrix))
    parts.append(matrix.scales.numpy())
    if matrix.widths is not None:
        parts.append(matrix.widths.numpy())
    if (salient := matrix.salient) is not None:
        parts += [salient.scales.numpy(), salient.positions.numpy(), salient.values.numpy()]
    content = np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])
    padding = np.zeros(choice.storage_bytes(matrix.shape) - len(content), np.uint8)
    return torch.from_numpy(np.concatenate([content, padding]))


def _packed_offsets(matrix: QuantizedMatrix) -> np.ndarray:
    """Means as they are, zero points packed along the rows of their transpose."""
    assert matrix.offsets is not None  # the caller knows
    offsets = matrix.offsets.numpy()
    if matrix.choice.bits == 1:
        return offsets
    by_group = np.ascontiguousarray(offsets.T)
    if matrix.widths is None:
        return pack(by_group, matrix.choice.bits)
    padded = np.pad(by_group, ((0, 0), (0, -len(offsets) % 32)))
    widths = matrix.widths.tolist()
    return np.concatenate([pack(row[None], bits)[0] for row, bits in zip(padded, widths, strict=True)])


def read_block_header(block: torch.Tensor, name: str, nbytes: int | None = None) -> tuple[Choice, Shape]:
    """Choice and shape of a block. Raises CheckpointError if it is no block or has the wrong length.

    nbytes: length of the block, where `block` is only its beginning.
    """
    try:
        if block.dtype != torch.uint8 or block.ndim != 1:
            raise ChoiceError(f"it is {block.dtype} {list(block.shape)}, not a row of bytes")
        magic, version, bits, group_size, flags, rows, columns = _HEADER.unpack(
            bytes(block[:BLOCK_HEADER_BYTES].tolist())
        )
        if magic != _MAGIC or version != _VERSION or flags >> 1 >= len(MIXES) or bits not in CHOICE_BITS:
            raise ChoiceError("it does not begin with the block header")
        if not rows or not columns:
            raise ChoiceError(f"a matrix of shape {[rows, columns]} has no elements")
        choice = Choice(bits, group_size, bool(flags & _FLAG_SYMMETRIC), mix=MIXES[flags >> 1])
        shape = (rows, columns)
        if choice.storage_bytes(shape) != (nbytes or block.numel()):
            raise ChoiceError(f"{choice} of shape {shape} does not take {nbytes or block.numel()} bytes")
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
    sizes = (BLOCK_HEADER_BYTES, *choice.parts(shape), choice.mix_bytes(shape))
    stored = np.split(block.contiguous().numpy(), np.cumsum(sizes))
    codes, offset_part, scales, mix = (
        stored[1].reshape(rows, -1),
        stored[2],
        _halves(stored[3], (rows, groups)),
        stored[4],
    )
    offsets = widths = salient = None
    if choice.salient:
        salient = _read_salient(mix, choice, shape, name)
    elif choice.slim:
        widths = _read_widths(mix, choice, columns, name)
    if not choice.symmetric:
        if choice.bits == 1:
            offsets = _halves(offset_part, (rows, groups))
        elif widths is not None:
            offsets = _unpacked_zero_points(offset_part, widths, rows)
        else:
            offsets = np.ascontiguousarray(unpack(offset_part.reshape(groups, -1), choice.bits, rows).T)
    if not np.isfinite(scales).all() or (offsets is not None and not np.isfinite(offsets).all()):
        raise _not_finite(name)
    return QuantizedMatrix(
        choice,
        shape,
        torch.from_numpy(codes),
        torch.from_numpy(scales),
        None if offsets is None else torch.from_numpy(offsets),
        widths=None if widths is None else torch.from_numpy(widths),
        salient=salient,
    )


def _halves(part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return part.copy().view("<f2").reshape(shape)


def _not_finite(name: str) -> CheckpointError:
    return CheckpointError(f"{name} has scales that are not finite. Quantize the model again.")


def _read_widths(mix: np.ndarray, choice: Choice, columns: int, name: str) -> np.ndarray:
    """Bits of each group, uint8 [groups], which must be as many in all as if none differed."""
    steps = mix.astype(np.int64) - choice.bits
    ragged = columns % choice.group_size != 0
    if abs(steps).max() > 1 or steps.sum() != 0 or (ragged and steps[-1] != 0):
        raise CheckpointError(
            f"{name} has groups of {sorted(set(mix.tolist()))} bits, which {choice} cannot have in such numbers. "
            "Quantize the model again."
        )
    return mix.copy()


def _unpacked_zero_points(part: np.ndarray, widths: np.ndarray, rows: int) -> np.ndarray:
    """Zero points uint8 [rows, groups] of groups that differ in their bits."""
    ends = np.cumsum(4 * -(-rows // 32) * widths.astype(np.int64))
    pieces = zip(np.split(part, ends[:-1]), widths.tolist(), strict=True)
    found = [unpack(piece[None], bits, rows)[0] for piece, bits in pieces]
    return np.stack(found, axis=1) * (widths > 1)  # groups of 1 bit have none, whatever a file says


def _read_salient(mix: np.ndarray, choice: Choice, shape: Shape, name: str) -> SalientWeights:
    rows, columns = shape
    groups, most = choice.groups(columns), choice.salient
    scale_part, positions, values = np.split(mix, np.cumsum([2 * rows * groups, rows * groups * most]))
    scales, positions = _halves(scale_part, (rows, groups)), positions.reshape(rows, groups, most)
    if not np.isfinite(scales).all():
        raise _not_finite(name)
    unused = positions == UNUSED
    counts = np.minimum(choice.group_size, columns - choice.group_size * np.arange(groups))
    ascending = (positions[..., 1:] > positions[..., :-1]) | unused[..., 1:]
    if not ((positions < counts[:, None]) | unused).all() or not ascending.all():
        raise CheckpointError(f"{name} has salient weights where there is no place for them. Quantize the model again.")
    return SalientWeights(
        torch.from_numpy(scales),
        torch.from_numpy(positions.copy()),
        torch.from_numpy(values.reshape(positions.shape).copy()),
    )


def dequantize(matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> torch.Tensor:
    """The values that the codes of some rows stand for, [rows, columns]: s·(q − z), or mean ± s for 1 bit."""
    first, last, _ = rows.indices(matrix.shape[0])
    values = torch.empty((last - first, matrix.shape[1]), dtype=dtype)

    def restore(part: slice) -> None:
        values[part] = dequantized_rows(matrix, slice(first + part.start, first + part.stop)).to(dtype)

    in_threads(restore, row_parts(*values.shape))
    return values


def dequantized_rows(matrix: QuantizedMatrix, part: slice) -> torch.Tensor:
    """Some rows of `dequantize`, float32."""
    choice, (_, columns) = matrix.choice, matrix.shape
    codes, scales, offsets = matrix.codes[part].numpy().reshape(-1), _floats(matrix.scales, part), _zeros(matrix, part)
    values = np.empty((part.stop - part.start, columns), np.float32)
    out = values.reshape(-1)
    if matrix.widths is not None:
        dequantize_widths(codes, columns, matrix.widths.numpy(), choice.group_size, scales, offsets, out)
    else:
        dequantize_rows(codes, columns, choice.bits, choice.group_size, scales, offsets, out)
    if (found := matrix.salient) is not None:
        places, stored = found.positions[part].numpy().reshape(-1), found.values[part].numpy().reshape(-1)
        wide = _floats(found.scales, part)
        restore_salient(places, stored, wide, choice.salient, columns, choice.group_size, out)
    return torch.from_numpy(values)


def _floats(scales: torch.Tensor, part: slice) -> np.ndarray:
    return scales[part].float().numpy().reshape(-1)


def _zeros(matrix: QuantizedMatrix, part: slice) -> np.ndarray:
    """Zero points or means of some rows, float32 [rows · groups]."""
    if matrix.offsets is not None:
        return _floats(matrix.offsets, part)
    bits = np.full(matrix.scales.shape[1], matrix.choice.bits) if matrix.widths is None else matrix.widths.numpy()
    middles = np.where(bits == 1, 0, 2.0 ** (bits - 1) - 0.5 * matrix.choice.nested).astype(np.float32)
    return np.tile(middles, part.stop - part.start)


def restored_error(matrix: QuantizedMatrix, weight: torch.Tensor) -> float:
    """Σ(w − ŵ)² against the [rows, columns] weights, float64, a few rows in memory at a time."""

    def error(part: slice) -> float:
        return squared_distance(weight[part], dequantized_rows(matrix, part))

    return math.fsum(map(error, row_parts(*matrix.shape)))
