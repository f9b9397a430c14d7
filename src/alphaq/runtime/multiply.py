"""Multiply with packed matrices: one operator, kernels for each kind of device.

An operator of torch's, so that compilers keep it whole.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alphaq.errors import AlphaQError
from alphaq.formats.blocks import block_bytes, decode, dequantize
from alphaq.formats.native import HEADER_BYTES
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.runtime import kernels
from alphaq.runtime.block_kernels import RESTORED, TASK_ROWS, TRELLIS
from alphaq.runtime.packed import ADDRESS, BITS, FLAGS, PackedWeights
from alphaq.runtime.threads import parallel
from alphaq.simd.brains import BRAINS, FAST_BRAINS
from alphaq.simd.codes import FEATURES
from alphaq.simd.tiles import tiles_allowed
from alphaq.simd.vectors import flat

FEW_TOKENS = 32  # of one expert; more are multiplied with its restored matrix
FEW_BRAINS = 10  # the same, where restored rows stay in the processor's cache
FEW_TILES = 6  # the same, where they are multiplied by tiles, however many tokens there are
# With more a library's products make up for what it restores slowly.
MANY_BRAINS = 128
RESTORED_BYTES = 16 << 20  # of a matrix at a time


@torch.library.custom_op("alphaq::packed_linear", mutates_args=())
def packed_linear(inputs: Tensor, table: Tensor, rows: int, experts: Tensor, tokens: Tensor) -> Tensor:
    """y[i] = W[experts[i]] · inputs[tokens[i]] for every projection, one after the other: [pairs, projections · rows].

    inputs: [tokens, columns], float32, bfloat16 or float16; the result has its type. table: int64
    [projections, experts, FIELDS] of `PackedWeights`, whose blocks must live on. experts, tokens: int64 [pairs]; an
    expert that the table does not have gives zeros.
    """
    return _dispatched(inputs, table, rows, experts, tokens)


@packed_linear.register_fake
def _(inputs: Tensor, table: Tensor, rows: int, experts: Tensor, tokens: Tensor) -> Tensor:
    return inputs.new_empty(experts.shape[0], table.shape[0] * rows)


def _no_gradient(context: Any, gradient: Tensor) -> None:
    raise AlphaQError(
        "Packed weights have no gradients. Make an ordinary model with `model.dequantize()` before training."
    )


packed_linear.register_autograd(_no_gradient)


def multiply(inputs: Tensor, weights: PackedWeights, experts: Tensor, tokens: Tensor) -> Tensor:
    """`packed_linear` where the weights are; the result is where the inputs are."""
    home, device = inputs.device, weights.table.device
    if home != device:
        inputs, experts, tokens = inputs.to(device), experts.to(device), tokens.to(device)
    # An operator costs a tenth of a millisecond, which only compilers, gradients and who records need to pay.
    plain = not torch.compiler.is_compiling() and not (inputs.requires_grad and torch.is_grad_enabled())
    plain = plain and not torch._C._len_torch_dispatch_stack()
    products = (_dispatched if plain else packed_linear)(inputs, weights.table, weights.shape[0], experts, tokens)
    return products if home == device else products.to(home)


def _dispatched(inputs: Tensor, table: Tensor, rows: int, experts: Tensor, tokens: Tensor) -> Tensor:
    if inputs.device.type == "cpu":
        return cpu_linear(inputs, table, rows, experts, tokens)
    from alphaq.runtime import triton_kernels  # asks for triton, which only GPUs need

    return triton_kernels.packed_linear(inputs, table, rows, experts, tokens)


def cpu_linear(inputs: Tensor, table: Tensor, rows: int, experts: Tensor, tokens: Tensor) -> Tensor:
    """`packed_linear` on the CPU."""
    inputs, codings = inputs.detach().contiguous(), table.numpy()
    experts, tokens = experts.long().contiguous(), tokens.contiguous()
    brain = inputs.dtype == torch.bfloat16 and inputs.shape[1] % BRAINS == 0
    if brain and len(experts) > FEW_TILES and tiles_allowed():
        counts = kernels.count_pairs(experts.numpy(), codings.shape[1])[1:]
        if counts.max() > FEW_TILES:
            return _by_tiles(inputs, codings, rows, experts, tokens, counts)
    return _multiplied(inputs, codings, rows, experts, tokens, brain and FAST_BRAINS)


def _by_tiles(
    inputs: Tensor, codings: np.ndarray, rows: int, experts: Tensor, tokens: Tensor, counts: np.ndarray
) -> Tensor:
    """Products of bfloat16, by tiles where enough tokens want an expert."""
    out, wanted = inputs.new_empty(len(experts), len(codings) * rows), experts.numpy()
    bits = flat(out).reshape(out.shape)
    found = (flat(inputs), inputs.shape[1], codings, rows, wanted, tokens.numpy(), FEW_TILES + 1, bits)
    if kernels.multiply_tiled(*found, *parallel()):
        restored = (codings[..., FLAGS] & RESTORED > 0) & (counts > FEW_TILES)
        _multiply_left(inputs, codings, rows, wanted, tokens, restored, out)
    enough = np.flatnonzero(counts > FEW_TILES)
    few = torch.from_numpy(np.flatnonzero(~np.isin(wanted, enough)))
    if len(few):
        out[few] = _multiplied(inputs[tokens[few]], codings, rows, experts[few], torch.arange(len(few)), False)
    return out


def _multiplied(inputs: Tensor, codings: np.ndarray, rows: int, experts: Tensor, tokens: Tensor, brain: bool) -> Tensor:
    """Products by rows restored in the cache (`brain`) or by whole numbers, unless very many tokens want an expert."""
    out = torch.empty(len(experts), len(codings) * rows)
    wanted, chosen = experts.numpy(), tokens.numpy()
    few, many = (FEW_BRAINS, MANY_BRAINS) if brain else (FEW_TOKENS, FEW_TOKENS)
    left = kernels.multiply(
        flat(inputs),
        inputs.shape[1],
        codings,
        rows,
        wanted,
        chosen,
        few,
        many,
        inputs.dtype.itemsize > 2,
        out.numpy(),
        *parallel(),
    )
    if left:
        counts = kernels.count_pairs(wanted, codings.shape[1])[1:]
        restored = (counts > many) | (codings[..., FLAGS] & RESTORED > 0)  # [projections, experts]
        _multiply_left(inputs, codings, rows, wanted, tokens, restored & (counts > 0), out)
    return out.to(inputs.dtype)


def _multiply_left(
    inputs: Tensor,
    codings: np.ndarray,
    rows: int,
    wanted: np.ndarray,
    tokens: Tensor,
    restored: np.ndarray,
    out: Tensor,
) -> None:
    """Products with matrices that are restored whole, bool [projections, experts], to their pairs' places."""
    for expert in np.flatnonzero(restored.any(0)):
        mine = torch.from_numpy(np.flatnonzero(wanted == expert))
        _multiply_restored(inputs[tokens[mine]], codings[:, expert], restored[:, expert], rows, out, mine)


def _multiply_restored(
    inputs: Tensor, codings: np.ndarray, chosen: np.ndarray, rows: int, out: Tensor, places: Tensor
) -> None:
    """Multiply tokens with some rows of one expert's chosen matrices at a time, restored."""
    columns = inputs.shape[1]
    brain = inputs.dtype == torch.bfloat16 and "avx512bf16" in FEATURES
    kind = torch.bfloat16 if brain else torch.float32
    inputs = inputs.to(kind)
    step = max(1, RESTORED_BYTES // (columns * kind.itemsize) // TASK_ROWS) * TASK_ROWS
    scratch = torch.empty(min(step, rows), columns, dtype=kind)
    for projection in np.flatnonzero(chosen):
        coding = codings[projection]
        mixed = _held(int(coding[ADDRESS])) if coding[FLAGS] & RESTORED else None
        for first in range(0, rows, step):
            count = min(step, rows - first)
            part = scratch[:count]
            if mixed is not None:
                part = dequantize(mixed, kind, slice(first, first + count))
            elif coding[BITS] == 16 and not coding[FLAGS] & TRELLIS:
                part = _kept(coding, first, count, columns).to(kind)
            else:
                kernels.restore(coding, rows, columns, first, count, brain, flat(part), *parallel())
            out[places, projection * rows + first : projection * rows + first + count] = (inputs @ part.T).to(out.dtype)


def _held(address: int) -> QuantizedMatrix:
    """A matrix without a kernel where its block lies."""

    def bytes_there(count: int) -> Tensor:
        return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address)))

    return decode(bytes_there(block_bytes(bytes_there(HEADER_BYTES))))


def _kept(coding: np.ndarray, first: int, count: int, columns: int) -> Tensor:
    """Rows of a matrix of 16 bits where it lies."""
    begin = int(coding[ADDRESS]) + 2 * first * columns
    words = np.ctypeslib.as_array((ctypes.c_int16 * (count * columns)).from_address(begin))
    kind = torch.float16 if coding[FLAGS] else torch.bfloat16
    return torch.from_numpy(words).view(kind).view(count, columns)
