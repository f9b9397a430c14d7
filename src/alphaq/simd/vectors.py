"""Sixteen float32 lanes as one value inside numba functions, so that kernels say which loop is the vector.

LLVM maps the lanes to whatever the processor has (one AVX-512 register, two of AVX2, four of NEON) and
keeps them in registers across a loop, which its own vectoriser does not manage for tiles of
accumulators. Lanes never mix unless a kernel says so, hence results do not depend on that width.

Arrays are flat and C-contiguous: `load(array, offset)` reads `LANES` neighbours of float32, or of the
bits of float16 (held as int16) or bfloat16 (uint16).
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.compiler_lock import global_compiler_lock
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16
_I32 = ir.IntType(32)
_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_ELEMENTS = {types.float32: ir.FloatType(), types.int16: ir.HalfType(), types.uint16: ir.IntType(16)}


class _Float32x16(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


float32x16 = _Float32x16()


@register_model(_Float32x16)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _VECTOR)


def _state_of_kernels() -> str:
    """Digest of every module that kernels take one another's code from."""
    package = Path(__file__).parents[1]
    modules = sorted({*package.glob("simd/*.py"), *package.rglob("*kernels.py"), package / "formats" / "packing.py"})
    return hashlib.blake2b(b"".join(path.read_bytes() for path in modules), digest_size=6).hexdigest()


STATE = _state_of_kernels()
"""Other kernels have another."""


def stamped(function: Callable[..., Any]) -> Any:
    """A function that will be compiled and kept: its name carries the state of all modules with kernels.

    numba itself compiles anew only when the function's own module has changed.
    """
    function.__qualname__ += f"-{STATE}"
    return function


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that releases the interpreter lock; kept on disk where there is a place for it."""
    stamped(function)
    options = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    try:
        dispatcher = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written: compile in each process
        dispatcher = numba.njit(**options)(function)
    # numba compiles under this lock but stores the result without it, where another thread may find it unfinished.
    dispatcher.compile = global_compiler_lock(dispatcher.compile)
    return dispatcher


def kernel_over(driver: Callable[..., Any], **parts: Any) -> Any:
    """A kernel of the driver's code where the names in `parts` mean these kernels; compiled for them alone.

    Closures over kernels would be compiled in every process anew: numba knows closures by what their cells pickle to.
    So the names are globals, of a function whose own name, by which compiled code is kept, tells what they mean.
    """
    own = FunctionType(driver.__code__, {**driver.__globals__, **parts})
    own.__module__, own.__doc__ = driver.__module__, driver.__doc__
    own.__qualname__ = "_".join([driver.__qualname__, *(part.__name__.strip("_") for part in parts.values())])
    return kernel(own)


def _arithmetic(symbol: Any, instruction: str) -> None:
    @infer_global(symbol)
    class _Typing(AbstractTemplate):
        def generic(self, args: tuple[Any, ...], kws: Any) -> Any:
            return signature(float32x16, *args) if args == (float32x16, float32x16) else None

    @lower_builtin(symbol, _Float32x16, _Float32x16)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _arithmetic(_symbol, _instruction)


def _place(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, vector: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())


@intrinsic
def load(typing: Any, array: Any, offset: Any) -> Any:
    """Lanes array[offset : offset + 16]: of float32, or of the bits of float16 (int16) or bfloat16 (uint16)."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = _ELEMENTS[sig.args[0].dtype]
        stored = ir.VectorType(element, LANES)
        value = builder.load(_place(context, builder, sig.args[0], args[0], args[1], stored))
        value.align = 2 if sig.args[0].dtype.bitwidth == 16 else 4
        if sig.args[0].dtype == types.int16:
            return builder.fpext(value, _VECTOR)
        if sig.args[0].dtype == types.uint16:
            wide = ir.VectorType(_I32, LANES)
            return builder.bitcast(builder.shl(builder.zext(value, wide), ir.Constant(wide, [16] * LANES)), _VECTOR)
        return value

    return float32x16(array, types.intp), code


@intrinsic
def store(typing: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write sixteen lanes to a flat float32 array at `offset`."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _place(context, builder, sig.args[0], args[0], args[1], _VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, float32x16), code


@intrinsic
def load_bytes(typing: Any, array: Any, offset: Any) -> Any:
    """Sixteen uint8 as float32 lanes."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(_place(context, builder, sig.args[0], args[0], args[1], _BYTES))
        value.align = 1
        return builder.uitofp(value, _VECTOR)

    return float32x16(array, types.intp), code


@intrinsic
def store_bytes(typing: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write sixteen lanes, whole numbers from 0 to 255, to a flat uint8 array at `offset`."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        whole = builder.trunc(builder.fptosi(args[2], ir.VectorType(_I32, LANES)), _BYTES)
        builder.store(whole, _place(context, builder, sig.args[0], args[0], args[1], _BYTES), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, float32x16), code


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """One float32 in all lanes."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        empty = ir.Constant(_VECTOR, ir.Undefined)
        first = builder.insert_element(empty, args[0], _I32(0))
        return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))

    return float32x16(types.float32), code


@intrinsic
def where_less(typing: Any, left: Any, right: Any, then: Any, otherwise: Any) -> Any:
    """Lane by lane `then` where left < right, else `otherwise`."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return float32x16(*[float32x16] * 4), code


def _call(builder: Any, name: str, args: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), args)


def _llvm(name: str, operands: int) -> Any:
    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, name, args)

    if operands == 1:
        return intrinsic(lambda typing, a: (float32x16(float32x16), code))
    if operands == 2:
        return intrinsic(lambda typing, a, b: (float32x16(float32x16, float32x16), code))
    return intrinsic(lambda typing, a, b, c: (float32x16(float32x16, float32x16, float32x16), code))


fma = _llvm("fma", 3)  # a·b + c, rounded once
minimum = _llvm("minnum", 2)
maximum = _llvm("maxnum", 2)
copysign = _llvm("copysign", 2)
magnitude = _llvm("fabs", 1)
square_root = _llvm("sqrt", 1)
nearest = _llvm("rint", 1)  # ties to even


def _across(combine: Callable[[Any, Any, Any], Any]) -> Any:
    """Combine all lanes into one float32, halves first: the same order on every processor."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[0]
        for distance in (8, 4, 2, 1):
            order = ir.Constant(ir.VectorType(_I32, LANES), [(lane + distance) % LANES for lane in range(LANES)])
            value = combine(builder, value, builder.shuffle_vector(value, value, order))
        return builder.extract_element(value, _I32(0))

    return intrinsic(lambda typing, a: (types.float32(float32x16), code))


lane_sum = _across(lambda builder, a, b: builder.fadd(a, b))
lane_minimum = _across(lambda builder, a, b: _call(builder, "minnum", (a, b)))
lane_maximum = _across(lambda builder, a, b: _call(builder, "maxnum", (a, b)))


@intrinsic
def as_half(typing: Any, value: Any) -> Any:
    """A float32, or each of sixteen lanes, rounded to what float16 can hold."""
    narrow, wide = ir.HalfType(), ir.FloatType()
    if value == float32x16:
        narrow, wide = ir.VectorType(narrow, LANES), _VECTOR

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fpext(builder.fptrunc(args[0], narrow), wide)

    kind = float32x16 if value == float32x16 else types.float32
    return kind(kind), code


@intrinsic
def as_brain(typing: Any, value: Any) -> Any:
    """A float32, or each of sixteen lanes, rounded to what bfloat16 can hold, ties to even; NaN is not kept."""
    whole = ir.VectorType(_I32, LANES) if value == float32x16 else _I32
    kind = float32x16 if value == float32x16 else types.float32

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def number(value: int) -> Any:
            return ir.Constant(whole, [value] * LANES if whole != _I32 else value)

        bits = builder.bitcast(args[0], whole)
        odd = builder.and_(builder.lshr(bits, number(16)), number(1))
        rounded = builder.add(bits, builder.add(odd, number(0x7FFF)))
        return builder.bitcast(builder.and_(rounded, number(0xFFFF0000)), args[0].type)

    return kind(kind), code


@intrinsic
def mantissa(typing: Any, value: Any) -> Any:
    """m of each lane value = 2^e · m with m from 1 to 2. Of positive normal numbers; 1 of 0."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        whole = ir.VectorType(_I32, LANES)
        low = builder.and_(builder.bitcast(args[0], whole), ir.Constant(whole, [0x007FFFFF] * LANES))
        return builder.bitcast(builder.or_(low, ir.Constant(whole, [0x3F800000] * LANES)), _VECTOR)

    return float32x16(float32x16), code


@intrinsic
def bits_of(typing: Any, value: Any) -> Any:
    """The bits of each lane value = 2^e · m ≥ 0 as a number, 2^23 · (e + 126 + m): a logarithm but for its curve."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(builder.bitcast(args[0], ir.VectorType(_I32, LANES)), _VECTOR)

    return float32x16(float32x16), code


@intrinsic
def times_power_of_two(typing: Any, value: Any, power: Any) -> Any:
    """value · 2^power for whole powers, where value and result are normal numbers."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        whole = ir.VectorType(_I32, LANES)
        shift = builder.shl(builder.fptosi(args[1], whole), ir.Constant(whole, [23] * LANES))
        return builder.bitcast(builder.add(builder.bitcast(args[0], whole), shift), _VECTOR)

    return float32x16(float32x16, float32x16), code


_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
_READABLE = {torch.float32, *_BITS}


def flat(weight: torch.Tensor) -> np.ndarray:
    """A contiguous tensor as kernels read it: one axis, 16-bit floats as their bits. Copies only rarer floats."""
    values = weight.reshape(-1)
    if values.is_floating_point() and values.dtype not in _READABLE:
        values = values.float()
    return values.view(_BITS.get(values.dtype, values.dtype)).numpy()


@kernel
def load_some(array, offset):  # type: ignore[no-untyped-def]
    """`load` at the array's end: zeros for what lies beyond it. Slow; not for inner loops."""
    padded = np.zeros(LANES, array.dtype)
    padded[: array.size - offset] = array[offset:]
    return load(padded, 0)


@kernel
def power(value, exponent):  # type: ignore[no-untyped-def]
    """value^exponent for lanes ≥ 0, relative error below 3e-5 for exponents within ±1; at least 2^-126.

    2^(exponent · log₂ value), both functions as minimax polynomials.
    """
    rest = mantissa(value)
    curve = splat(np.float32(0.0448736059))
    curve = fma(curve, rest, splat(np.float32(-0.416563683)))
    curve = fma(curve, rest, splat(np.float32(1.63114884)))
    curve = fma(curve, rest, splat(np.float32(-3.55079317)))
    curve = fma(curve, rest, splat(np.float32(4.09171108)))
    curve = fma(curve, rest, splat(np.float32(-128.800364)))
    logarithm = maximum(fma(bits_of(value), splat(np.float32(2**-23)), curve) * exponent, splat(np.float32(-126)))
    whole = nearest(logarithm)
    rest = logarithm - whole
    result = splat(np.float32(0.00957009707))
    result = fma(result, rest, splat(np.float32(0.0559178633)))
    result = fma(result, rest, splat(np.float32(0.24024745)))
    result = fma(result, rest, splat(np.float32(0.693121814)))
    result = fma(result, rest, splat(np.float32(0.999999261)))
    return times_power_of_two(result, whole)
