"""Weights of trellis codes in registers: 64 states cut from a stream of bits, hashed in lanes of 16 bits, looked up.

A state is the last bits of the stream up to its weight's, so that any 64 weights are decoded by themselves, from twice
as many bytes as their rate has quarters of a bit, and the two before. On processors with AVX-512's byte permutations
that takes thirteen instructions; elsewhere LLVM makes the best of the same steps. What comes out is used as codes of 8
bits are.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from alphaq.formats.trellis import LEVELS, LINEAR, SQUARE, STATE_BITS
from alphaq.simd.codes import CODES, FEATURES, uint8x64

BEFORE = 2  # bytes of the stream before those of 64 weights, which hold the oldest bits of their first states
MIDDLE = 128  # of what comes out
FRESH = -4  # a mask of bytes: nothing lies before a row
_RATES = range(1, 17)  # in quarters of a bit

_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
_BYTES, _HALF = ir.VectorType(_I8, CODES), ir.VectorType(_I16, CODES // 2)
_FAST = {"avx512bw", "avx512vbmi"} <= FEATURES
_SHUFFLED = "avx2" in FEATURES  # bytes of sixteen, by bytes


def _begin(rate: int, weight: int) -> int:
    """The first bit of a weight's state, counted from `BEFORE` bytes before its 64's."""
    return 8 * BEFORE + (weight + 1) * rate // 4 - STATE_BITS


def _first_byte(rate: int, weight: int) -> int:
    """Of the eight that hold the states of a weight and its three neighbours."""
    return _begin(rate, weight // 4 * 4) // 8


def _gathered(rate: int, first: int) -> list[int]:
    """For the states of 32 weights: eight bytes around every four of them."""
    last = 2 * rate + BEFORE - 1
    return [min(_first_byte(rate, first + byte // 2) + byte % 8, last) for byte in range(CODES)]


def _cut(rate: int, first: int) -> list[int]:
    """Where the two bytes of each state begin within its eight, in bits."""
    weights = [first + byte // 2 for byte in range(CODES)]
    begins = [_begin(rate, weight) - 8 * _first_byte(rate, weight) for weight in weights]
    return [begin + 8 * (byte % 2) for byte, begin in enumerate(begins)]


_NOTHING = [0] * CODES
_TABLES = {
    f"alphaq_{make.__name__}_{first}": [_NOTHING, *(make(rate, first) for rate in _RATES)]
    for make in (_gathered, _cut)
    for first in (0, CODES // 2)
}


def _all(value: int, kind: Any) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _named(builder: Any, name: str, kind: Any, arguments: list[Any]) -> Any:
    function = ir.FunctionType(kind, [value.type for value in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def _held(module: Any, name: str, value: Any) -> Any:
    """A constant of the compiled module."""
    return module.globals[name] if name in module.globals else cgutils.global_constant(module, name, value)


def _row_of(builder: Any, name: str, index: Any) -> Any:
    rows = [ir.Constant(_BYTES, row) for row in _TABLES[name]]
    held = _held(builder.module, name, ir.Constant(ir.ArrayType(_BYTES, len(rows)), rows))
    return builder.load(builder.gep(held, [_I64(0), index]))


def _states_fast(builder: Any, address: Any, rate: Any, mask: Any) -> list[Any]:
    """Twice 32 lanes whose lowest bits are a state."""
    read = builder.lshr(_I64(-1), builder.sub(_I64(64 - BEFORE), builder.add(rate, rate)))
    wanted = builder.bitcast(builder.and_(read, mask), ir.VectorType(ir.IntType(1), CODES))
    place = builder.inttoptr(address, _BYTES.as_pointer())
    raw = _named(builder, "llvm.masked.load.v64i8.p0", _BYTES, [place, _I32(1), wanted, _all(0, _BYTES)])
    found = []
    for first in (0, CODES // 2):
        order, cut = (_row_of(builder, f"alphaq_{table}_{first}", rate) for table in ("_gathered", "_cut"))
        spread = _named(builder, "llvm.x86.avx512.permvar.qi.512", _BYTES, [raw, order])
        states = _named(builder, "llvm.x86.avx512.pmultishift.qb.512", _BYTES, [cut, spread])
        found.append(builder.bitcast(states, _HALF))
    return found


def _states_portable(builder: Any, address: Any, rate: Any, mask: Any) -> list[Any]:
    """The same with a branch per rate: the bytes that hold a state side by side, shifted."""
    after, none = builder.append_basic_block("states"), builder.append_basic_block("no_rate")
    fresh = builder.icmp_unsigned("==", builder.and_(mask, _I64(1)), _I64(0))
    switch = builder.switch(rate, none)
    wide = ir.VectorType(_I32, CODES // 2)
    found = []
    for quarters in _RATES:
        block = builder.append_basic_block(f"rate{quarters}")
        switch.add_case(_I64(quarters), block)
        builder.position_at_end(block)
        kind = ir.VectorType(_I8, 2 * quarters + BEFORE)
        raw = builder.load(builder.inttoptr(address, kind.as_pointer()))
        raw.align = 1
        first_row = ir.Constant(kind, [0] * BEFORE + [255] * 2 * quarters)
        raw = builder.select(fresh, builder.and_(raw, first_row), raw)
        halves = []
        for first in (0, CODES // 2):
            begins = [_begin(quarters, first + weight) for weight in range(CODES // 2)]
            order = [min(begin // 8 + byte, kind.count - 1) for begin in begins for byte in range(4)]
            index = ir.Constant(ir.VectorType(_I32, len(order)), order)
            spread = builder.bitcast(builder.shuffle_vector(raw, ir.Constant(kind, ir.Undefined), index), wide)
            moved = builder.lshr(spread, ir.Constant(wide, [begin % 8 for begin in begins]))
            halves.append(builder.trunc(moved, _HALF))
        found.append((halves, builder.block))
        builder.branch(after)
    builder.position_at_end(none)
    builder.branch(after)
    builder.position_at_end(after)
    results = [builder.phi(_HALF), builder.phi(_HALF)]
    for number, result in enumerate(results):
        for halves, block in found:
            result.add_incoming(halves[number], block)
        result.add_incoming(_all(0, _HALF), none)
    return results


def _hashed(builder: Any, states: Any) -> Any:
    """x·(LINEAR + SQUARE·x) moved up to the last bit but one: its first seven bits say which level a state stands for.

    What a lane has above its state is moved out.
    """
    up = 1 << 15 - STATE_BITS
    factor = builder.add(builder.mul(states, _all(SQUARE * up, _HALF)), _all(LINEAR * up, _HALF))
    return builder.bitcast(builder.mul(states, factor), _BYTES)


def _looked_up(builder: Any, first: Any, second: Any) -> Any:
    """Levels of twice 32 hashed states, as bytes about `MIDDLE`."""
    high = list(range(1, 2 * CODES, 2))
    levels = [int(level) + MIDDLE for level in LEVELS]
    if _FAST:
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        numbers = _named(builder, name, _BYTES, [first, ir.Constant(_BYTES, high), second])
        tables = [ir.Constant(_BYTES, levels[:CODES]), ir.Constant(_BYTES, levels[CODES:])]
        return _named(builder, name, _BYTES, [tables[0], numbers, tables[1]])
    numbers = builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, CODES), high))
    numbers = builder.and_(numbers, _all(len(levels) - 1, _BYTES))
    if _SHUFFLED:
        return _looked_up_by_sixteen(builder, numbers, levels)
    table = _held(builder.module, "alphaq_levels", ir.Constant(ir.ArrayType(_I8, len(levels)), levels))
    result = ir.Constant(_BYTES, ir.Undefined)
    for lane in range(CODES):
        number = builder.zext(builder.extract_element(numbers, _I32(lane)), _I64)
        result = builder.insert_element(result, builder.load(builder.gep(table, [_I64(0), number])), _I32(lane))
    return result


def _looked_up_by_sixteen(builder: Any, numbers: Any, levels: list[int]) -> Any:
    """Shuffles look up sixteen levels at a time, and give 0 where the index has its first bit set."""
    part = ir.VectorType(_I8, CODES // 2)
    halves = []
    for first in (0, CODES // 2):
        order = ir.Constant(ir.VectorType(_I32, CODES // 2), list(range(first, first + CODES // 2)))
        index = builder.shuffle_vector(numbers, ir.Constant(_BYTES, ir.Undefined), order)
        found = _all(0, part)
        for begin in range(0, len(levels), 16):
            table = ir.Constant(part, levels[begin : begin + 16] * 2)
            own = builder.add(builder.xor(index, _all(begin, part)), _all(0x70, part))  # others reach 0x80
            found = builder.or_(found, _named(builder, "llvm.x86.avx2.pshuf.b", part, [table, own]))
        halves.append(found)
    return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(_I32, CODES), list(range(CODES))))


@intrinsic
def weights_at(typing: Any, address: Any, rate: Any, mask: Any) -> Any:
    """64 weights of a rate in quarters of a bit, as levels + `MIDDLE`; reads `BEFORE` + 2·rate bytes from an address.

    mask: which of the bytes count, −1 for all or `FRESH` at the begin of a row.
    """

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        states = (_states_fast if _FAST else _states_portable)(builder, *args)
        return _looked_up(builder, *(_hashed(builder, half) for half in states))

    return uint8x64(types.int64, types.int64, types.int64), code
