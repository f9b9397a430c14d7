"""Sixteen float32 lanes to memory as 16-bit floats, rounded as torch rounds, and powers of two for whole lines."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from alphaq.simd.vectors import LANES, float32x16

_I16, _I32, _I64 = (ir.IntType(width) for width in (16, 32, 64))
_WHOLE, _SHORT = ir.VectorType(_I32, LANES), ir.VectorType(_I16, LANES)
_HALVES = ir.VectorType(ir.HalfType(), LANES)
NO_BRAIN = 0x7FC0  # NaN of bfloat16


def _put(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


@intrinsic
def put_rounded_brains(typing: Any, address: Any, value: Any) -> Any:
    """Write sixteen lanes to an address as bfloat16, ties to even; NaN stays one."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def all_of(number: int) -> Any:
            return ir.Constant(_WHOLE, [number] * LANES)

        bits = builder.bitcast(args[1], _WHOLE)
        odd = builder.and_(builder.lshr(bits, all_of(16)), all_of(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, all_of(0x7FFF))), all_of(16))
        spoiled = builder.fcmp_unordered("uno", args[1], args[1])
        rounded = builder.select(spoiled, all_of(NO_BRAIN), rounded)
        _put(builder, args[0], builder.trunc(rounded, _SHORT))
        return context.get_dummy_value()

    return types.void(types.int64, float32x16), code


@intrinsic
def put_rounded_halves(typing: Any, address: Any, value: Any) -> Any:
    """Write sixteen lanes to an address as float16, ties to even."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _put(builder, args[0], builder.fptrunc(args[1], _HALVES))
        return context.get_dummy_value()

    return types.void(types.int64, float32x16), code


@intrinsic
def times_power(typing: Any, value: Any, shifted: Any) -> Any:
    """value · 2^n of float64; shifted: n + 1.5 · 2^52, whose last bits are n. Value and result are normal numbers."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, shifted = (builder.bitcast(one, _I64) for one in args)
        return builder.bitcast(builder.add(value, builder.shl(shifted, _I64(52))), ir.DoubleType())

    return types.float64(types.float64, types.float64), code
