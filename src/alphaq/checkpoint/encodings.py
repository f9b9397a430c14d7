"""Weights stored in 8 or 4 bits and decoded as they are read, as if disk held the values that they stand for.

A tensor with an encoding has the name, dtype and shape of what it decodes to; scales that are stored as tensors
of their own are no tensors of the model. Codes are rows of whole bytes, so that rows can be read alone:

fp8 (DeepSeek-V3):  w = float32(code) · scale, a scale to each block of a matrix; blocks at the edges may be smaller.
mxfp4 (gpt-oss):    two 4-bit floats to a byte, the low half first, times 2^(s − 127), an s to 32 columns.
Q8_0 (ggml):        w = scale · code, with blocks of a float16 scale and 32 int8 codes.
plain (ggml):       the values themselves; only rows are in another order.

Sources: DeepSeek-V3's inference/fp8_cast_bf16.py, transformers' integrations/mxfp4.py, gguf's quants.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alphaq.checkpoint.safetensors_format import TensorInfo
from alphaq.errors import CheckpointError, MissingExtraError
from alphaq.ggml import GGML_TYPES

Scheme = str
"""plain, fp8, mxfp4, or a quantized type of ggml, such as Q8_0."""

READABLE_METHODS = ("fp8", "mxfp4")
"""Values of `quant_method` in a config.json that `decoded_shards` knows."""

_STORED_DTYPES = {"fp8": "F8_E4M3", "mxfp4": "MXFP4"}
_SUFFIXES = {"fp8": ("", "_scale_inv"), "mxfp4": ("_blocks", "_scales")}  # of codes and of scales
_SCALE_DTYPES = {"fp8": ("F32", "BF16", "F16"), "mxfp4": ("U8",)}
_OTHER_FP8 = (".weight_scale", ".input_scale", ".activation_scale", ".k_scale", ".v_scale")
_MXFP4_COLUMNS, _MXFP4_BYTES = 32, 16
_Q8_0_BYTES = 34

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.bfloat16)
_BYTES = torch.arange(256)
_E2M1_PAIRS = torch.stack([_E2M1[_BYTES & 15], _E2M1[_BYTES >> 4]], dim=1).view(torch.int32).view(-1).numpy()
"""Both values of each byte side by side, as one number, so that one look-up decodes two."""


@dataclass(frozen=True)
class Encoding:
    """How a tensor's values are stored.

    block: rows and columns of a stored matrix that share a scale. scales: where these lie, one to a block, None if
    they are among the codes. scales_shard: the file that holds them, None if it is the codes' own. head_rows: rows of
    an attention head whose halves lie on disk row by row in turns, as llama.cpp's rotary embedding pairs them; 0 if
    rows are in order.
    """

    scheme: Scheme
    block: tuple[int, int]
    scales: TensorInfo | None = None
    scales_shard: str | None = None
    head_rows: int = 0
    decoder: Callable[[Tensor, str], Tensor] | None = None
    """Gives the values of a whole tensor from its bytes and name, where a format of this package's own is read."""

    def scale_rows(self, start: int, stop: int) -> tuple[int, int]:
        """First row of scales, and row after the last, that rows [start, stop) of codes need."""
        height = self.block[0]
        return start // height, -(-stop // height)

    @property
    def turned(self) -> bool:
        """Whether disk holds rows and columns in the other order than the decoded tensor."""
        return self.scheme == "mxfp4"


def stored_grid(info: TensorInfo) -> tuple[int, int, int]:
    """Slices, rows and columns of a tensor [..., rows, columns] as they lie on disk."""
    *slices, rows, columns = (1, 1, *info.shape)
    if info.encoding is not None and info.encoding.turned:
        rows, columns = columns, rows
    return math.prod(slices), rows, columns


def rows_place(info: TensorInfo, index: int, start: int, stop: int) -> tuple[int, int]:
    """First byte in its file, and number of bytes, of rows [start, stop) of one slice as they lie on disk."""
    slices, rows, _ = stored_grid(info)
    row_bytes = info.nbytes // (slices * rows)
    return info.begin + (index * rows + start) * row_bytes, (stop - start) * row_bytes


def stored_dtype(info: TensorInfo) -> str:
    """What the values are stored as: a dtype's name, or F8_E4M3, MXFP4, Q8_0."""
    if info.encoding is None or info.encoding.scheme == "plain":
        return info.dtype
    return _STORED_DTYPES.get(info.encoding.scheme, info.encoding.scheme)


def bytes_on_disk(info: TensorInfo) -> int:
    """Bytes of a tensor's data and of its scales."""
    scales = info.encoding.scales if info.encoding is not None else None
    return info.nbytes + (scales.nbytes if scales is not None else 0)


# -- decoding -------------------------------------------------------------------------------------


def decode(encoding: Encoding, codes: Tensor, scales: Tensor | None, first: int = 0) -> Tensor:
    """Values [rows, columns] of stored rows: bfloat16, or float32 for ggml's, exact but for the rounding to bfloat16.

    codes: uint8 [rows, bytes]. scales: those of all blocks that the rows touch, [block rows, block columns]. first:
    the first row's place in its block.
    """
    if encoding.scheme == "Q8_0":
        return _decode_q8_0(codes)
    if encoding.scheme in GGML_TYPES:
        return _decode_ggml(codes, encoding.scheme)
    assert scales is not None  # both others store them apart
    return _decode_mxfp4(codes, scales) if encoding.scheme == "mxfp4" else _decode_fp8(encoding, codes, scales, first)


def _decode_fp8(encoding: Encoding, codes: Tensor, scales: Tensor, first: int) -> Tensor:
    height, width = encoding.block
    columns = codes.shape[1]
    width = min(width, columns)  # a hostile config may name any
    values = codes.view(torch.float8_e4m3fn)
    decoded = torch.empty(codes.shape, dtype=torch.bfloat16)
    for number, row in enumerate(scales.float()):
        band = slice(max(number * height - first, 0), (number + 1) * height - first)
        decoded[band] = values[band].float() * row.repeat_interleave(width)[:columns]
    return decoded


def _decode_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    values = torch.from_numpy(_E2M1_PAIRS[codes.numpy()]).view(torch.bfloat16)
    # A scale's byte is bfloat16's exponent, except that 2^-127 is subnormal there. 255, no number, becomes infinite.
    powers = (scales.to(torch.int16) << 7).clamp(min=64).view(torch.bfloat16)
    values.view(*scales.shape, _MXFP4_COLUMNS).mul_(powers[:, :, None])
    return values


def _decode_ggml(codes: Tensor, scheme: str) -> Tensor:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", f"Reading {scheme} weights needs the gguf package") from None
    try:
        return torch.from_numpy(gguf.quants.dequantize(codes.numpy(), gguf.GGMLQuantizationType[scheme]))
    except NotImplementedError:
        raise CheckpointError(f"Weights stored as {scheme} cannot be decoded. Start from a file in F16.") from None


def _decode_q8_0(codes: Tensor) -> Tensor:
    blocks = codes.view(len(codes), -1, _Q8_0_BYTES)
    scales = blocks[..., :2].contiguous().view(torch.float16).float()
    return (blocks[..., 2:].view(torch.int8).float() * scales).view(len(codes), -1)


# -- finding encoded tensors ----------------------------------------------------------------------


def decoded_shards(
    shards: Mapping[str, Mapping[str, TensorInfo]], quantization: Mapping[str, Any]
) -> dict[str, dict[str, TensorInfo]]:
    """Tensors by shard as they are once decoded; scales, and shards of scales alone, are no longer there.

    quantization: the config's `quantization_config`, whose quant_method is one of READABLE_METHODS. Raises
    CheckpointError for codes without scales, scales without codes, shapes that do not fit, and forms of FP8 other
    than blocks.
    """
    scheme: Scheme = quantization["quant_method"]
    block = _fp8_block(quantization) if scheme == "fp8" else (1, _MXFP4_COLUMNS)
    codes_suffix, scales_suffix = _SUFFIXES[scheme]
    places = {name: (shard, info) for shard, tensors in shards.items() for name, info in tensors.items()}
    coded = {
        name
        for name, (_, info) in places.items()
        if (info.dtype == "F8_E4M3" if scheme == "fp8" else name.endswith(codes_suffix))
    }
    decoded: dict[str, dict[str, TensorInfo]] = {}
    for name, (shard, info) in places.items():
        if name in coded:
            scales_name = name.removesuffix(codes_suffix) + scales_suffix
            if scales_name not in places:
                raise CheckpointError(
                    f"{name} has no scales: {scales_name} is not there. Complete the download, or start from the "
                    "16-bit checkpoint."
                )
            scales_shard, scales = places[scales_name]
            _check_fit(info, scales, scheme, block)
            info = _decoded_info(info, Encoding(scheme, block, scales, scales_shard))
            if info.name != name and info.name in places:
                raise CheckpointError(f"{info.name} is stored twice, as {name} too. Keep one of them.")
        elif name.endswith(scales_suffix):
            codes = name.removesuffix(scales_suffix) + codes_suffix
            if codes not in coded:
                raise CheckpointError(f"{name} are scales, but {codes} is not there as {scheme}. Download it again.")
            continue
        elif scheme == "fp8" and name.endswith(_OTHER_FP8):
            raise CheckpointError(
                f"{name} belongs to a form of FP8 that cannot be read; only weights with a weight_scale_inv to each "
                "block can. Start from the 16-bit checkpoint."
            )
        decoded.setdefault(shard, {})[info.name] = info
    return decoded


def _decoded_info(codes: TensorInfo, encoding: Encoding) -> TensorInfo:
    name, shape = codes.name, codes.shape
    if encoding.scheme == "mxfp4":  # as transformers' class has it, whose experts are [columns, rows]
        experts, rows, groups, _ = shape
        name, shape = name.removesuffix("_blocks"), (experts, groups * _MXFP4_COLUMNS, rows)
    return replace(codes, name=name, dtype="BF16", shape=shape, encoding=encoding)


def _fp8_block(quantization: Mapping[str, Any]) -> tuple[int, int]:
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in block):
        raise CheckpointError(
            f"config.json: weight_block_size is {block!r}, not two positive numbers, and FP8 is read in blocks only. "
            "Start from the 16-bit checkpoint."
        )
    return block[0], block[1]


def _check_fit(codes: TensorInfo, scales: TensorInfo, scheme: Scheme, block: tuple[int, int]) -> None:
    """CheckpointError unless the codes have the scheme's form, and the scales what the codes' shape asks for."""
    if scheme == "mxfp4":
        fits = codes.dtype == "U8" and len(codes.shape) == 4 and codes.shape[-1] == _MXFP4_BYTES
        form = f"U8 [experts, rows, columns / {_MXFP4_COLUMNS}, {_MXFP4_BYTES}]"
        blocks = codes.shape[:-1]
    else:
        fits = len(codes.shape) in (2, 3)
        form = "a matrix, or one to each expert"
        blocks = (
            *codes.shape[:-2],
            *(-(-side // length) for side, length in zip(codes.shape[-2:], block, strict=False)),
        )
    if not fits or 0 in codes.shape:
        raise CheckpointError(
            f"{codes.name} is {codes.dtype} {list(codes.shape)}, not {form}. Download the checkpoint again."
        )
    if scales.dtype not in _SCALE_DTYPES[scheme] or scales.shape != blocks:
        raise CheckpointError(
            f"{scales.name} is {scales.dtype} {list(scales.shape)}, but {codes.name} of shape {list(codes.shape)} "
            f"needs {' or '.join(_SCALE_DTYPES[scheme])} {list(blocks)}. Download the checkpoint again or correct "
            "config.json."
        )
