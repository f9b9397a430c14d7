"""Native blocks: a quantized matrix as one uint8 tensor and back, and the values that codes stand for.

What all formats have in common; `formats.native` has the layout, and each format its own parts.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache

import numpy as np
import torch

from alphaq.errors import CheckpointError, ChoiceError
from alphaq.formats.native import HEADER, HEADER_BYTES, NativeFormat, halves
from alphaq.formats.table import format_of, formats
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Shape
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.simd.sums import in_threads, row_parts, squared_distance

_MAGIC = b"AQ"
_VERSION = 1
_FLAG_SYMMETRIC = 1  # flags beyond it are the number of the kind


def native_format(choice: Choice) -> NativeFormat:
    """The format of a choice. Raises ChoiceError if it is not stored in blocks."""
    found = format_of(choice)
    if not isinstance(found, NativeFormat):
        raise ChoiceError(f"{choice} is not stored in native blocks.")
    return found


def is_block(tensor: torch.Tensor) -> bool:
    """Whether a stored tensor, or its beginning, is a native block."""
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or tensor.numel() < HEADER_BYTES:
        return False
    return bytes(tensor[:2].tolist()) == _MAGIC


def encode(matrix: QuantizedMatrix) -> torch.Tensor:
    """A quantized matrix as its block: uint8 [storage_bytes(choice, shape)]."""
    choice, (rows, columns), form = matrix.choice, matrix.shape, native_format(matrix.choice)
    flags = int(choice.symmetric) | form.kind_number(choice) << 1
    header = HEADER.pack(_MAGIC, _VERSION, choice.bits, choice.group_size, flags, rows, columns)
    parts = [np.frombuffer(header, np.uint8), matrix.codes.numpy()]
    if matrix.offsets is not None:
        parts.append(matrix.offsets.numpy() if form.means else form.packed_zero_points(matrix))
    parts += [matrix.scales.numpy(), *form.written_extra(matrix)]
    content = np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])
    padding = np.zeros(form.storage_bytes(choice, matrix.shape) - len(content), np.uint8)
    return torch.from_numpy(np.concatenate([content, padding]))


def read_block_header(block: torch.Tensor, name: str, nbytes: int | None = None) -> tuple[Choice, Shape]:
    """Choice and shape of a block. Raises CheckpointError if it is no block or has the wrong length.

    nbytes: length of the block, where `block` is only its beginning.
    """
    try:
        if block.dtype != torch.uint8 or block.ndim != 1:
            raise ChoiceError(f"it is {block.dtype} {list(block.shape)}, not a row of bytes")
        choice, shape = _header(block)
        if format_of(choice).storage_bytes(choice, shape) != (nbytes or block.numel()):
            raise ChoiceError(f"{choice} of shape {shape} does not take {nbytes or block.numel()} bytes")
    except (struct.error, ChoiceError) as error:
        raise CheckpointError(
            f"{name} is not a native block ({error}). Quantize the model again or update alphaq."
        ) from None
    return choice, shape


def block_bytes(block: torch.Tensor) -> int:
    """Bytes of a block that was checked before, told from its beginning."""
    choice, shape = _header(block)
    return format_of(choice).storage_bytes(choice, shape)


def _header(block: torch.Tensor) -> tuple[Choice, Shape]:
    """What a header says. Raises ChoiceError, or struct.error if it is cut short."""
    magic, version, bits, group_size, flags, rows, columns = HEADER.unpack(bytes(block[:HEADER_BYTES].tolist()))
    known = magic == _MAGIC and version == _VERSION
    choice = _choice_of(flags >> 1, bits, group_size, bool(flags & _FLAG_SYMMETRIC)) if known else None
    if choice is None:
        raise ChoiceError("it does not begin with the block header")
    if not rows or not columns:
        raise ChoiceError(f"a matrix of shape {[rows, columns]} has no elements")
    return choice, (rows, columns)


@lru_cache(maxsize=1024)
def _choice_of(number: int, bits: int, group_size: int, symmetric: bool) -> Choice | None:
    """What a header names; None if no format knows it. Raises ChoiceError for a grid that cannot be stored."""
    native = (form for form in formats() if isinstance(form, NativeFormat))
    found = (form.of_header(number, bits, group_size, symmetric) for form in native)
    return next((one for one in found if one is not None), None)


def split_block(raw: np.ndarray, choice: Choice, shape: Shape) -> list[np.ndarray]:
    """Header, codes, offsets, scales, extra and padding of a block's bytes, as views."""
    return np.split(raw, np.cumsum((HEADER_BYTES, *native_format(choice).parts(choice, shape))))


def decode(block: torch.Tensor, name: str = "tensor") -> QuantizedMatrix:
    """The inverse of `encode`. Raises CheckpointError naming the tensor if the block is damaged."""
    choice, shape = read_block_header(block, name)
    form, per_group = native_format(choice), (shape[0], choice.groups(shape[1]))
    _, codes, offset_part, scale_part, extra_part, _ = split_block(block.contiguous().numpy(), choice, shape)
    scales = halves(scale_part, per_group, name)
    extra = form.read_extra(extra_part, choice, shape, name)
    offsets = None
    if not choice.symmetric and form.means:
        offsets = halves(offset_part, per_group, name)
    elif not choice.symmetric:
        offsets = form.unpacked_zero_points(offset_part, choice, shape, extra)
    return QuantizedMatrix(
        choice,
        shape,
        torch.from_numpy(codes.reshape(shape[0], -1)),
        torch.from_numpy(scales),
        None if offsets is None else torch.from_numpy(offsets),
        extra=extra,
    )


def dequantize(matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> torch.Tensor:
    """The values that the codes of some rows stand for, [rows, columns], whatever the format."""
    first, last, _ = rows.indices(matrix.shape[0])
    values = torch.empty((last - first, matrix.shape[1]), dtype=dtype)

    def restore(part: slice) -> None:
        values[part] = dequantized_rows(matrix, slice(first + part.start, first + part.stop)).to(dtype)

    in_threads(restore, row_parts(*values.shape))
    return values


def dequantized_rows(matrix: QuantizedMatrix, part: slice) -> torch.Tensor:
    """Some rows of `dequantize`, float32."""
    return torch.from_numpy(format_of(matrix.choice).restored(matrix, part))


def restored_error(matrix: QuantizedMatrix, weight: torch.Tensor) -> float:
    """Σ(w − ŵ)² against the [rows, columns] weights, float64, a few rows in memory at a time."""

    def error(part: slice) -> float:
        return squared_distance(weight[part], dequantized_rows(matrix, part))

    return math.fsum(map(error, row_parts(*matrix.shape)))
