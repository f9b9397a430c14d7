"""Weights stored in 8 or 4 bits and decoded as they are read, as if disk held the values that they stand for.

A tensor with an encoding has the name, dtype and shape of what it decodes to; scales that are stored as tensors
of their own are no tensors of the model (`finding` finds both). Codes are rows of whole bytes, so that rows can
be read alone. w is rounded once, to bfloat16, or to float16 where the scales are float16:

fp8 (DeepSeek-V3):     w = code · scale in float32, a scale to each block; those at the edges may be smaller.
mxfp4 (gpt-oss):       two 4-bit floats to a byte, the low half first, times 2^(s − 127), an s to 32 columns.
fp4 (NVFP4):           such floats times the product, or quotient, of a block's scale and the tensor's, in float32.
int8:                  w = (code − zero point) · scale.
packed2, 4, 8:         the same with codes plus 2^(bits − 1), the first in the lowest bits (compressed-tensors).
Q8_0 (ggml):           w = scale · code, with blocks of a float16 scale and 32 int8 codes.
plain (ggml):          the values themselves; only rows are in another order.

Sources: DeepSeek-V3's inference/fp8_cast_bf16.py, transformers' integrations/mxfp4.py and finegrained_fp8.py,
compressed-tensors' compressors, ModelOpt's NVFP4QTensor, gguf's quants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alphaq.checkpoint.tensors import Encoding, Part, TensorInfo, stored_grid
from alphaq.errors import CheckpointError, MissingExtraError
from alphaq.formats.ggml import GGML_TYPES
from alphaq.formats.ggml_library import restore_rows

MXFP4_COLUMNS = 32
DECODED_AT_ONCE = 1 << 20  # weights that are held in float32
_Q8_0_BYTES = 34

_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def unfolded(info: TensorInfo, experts: int) -> TensorInfo:
    """A tensor [experts · rows, columns] as [experts, rows, columns], its scales too.

    Raises CheckpointError if a block of scales reaches over two experts.
    """
    rows, columns = info.shape[0] // experts, info.shape[1]

    def unfold(part: Part | None) -> Part | None:
        if part is None or (grid := stored_grid(part.info))[1] == 1:
            return part
        if rows % part.height:
            raise CheckpointError(
                f"{part.info.name}: a scale to {part.height} rows reaches over two experts of {rows}. Start from "
                "the 16-bit checkpoint."
            )
        return replace(part, info=replace(part.info, shape=(experts, grid[1] // experts, grid[2])))

    encoding = info.encoding
    if encoding is not None:
        encoding = replace(
            encoding,
            scales=unfold(encoding.scales),
            factor=unfold(encoding.factor),
            divisor=unfold(encoding.divisor),
            zero_points=unfold(encoding.zero_points),
        )
    return replace(info, shape=(experts, rows, columns), encoding=encoding)


# -- decoding -------------------------------------------------------------------------------------


def decode(encoding: Encoding, codes: Tensor, parts: Mapping[str, Tensor], start: int = 0) -> Tensor:
    """Values [rows, columns] of stored rows: bfloat16 or float16, or float32 for ggml's.

    codes: uint8 [rows, bytes]. parts: the rows of each of the encoding's that these rows need. start: the first row's
    place in its matrix.
    """
    if encoding.scheme == "Q8_0":
        return _decode_q8_0(codes)
    if encoding.scheme in GGML_TYPES:
        return _decode_ggml(codes, encoding.scheme)
    if encoding.scheme == "mxfp4":
        return _decode_mxfp4(codes, parts["scales"])
    return _decode_scaled(encoding, codes, parts, start)


@lru_cache
def _table(scheme: str) -> np.ndarray[Any, Any]:
    """The values in each byte side by side in bfloat16, as one number, so that one look-up decodes them all."""
    byte = torch.arange(256, dtype=torch.uint8)
    if scheme == "fp8":
        values = byte.view(torch.float8_e4m3fn).to(torch.bfloat16)[:, None]
    elif scheme in ("fp4", "mxfp4"):
        values = torch.tensor(_E2M1, dtype=torch.bfloat16)[torch.stack([byte & 15, byte >> 4], dim=1).long()]
    elif scheme == "int8":
        values = byte.view(torch.int8).to(torch.bfloat16)[:, None]
    else:
        bits = packed_bits(scheme)
        shifts = torch.arange(0, 8, bits)
        values = (((byte[:, None].int() >> shifts) & ((1 << bits) - 1)) - (1 << (bits - 1))).to(torch.bfloat16)
    whole = {1: torch.int16, 2: torch.int32, 4: torch.int64}[values.shape[1]]
    return values.contiguous().view(whole).view(-1).numpy()


def packed_bits(scheme: str) -> int:
    """Bits of a code of compressed-tensors' packed integers."""
    return int(scheme.removeprefix("packed"))


def _looked_up(scheme: str, codes: Tensor) -> Tensor:
    return torch.from_numpy(_table(scheme).take(codes.numpy())).view(torch.bfloat16)


def _decode_scaled(encoding: Encoding, codes: Tensor, parts: Mapping[str, Tensor], start: int) -> Tensor:
    raw_scales = parts["scales"]
    scales = _numbers(raw_scales)
    if "factor" in parts:
        scales = scales * parts["factor"].float()
    if "divisor" in parts:
        scales = scales / parts["divisor"].float()
    height, width = encoding.block
    blocks = (torch.arange(len(codes)) + start % height).div_(height, rounding_mode="floor")
    zeros = _zero_points(encoding, parts["zero_points"], start, blocks) if "zero_points" in parts else None
    columns = encoding.columns or codes.shape[1] * (2 if encoding.scheme == "fp4" else 1)
    width = min(width, columns)  # a hostile config may name any
    dtype = torch.float16 if raw_scales.dtype == torch.float16 else torch.bfloat16
    decoded = torch.empty(len(codes), columns, dtype=dtype)
    step = max(1, DECODED_AT_ONCE // columns)
    for part in (slice(first, first + step) for first in range(0, len(codes), step)):
        values = _looked_up(encoding.scheme, codes[part])[:, :columns].float()
        if zeros is not None:
            _by_block(values, zeros[part], width, Tensor.sub_)
        _by_block(values, scales[blocks[part]], width, Tensor.mul_)
        decoded[part] = values
    return decoded


def _by_block(values: Tensor, numbers: Tensor, width: int, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Work a number [rows, blocks] into each block of a row's columns; the last block may be smaller."""
    whole = values.shape[1] // width
    operation(values[:, : whole * width].unflatten(1, (whole, width)), numbers[:, :whole, None])
    if whole * width < values.shape[1]:
        operation(values[:, whole * width :], numbers[:, whole : whole + 1])


def _numbers(scales: Tensor) -> Tensor:
    """Float32 of scales; bytes are exponents alone (E8M0)."""
    return (_powers(scales) if scales.dtype == torch.uint8 else scales).float()


def _powers(exponents: Tensor) -> Tensor:
    """2^(s − 127) in bfloat16 of bytes s, exactly. 255, no number, becomes infinite."""
    # A scale's byte is bfloat16's exponent, except that 2^-127 is subnormal there.
    return (exponents.to(torch.int16) << 7).clamp(min=64).view(torch.bfloat16)


def _zero_points(encoding: Encoding, points: Tensor, start: int, blocks: Tensor) -> Tensor:
    """Float32 [rows, groups] of zero points, one to each row of codes."""
    if points.dtype != torch.int32:
        return points.float()[blocks]
    bits = packed_bits(encoding.scheme)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)[:, None]
    unpacked = ((points[:, None] >> shifts) & ((1 << bits) - 1)) - (1 << (bits - 1))
    return unpacked.flatten(0, 1)[start % (32 // bits) :][: len(blocks)].float()


def _decode_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    values = _looked_up("mxfp4", codes)
    values.view(*scales.shape, MXFP4_COLUMNS).mul_(_powers(scales)[:, :, None])
    return values


def _decode_ggml(codes: Tensor, scheme: str) -> Tensor:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", f"Reading {scheme} weights needs the gguf package") from None
    try:
        return torch.from_numpy(gguf.quants.dequantize(codes.numpy(), gguf.GGMLQuantizationType[scheme]))
    except (KeyError, NotImplementedError):  # llama.cpp has types that the package does not know yet
        pass
    kind = GGML_TYPES[scheme]
    try:
        return torch.from_numpy(
            restore_rows(codes.numpy(), scheme, codes.shape[1] // kind.block_bytes * kind.block_weights)
        )
    except AttributeError:
        raise CheckpointError(f"Weights stored as {scheme} cannot be decoded. Start from a file in F16.") from None


def _decode_q8_0(codes: Tensor) -> Tensor:
    blocks = codes.view(len(codes), -1, _Q8_0_BYTES)
    scales = blocks[..., :2].contiguous().view(torch.float16).float()
    return (blocks[..., 2:].view(torch.int8).float() * scales).view(len(codes), -1)
