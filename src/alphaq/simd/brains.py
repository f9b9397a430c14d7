"""Thirty-two bfloat16 as one value inside numba functions: looked up by codes, multiplied in pairs.

They travel as the 64 bytes that they are. Processors with AVX512-BF16 add 32 products an instruction.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from alphaq.simd.codes import CODES, FEATURES, uint8x64
from alphaq.simd.vectors import LANES, float32x16

BRAINS = 32
_HAVE_BRAINS = {"avx512bf16", "avx512bw"} <= FEATURES
FAST_BRAINS = _HAVE_BRAINS and "amx-bf16" not in FEATURES
"""Whether products of bfloat16 are best made by this processor's instruction; elsewhere they are right, and slow.

Where there are tiles for them (AMX), products in these are several times as many a cycle: see `simd.tiles`.
"""


class _BrainType(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BrainType)

    def __hash__(self) -> int:
        return hash(_BrainType)


_I16, _I32 = ir.IntType(16), ir.IntType(32)
_BYTES = ir.VectorType(ir.IntType(8), CODES)
_WORDS = ir.VectorType(_I16, BRAINS)
_WHOLE = ir.VectorType(_I32, LANES)
_FLOAT = ir.VectorType(ir.FloatType(), LANES)
_PAIRS = ir.VectorType(_BrainType(), BRAINS)


def _named(builder: Any, name: str, kind: Any, arguments: list[Any]) -> Any:
    function = ir.FunctionType(kind, [value.type for value in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


@intrinsic
def add_brain_products(typing: Any, total: Any, left: Any, right: Any) -> Any:
    """total[i] + left[2i] · right[2i] + left[2i + 1] · right[2i + 1], of bfloat16, in float32."""

    def halves(builder: Any, value: Any) -> list[Any]:
        bits = builder.bitcast(value, _WHOLE)
        low = builder.shl(bits, ir.Constant(_WHOLE, [16] * LANES))
        high = builder.and_(bits, ir.Constant(_WHOLE, [0xFFFF0000] * LANES))
        return [builder.bitcast(part, _FLOAT) for part in (high, low)]

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, left, right = args
        if _HAVE_BRAINS:
            pairs = [builder.bitcast(value, _PAIRS) for value in (left, right)]
            return _named(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOAT, [total, *pairs])
        for one, other in zip(halves(builder, left), halves(builder, right), strict=True):
            total = builder.fadd(total, builder.fmul(one, other))
        return total

    return float32x16(float32x16, uint8x64, uint8x64), code


@intrinsic
def as_brains(typing: Any, low: Any, high: Any) -> Any:
    """Twice sixteen lanes rounded to bfloat16, ties to even, as 32 of it; what is no normal number may become 0."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if _HAVE_BRAINS:
            name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
            return builder.bitcast(_named(builder, name, _PAIRS, [args[1], args[0]]), _BYTES)
        parts = []
        for value in args:
            bits = builder.bitcast(value, _WHOLE)
            odd = builder.and_(builder.lshr(bits, _sixteen(16)), _sixteen(1))
            rounded = builder.add(bits, builder.add(odd, _sixteen(0x7FFF)))
            parts.append(builder.trunc(builder.lshr(rounded, _sixteen(16)), ir.VectorType(_I16, LANES)))
        order = ir.Constant(ir.VectorType(_I32, BRAINS), list(range(BRAINS)))
        return builder.bitcast(builder.shuffle_vector(*parts, order), _BYTES)

    return uint8x64(float32x16, float32x16), code


def _sixteen(value: int) -> Any:
    return ir.Constant(_WHOLE, [value] * LANES)


@intrinsic
def four_sums(typing: Any, first: Any, second: Any, third: Any, fourth: Any) -> Any:
    """Sums of the lanes of four values, in the first four lanes, in the same order on every processor."""

    def mixed(builder: Any, left: Any, right: Any, order: list[int]) -> Any:
        """Four lanes of each quarter: 0 to 3 of the left value's, 4 to 7 of the right one's."""
        lanes = [place % 4 + 4 * quarter + LANES * (place // 4) for quarter in range(LANES // 4) for place in order]
        return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(_I32, LANES), lanes))

    def halved(builder: Any, left: Any, right: Any, low: list[int], high: list[int]) -> Any:
        return builder.fadd(mixed(builder, left, right, low), mixed(builder, left, right, high))

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pairs = [halved(builder, args[at], args[at + 1], [0, 4, 1, 5], [2, 6, 3, 7]) for at in (0, 2)]
        total = halved(builder, pairs[0], pairs[1], [0, 1, 4, 5], [2, 3, 6, 7])
        for distance in (8, 4):
            order = ir.Constant(ir.VectorType(_I32, LANES), [(lane + distance) % LANES for lane in range(LANES)])
            total = builder.fadd(total, builder.shuffle_vector(total, total, order))
        return total

    return float32x16(*[float32x16] * 4), code
