"""Sums of 16 × 16 products of bfloat16, which processors with AMX keep in registers of a kibibyte.

Four such sums are added to at a time, from rows of a matrix as they lie (16 rows of 32 columns) and from tokens whose
columns were turned before: 16 pairs of columns, each of 16 tokens. One instruction adds 8,192 products.

A process asks the kernel for these registers once. On other processors the functions are compiled to a trap: whoever
calls them has asked `tiles_allowed`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from alphaq.simd.codes import FEATURES
from alphaq.simd.vectors import LANES

PAIR_BYTES = 4  # two columns of a token
STEP_BYTES = LANES * PAIR_BYTES  # of a row: 32 columns
TILE_BYTES = LANES * STEP_BYTES
SUMS = 4  # that are added to at a time
_HAVE_TILES = {"amx-tile", "amx-bf16", "avx512f"} <= FEATURES
_REQUEST_SYSCALL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # arch_prctl of x86-64 Linux

_I8, _I32, _I64 = (ir.IntType(width) for width in (8, 32, 64))
_PLACE, _NOTHING = _I8.as_pointer(), ir.VoidType()
_WORDS = ir.VectorType(_I32, LANES)


def _shapes() -> np.ndarray:
    """What `open_tiles` reads: all eight registers have 16 rows of 64 bytes."""
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1
    shapes[16:32].view(np.uint16)[:] = STEP_BYTES
    shapes[48:56] = LANES
    return shapes


SHAPES = _shapes()


@lru_cache(maxsize=1)
def tiles_allowed() -> bool:
    """Whether this process may use the registers: there are some, and the kernel has given leave."""
    if not _HAVE_TILES or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    return libc.syscall(_REQUEST_SYSCALL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def _instruct(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(_NOTHING, [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _over_addresses(count: int, instructions: Callable[[Any, Sequence[Any]], None]) -> Any:
    """An intrinsic of so many whole numbers without a result."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if _HAVE_TILES:
            instructions(builder, args)
        else:
            kind = ir.FunctionType(_NOTHING, [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.trap"), [])
        return context.get_dummy_value()

    kinds = [types.int64] * count
    by_count = {
        0: lambda typing: (types.void(), code),
        1: lambda typing, a: (types.void(*kinds), code),
        4: lambda typing, a, b, c, d: (types.void(*kinds), code),
    }
    return intrinsic(by_count[count])


def _load(builder: Any, register: int, address: Any, stride: Any) -> None:
    _instruct(builder, "tileloadd64", _I8(register), builder.inttoptr(address, _PLACE), stride)


def _clear(builder: Any, args: Sequence[Any]) -> None:
    for register in range(SUMS):
        _instruct(builder, "tilezero", _I8(register))


def _two_by_two(builder: Any, args: Sequence[Any]) -> None:
    rows, stride, tokens, more_tokens = args
    more_rows = builder.add(rows, builder.mul(stride, _I64(LANES)))
    for register, address in ((4, rows), (5, more_rows)):
        _load(builder, register, address, stride)
    for register, address in ((6, tokens), (7, more_tokens)):
        _load(builder, register, address, _I64(STEP_BYTES))
    for number in range(SUMS):
        _instruct(builder, "tdpbf16ps", _I8(number), _I8(4 + number // 2), _I8(6 + number % 2))


def _four_by_one(builder: Any, args: Sequence[Any]) -> None:
    rows, stride, tokens, _ = args
    _load(builder, 4, tokens, _I64(STEP_BYTES))
    for number in range(SUMS):
        address = builder.add(rows, builder.mul(stride, _I64(LANES * number)))
        _load(builder, 5 + number % 3, address, stride)
        _instruct(builder, "tdpbf16ps", _I8(number), _I8(5 + number % 3), _I8(4))


def _put(builder: Any, args: Sequence[Any]) -> None:
    for register in range(SUMS):
        address = builder.inttoptr(builder.add(args[0], _I64(TILE_BYTES * register)), _PLACE)
        _instruct(builder, "tilestored64", _I8(register), address, _I64(STEP_BYTES))


def _take(builder: Any, args: Sequence[Any]) -> None:
    for register in range(SUMS):
        _load(builder, register, builder.add(args[0], _I64(TILE_BYTES * register)), _I64(STEP_BYTES))


open_tiles = _over_addresses(
    1, lambda builder, args: _instruct(builder, "ldtilecfg", builder.inttoptr(args[0], _PLACE))
)
"""open_tiles(address of `SHAPES`): a thread does this before the others, and `close_tiles` after them."""
close_tiles = _over_addresses(0, lambda builder, args: _instruct(builder, "tilerelease"))
clear_sums = _over_addresses(0, _clear)
add_two_by_two = _over_addresses(4, _two_by_two)
"""add_two_by_two(rows, stride, tokens, more tokens): addresses of 32 rows, so many bytes apart, and of twice 16 tokens.

Sum 2·i + j is that of the i-th sixteen rows with the j-th sixteen tokens.
"""
add_four_by_one = _over_addresses(4, _four_by_one)
"""add_four_by_one(rows, stride, tokens, 0): of 64 rows and 16 tokens; sum i is that of the i-th sixteen rows."""
put_sums = _over_addresses(1, _put)
"""put_sums(address): the four sums, float32 [4, 16 rows, 16 tokens]."""
take_sums = _over_addresses(1, _take)
"""take_sums(address): go on with what `put_sums` wrote."""


@intrinsic
def turn_words(typing: Any, places: Any, offset: Any, target: Any) -> Any:
    """Sixteen rows of sixteen 32-bit words become columns: [16, 16] at an address.

    places: address of sixteen int64, where each row is; offset: bytes from there on. The target may be where the rows
    are.
    """
    order = [place for lane in range(LANES // 2) for place in (lane, lane + LANES)]
    kind = ir.VectorType(_I32, LANES)
    lower, upper = (ir.Constant(kind, [place + more for place in order]) for more in (0, LANES // 2))

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places, offset, target = args
        rows = []
        for row in range(LANES):
            place = builder.load(builder.inttoptr(builder.add(places, _I64(8 * row)), _I64.as_pointer()))
            value = builder.load(builder.inttoptr(builder.add(place, offset), _WORDS.as_pointer()))
            value.align = 2
            rows.append(value)
        for _ in range(4):
            pairs = [(rows[row], rows[row + LANES // 2]) for row in range(LANES // 2)]
            rows = [builder.shuffle_vector(*pair, mix) for pair in pairs for mix in (lower, upper)]
        for row, value in enumerate(rows):
            address = builder.add(target, _I64(STEP_BYTES * row))
            builder.store(value, builder.inttoptr(address, _WORDS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code
