"""Multiply with trellis codes on a GPU: what `triton_kernels` calls for blocks of that kind.

A state is cut from one or two words of its row's stream and hashed; the level that it stands for is looked up in a
table of bfloat16, which holds levels exactly: 256 bytes, always in the nearest cache, and one shift away from float32.
To decode, a thread takes 32 weights of a row, which begin at a whole byte, and moves their words so that every further
shift is known when compiling. A row's scale is applied to its sum.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaq.formats import trellis

HEADER_BYTES = tl.constexpr(16)
STATE_BITS = tl.constexpr(trellis.STATE_BITS)
LINEAR, SQUARE = tl.constexpr(trellis.LINEAR), tl.constexpr(trellis.SQUARE)
LEVEL_SHIFT = tl.constexpr(trellis.STATE_BITS + 1 - len(trellis.LEVELS).bit_length())
LAST_LEVEL = tl.constexpr(len(trellis.LEVELS) - 1)
UNIT = tl.constexpr(trellis.UNIT)


@lru_cache
def levels_on(device: torch.device) -> Tensor:
    """What the kernels look up, on their device: bfloat16 [128]."""
    return torch.tensor(trellis.LEVELS.tolist(), dtype=torch.bfloat16, device=device)


@triton.jit(noinline=True)
def store_trellis_rows(
    address,
    x,
    y,
    first_row,
    rows,
    columns,
    levels,
    RATE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    """y[first_row:][:TILE_ROWS] = Ŵ·x of a block of RATE quarters of a bit. x: inputs as `_arrange` lays them."""
    out_row = first_row + tl.arange(0, TILE_ROWS)
    row = tl.minimum(out_row, rows - 1)
    row_start, scale = _row_of(address, row, rows, columns, RATE)
    row_words = tl.cdiv(columns * RATE // 4, 32)
    blocks = tl.cdiv(columns, BLOCK)
    lane = tl.arange(0, TILE_BLOCKS)[None, :]  # two axes throughout, as in `triton_kernels`
    total = tl.full([TILE_ROWS, TILE_BLOCKS], 0.0, tl.float32)
    for first in range(0, blocks, TILE_BLOCKS):
        block = tl.minimum(first + lane, blocks - 1)
        at = block * RATE // 4 - 1  # the word before, which holds the oldest bits of the first states
        shift = ((block * RATE % 4) * 8).to(tl.uint32)
        raw = tl.where(at < 0, 0, tl.load(tl.max_contiguous(row_start[:, None] + tl.maximum(at, 0), [1, 2])))
        following = _word(row_start, at + 1, row_words)
        after = _word(row_start, at + 2, row_words)
        word = _moved(raw, following, shift, RATE)
        next_word = _moved(following, after, shift, RATE)
        for place in tl.static_range(0, 32):
            if _begin(place, RATE) // 32 > _begin(place - 1, RATE) // 32:
                following = after
                after = _word(row_start, at + _begin(place, RATE) // 32 + 2, row_words)
                word = next_word
                next_word = _moved(following, after, shift, RATE)
            if _begin(place, RATE) % 32 + STATE_BITS > 32:
                state = (word >> (_begin(place, RATE) % 32)) | (next_word << (32 - _begin(place, RATE) % 32))
            else:
                state = word >> (_begin(place, RATE) % 32)
            values = tl.load(x + (first * BLOCK + place * TILE_BLOCKS) + lane).to(tl.float32)
            total = tl.fma(_level(levels, state), values, total)
    result = tl.sum(total, 1) * scale
    tl.store(y + out_row, result.to(y.dtype.element_ty), mask=out_row < rows)


@triton.jit
def product_with_trellis(
    x,
    filled,
    address,
    row,
    rows,
    columns,
    rate,
    levels,
    BLOCK: tl.constexpr,
    TILE_PAIRS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """X·Ŵᵀ of some rows of a block of any rate, float32 [TILE_PAIRS, TILE_ROWS]."""
    row_start, scale = _row_of(address, row, rows, columns, rate)
    row_words = tl.cdiv(columns * rate // 4, 32)
    total = tl.full([TILE_PAIRS, TILE_ROWS], 0.0, tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        values = tl.load(x[:, None] + column[None, :], mask=filled[:, None] & inside[None, :], other=0.0)
        begin = (column + 1) * rate // 4 - STATE_BITS + 32  # from the word before the row
        at = tl.minimum(begin // 32, row_words)[None, :]
        shift = (begin % 32).to(tl.uint32)[None, :]
        raw = tl.load(tl.max_contiguous(row_start[:, None] + tl.maximum(at - 1, 0), [1, 2]))
        word = tl.where(at == 0, 0, raw)
        state = (word >> shift) | ((_word(row_start, at, row_words) << 1) << (31 - shift))
        weights = _level(levels, state) * scale[:, None]
        total = tl.dot(values, weights.to(values.dtype).trans(1, 0), total, input_precision="ieee")
    return total


@triton.jit
def _row_of(address, row, rows, columns, rate):
    """Where the streams of some rows begin, and their scales."""
    row_words = tl.cdiv(columns * rate // 4, 32)
    codes = (address + HEADER_BYTES).to(tl.pointer_type(tl.uint32))
    scales = (address + HEADER_BYTES + rows.to(tl.int64) * (4 * row_words)).to(tl.pointer_type(tl.float16))
    return codes + row.to(tl.int64) * row_words, tl.load(scales + row).to(tl.float32) * UNIT


@triton.constexpr_function
def _begin(place, rate):
    """The first bit of a weight's state, counted from the word before its 32's."""
    return 32 + (place + 1) * rate // 4 - STATE_BITS


@triton.jit
def _word(row_start, at, row_words):
    """A word of each row's stream; the last one for those beyond."""
    return tl.load(tl.max_contiguous(row_start[:, None] + tl.minimum(at, row_words - 1), [1, 2]))


@triton.jit
def _moved(word, following, shift, RATE: tl.constexpr):
    """32 bits of a stream from some bit of a word on."""
    if RATE % 4 == 0:  # blocks begin with their words
        return word
    return (word >> shift) | ((following << 1) << (31 - shift))  # a shift by 32 would be undefined


@triton.jit
def _level(levels, state):
    """What states stand for, in whole levels; what they have above their bits does not count."""
    hashed = state * (state * SQUARE + LINEAR)
    return tl.load(levels + ((hashed >> LEVEL_SHIFT) & LAST_LEVEL)).to(tl.float32)
