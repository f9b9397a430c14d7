"""Sixty-four packed codes as one value inside numba functions: unpacked from bits, multiplied as whole numbers.

A code has at most 8 bits and lies anywhere in a stream of bits; 64 of b bits are 8·b bytes. Processors with AVX-512's
byte permutations and dot products take five instructions for 64 codes of any width; elsewhere LLVM makes the best of
the same steps written with shuffles and shifts. Whole numbers add up exactly, so every processor gets the same sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic, models, register_model

from alphaq.simd.vectors import LANES, float32x16

CODES = 64
_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
_BYTES = ir.VectorType(_I8, CODES)
_WORDS = ir.VectorType(_I16, CODES)
_WHOLE = ir.VectorType(_I32, LANES)
_FLOAT = ir.VectorType(ir.FloatType(), LANES)


class _Bytes(types.Type):
    def __init__(self) -> None:
        super().__init__(name="uint8x64")


class _Integers(types.Type):
    def __init__(self) -> None:
        super().__init__(name="int32x16")


uint8x64, int32x16 = _Bytes(), _Integers()


@register_model(_Bytes)
class _BytesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _BYTES)


@register_model(_Integers)
class _IntegersModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _WHOLE)


def _features() -> set[str]:
    """What numba compiles for."""
    if config.CPU_FEATURES is not None:
        given = config.CPU_FEATURES
    elif config.CPU_NAME == "generic":
        given = ""
    else:
        given = llvmlite.binding.get_host_cpu_features().flatten()
    return {feature[1:] for feature in given.split(",") if feature.startswith("+")}


FEATURES = _features()
_FAST = {"avx512bw", "avx512vbmi", "avx512vnni"} <= FEATURES


def _constant(vector: Any, values: list[int]) -> Any:
    return ir.Constant(vector, values)


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _loaded(builder: Any, address: Any, kind: Any) -> Any:
    value = builder.load(_at(builder, address, kind))
    value.align = 1
    return value


def _table(builder: Any, name: str, rows: list[list[int]], index: Any) -> Any:
    """One vector of bytes out of a constant table."""
    kind = ir.ArrayType(_BYTES, len(rows))
    module = builder.module
    if name in module.globals:
        held = module.globals[name]
    else:
        held = cgutils.global_constant(module, name, ir.Constant(kind, [_constant(_BYTES, row) for row in rows]))
    value = builder.load(builder.gep(held, [_I64(0), index]))
    return value


_PERMUTED = [[0] * CODES] + [[min(lane // 8 * bits + lane % 8, 63) for lane in range(CODES)] for bits in range(1, 9)]
_SHIFTED = [[0] * CODES] + [[lane % 8 * bits for lane in range(CODES)] for bits in range(1, 9)]
_KEPT = [[0] * CODES] + [[2**bits - 1] * CODES for bits in range(1, 9)]
_READ = [[0] * CODES] + [[255 if lane < 8 * bits else 0 for lane in range(CODES)] for bits in range(1, 9)]


def _unpack_fast(builder: Any, address: Any, bits: Any) -> Any:
    def named(name: str, kind: Any, arguments: list[Any]) -> Any:
        function = ir.FunctionType(kind, [value.type for value in arguments])
        return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)

    read = builder.icmp_unsigned("!=", _table(builder, "alphaq_read", _READ, bits), ir.Constant(_BYTES, [0] * CODES))
    raw = named(
        "llvm.masked.load.v64i8.p0",
        _BYTES,
        [_at(builder, address, _BYTES), _I32(1), read, ir.Constant(_BYTES, [0] * CODES)],
    )
    spread = named("llvm.x86.avx512.permvar.qi.512", _BYTES, [raw, _table(builder, "alphaq_permuted", _PERMUTED, bits)])
    shifted = named(
        "llvm.x86.avx512.pmultishift.qb.512", _BYTES, [_table(builder, "alphaq_shifted", _SHIFTED, bits), spread]
    )
    return builder.and_(shifted, _table(builder, "alphaq_kept", _KEPT, bits))


def _unpack_portable(builder: Any, address: Any, bits: Any) -> Any:
    """A branch per width: each code's two bytes side by side, shifted, cut."""
    after = builder.append_basic_block("unpacked")
    none = builder.append_basic_block("none")
    switch = builder.switch(bits, none)
    found = []
    for width in range(1, 9):
        block = builder.append_basic_block(f"bits{width}")
        switch.add_case(_I64(width), block)
        builder.position_at_end(block)
        length = 8 * width
        raw = _loaded(builder, address, ir.VectorType(_I8, length))
        if width == 8:
            value = raw
        else:
            order, shifts = [], []
            for code in range(CODES):
                first, shift = divmod(code * width, 8)
                if first == length - 1:
                    first, shift = first - 1, shift + 8
                order += [first, first + 1]
                shifts.append(shift)
            indices = ir.Constant(ir.VectorType(_I32, 2 * CODES), order)
            pairs = builder.shuffle_vector(raw, ir.Constant(raw.type, ir.Undefined), indices)
            words = builder.bitcast(pairs, _WORDS)
            cut = builder.and_(
                builder.lshr(words, _constant(_WORDS, shifts)), _constant(_WORDS, [2**width - 1] * CODES)
            )
            value = builder.trunc(cut, _BYTES)
        builder.branch(after)
        found.append((value, builder.block))
    builder.position_at_end(none)
    builder.branch(after)
    builder.position_at_end(after)
    result = builder.phi(_BYTES)
    for value, block in found:
        result.add_incoming(value, block)
    result.add_incoming(ir.Constant(_BYTES, [0] * CODES), none)
    return result


def _stores(vector: ir.Type) -> Callable[..., Any]:
    """Code of an intrinsic that writes its second argument to the address that is its first."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], _at(builder, args[0], vector), align=1)
        return context.get_dummy_value()

    return code


@intrinsic
def unpack(typing: Any, address: Any, bits: Any) -> Any:
    """64 codes of 1 to 8 bits from an address; reads 8·bits bytes."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return (_unpack_fast if _FAST else _unpack_portable)(builder, args[0], args[1])

    return uint8x64(types.int64, types.int64), code


@intrinsic
def pack(typing: Any, address: Any, bits: Any, codes: Any) -> Any:
    """Write 64 codes of 1 to 8 bits to an address; fills 8·bits bytes."""
    lanes = ir.VectorType(_I64, CODES // 8)

    def moved(builder: Any, value: Any, kept: int, right: int) -> Any:
        """Every second piece of each lane, moved down to the one before it."""
        low = builder.and_(value, _constant(lanes, [kept] * lanes.count))
        high = builder.and_(value, _constant(lanes, [~kept & (2**64 - 1)] * lanes.count))
        return builder.or_(low, builder.lshr(high, _constant(lanes, [right] * lanes.count)))

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, bits, codes = args
        after = builder.append_basic_block("packed")
        switch = builder.switch(bits, after)
        for width in range(1, 9):
            block = builder.append_basic_block(f"pack{width}")
            switch.add_case(_I64(width), block)
            builder.position_at_end(block)
            value = builder.bitcast(codes, lanes)
            for kept, piece in ((0x00FF00FF00FF00FF, 8), (0x0000FFFF0000FFFF, 16), (0x00000000FFFFFFFF, 32)):
                if width < 8:
                    value = moved(builder, value, kept, piece - piece // 8 * width)
            order = [8 * lane + byte for lane in range(lanes.count) for byte in range(width)]
            whole = builder.bitcast(value, _BYTES)
            index = ir.Constant(ir.VectorType(_I32, len(order)), order)
            packed = builder.shuffle_vector(whole, ir.Constant(_BYTES, ir.Undefined), index)
            builder.store(packed, _at(builder, address, packed.type), align=1)
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, uint8x64), code


@intrinsic
def address_of(typing: Any, array: Any, index: Any) -> Any:
    """Where an element of a flat array lies."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(builder.gep(data, [args[1]]), _I64)

    return types.int64(array, types.intp), code


@intrinsic
def codes_at(typing: Any, address: Any) -> Any:
    """64 bytes from an address."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _loaded(builder, args[0], _BYTES)

    return uint8x64(types.int64), code


@intrinsic
def put_codes(typing: Any, address: Any, codes: Any) -> Any:
    """Write 64 bytes to an address."""
    return types.void(types.int64, uint8x64), _stores(_BYTES)


@intrinsic
def no_products(typing: Any) -> Any:
    """Sixteen sums of nothing."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(_WHOLE, [0] * LANES)

    return int32x16(), code


@intrinsic
def add_products(typing: Any, total: Any, codes: Any, numbers: Any) -> Any:
    """total[i] + Σ codes[4i … 4i+3] · numbers[4i … 4i+3]; codes count from 0 to 255, numbers from −128 to 127."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, codes, numbers = args
        if _FAST:
            kind = ir.FunctionType(_WHOLE, [_WHOLE] * 3)
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
            return builder.call(function, [total, builder.bitcast(codes, _WHOLE), builder.bitcast(numbers, _WHOLE)])
        left, right = builder.zext(codes, _WORDS), builder.sext(numbers, _WORDS)
        wide = ir.VectorType(_I32, CODES)
        products = builder.mul(builder.sext(left, wide), builder.sext(right, wide))
        while products.type.count > LANES:
            half = products.type.count // 2
            empty = ir.Constant(products.type, ir.Undefined)
            index = ir.VectorType(_I32, half)
            even = builder.shuffle_vector(products, empty, ir.Constant(index, list(range(0, 2 * half, 2))))
            odd = builder.shuffle_vector(products, empty, ir.Constant(index, list(range(1, 2 * half, 2))))
            products = builder.add(even, odd)
        return builder.add(total, products)

    return int32x16(int32x16, uint8x64, uint8x64), code


@intrinsic
def right_by(typing: Any, codes: Any, bits: Any) -> Any:
    """Codes without their last bits, fewer than 8."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        one = builder.insert_element(ir.Constant(_BYTES, ir.Undefined), builder.trunc(args[1], _I8), _I32(0))
        shifts = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, CODES), [0] * CODES))
        return builder.lshr(args[0], shifts)

    return uint8x64(uint8x64, types.int64), code


@intrinsic
def less_128(typing: Any, codes: Any) -> Any:
    """Codes minus 128, as signed bytes."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.xor(args[0], _constant(_BYTES, [128] * CODES))

    return uint8x64(uint8x64), code


@intrinsic
def ones(typing: Any) -> Any:
    """64 codes of 1."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _constant(_BYTES, [1] * CODES)

    return uint8x64(), code


@intrinsic
def shifted_sum(typing: Any, high: Any, low: Any) -> Any:
    """256·high + low."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.add(builder.shl(args[0], ir.Constant(_WHOLE, [8] * LANES)), args[1])

    return int32x16(int32x16, int32x16), code


@intrinsic
def as_floats(typing: Any, whole: Any) -> Any:
    """The nearest float32 of each."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.sitofp(args[0], _FLOAT)

    return float32x16(int32x16), code


@intrinsic
def halves_at(typing: Any, address: Any) -> Any:
    """Sixteen float16 from an address."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fpext(_loaded(builder, args[0], ir.VectorType(ir.HalfType(), LANES)), _FLOAT)

    return float32x16(types.int64), code


@intrinsic
def brains_at(typing: Any, address: Any) -> Any:
    """Sixteen bfloat16 from an address."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        raw = _loaded(builder, args[0], ir.VectorType(_I16, LANES))
        return builder.bitcast(builder.shl(builder.zext(raw, _WHOLE), ir.Constant(_WHOLE, [16] * LANES)), _FLOAT)

    return float32x16(types.int64), code


@intrinsic
def two_halves(typing: Any, first: Any, second: Any) -> Any:
    """Eight lanes of one float32, then eight of another."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pair = ir.Constant(ir.VectorType(ir.FloatType(), 2), ir.Undefined)
        pair = builder.insert_element(builder.insert_element(pair, args[0], _I32(0)), args[1], _I32(1))
        order = ir.Constant(ir.VectorType(_I32, LANES), [0] * 8 + [1] * 8)
        return builder.shuffle_vector(pair, ir.Constant(pair.type, ir.Undefined), order)

    return float32x16(types.float32, types.float32), code


@intrinsic
def half_at(typing: Any, address: Any) -> Any:
    """One float16 from an address, as float32."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(_at(builder, args[0], ir.HalfType()))
        value.align = 1
        return builder.fpext(value, ir.FloatType())

    return types.float32(types.int64), code


@intrinsic
def as_half_bits(typing: Any, value: Any) -> Any:
    """The bits of a float32 rounded to float16."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), _I16)

    return types.uint16(types.float32), code


@intrinsic
def of_brain_bits(typing: Any, bits: Any) -> Any:
    """The float32 of a bfloat16's bits."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), _I32(16)), ir.FloatType())

    return types.float32(types.uint16), code


@intrinsic
def as_brain_bits(typing: Any, value: Any) -> Any:
    """The bits of a float32 rounded to bfloat16, ties to even; NaN stays one."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.trunc(builder.lshr(builder.add(bits, builder.add(odd, _I32(0x7FFF))), _I32(16)), _I16)
        return builder.select(builder.fcmp_unordered("uno", args[0], args[0]), _I16(0x7FC0), rounded)

    return types.uint16(types.float32), code


@intrinsic
def byte_at(typing: Any, address: Any) -> Any:
    """One byte from an address."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(_loaded(builder, args[0], _I8), _I64)

    return types.int64(types.int64), code


@intrinsic
def take(typing: Any, counter: Any) -> Any:
    """The number in a flat int64 array's first place, which becomes one more: threads never take the same."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, _I64(1), "monotonic")

    return types.int64(counter), code


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An address as numba's `carray` takes it."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], _I8.as_pointer())

    return types.voidptr(types.int64), code


@intrinsic
def transpose_bytes(typing: Any, source: Any, target: Any) -> Any:
    """Sixteen rows of 64 bytes at one address become 64 rows of sixteen at another."""
    small = ir.VectorType(_I8, LANES)
    order = [place for lane in range(8) for place in (lane, lane + LANES)]
    lower, upper = (ir.Constant(ir.VectorType(_I32, LANES), [place + more for place in order]) for more in (0, 8))

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for part in range(0, CODES, LANES):
            rows = [_loaded(builder, builder.add(args[0], _I64(CODES * row + part)), small) for row in range(LANES)]
            for _ in range(4):
                pairs = [(rows[row], rows[row + 8]) for row in range(8)]
                rows = [builder.shuffle_vector(*pair, mix) for pair in pairs for mix in (lower, upper)]
            for row, value in enumerate(rows):
                place = _at(builder, builder.add(args[1], _I64(LANES * (part + row))), small)
                builder.store(value, place, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def put_floats(typing: Any, address: Any, value: Any) -> Any:
    """Write sixteen float32 to an address."""
    return types.void(types.int64, float32x16), _stores(_FLOAT)


@intrinsic
def put_brains(typing: Any, address: Any, value: Any) -> Any:
    """Write sixteen lanes that bfloat16 can hold (see `as_brain`) to an address, as bfloat16."""
    narrow = ir.VectorType(_I16, LANES)

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.lshr(builder.bitcast(args[1], _WHOLE), ir.Constant(_WHOLE, [16] * LANES))
        builder.store(builder.trunc(bits, narrow), _at(builder, args[0], narrow), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, float32x16), code


@intrinsic
def put_byte(typing: Any, address: Any, value: Any) -> Any:
    """Write one byte to an address."""
    return types.void(types.int64, types.uint8), _stores(_I8)


@intrinsic
def fetch(typing: Any, address: Any) -> Any:
    """Ask for the memory at an address to be brought near; does nothing where there is none."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [place, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], place), _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def as_whole(typing: Any, value: Any) -> Any:
    """Sixteen whole numbers in float32 as integers."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fptosi(args[0], _WHOLE)

    return int32x16(float32x16), code


@intrinsic
def put_digits(typing: Any, address: Any, whole: Any) -> Any:
    """Write the lowest byte of each of sixteen integers to an address: a digit from −128 to 127 to the base 256."""
    narrow = ir.VectorType(_I8, LANES)

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(builder.trunc(args[1], narrow), _at(builder, args[0], narrow), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, int32x16), code


@intrinsic
def without_digit(typing: Any, whole: Any) -> Any:
    """(n − its digit) / 256 for sixteen integers."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        more = builder.add(args[0], ir.Constant(_WHOLE, [128] * LANES))
        return builder.ashr(more, ir.Constant(_WHOLE, [8] * LANES))

    return int32x16(int32x16), code


@intrinsic
def whole_sum(typing: Any, whole: Any) -> Any:
    """Sum of sixteen integers below 2^27."""

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[0]
        for distance in (8, 4, 2, 1):
            order = ir.Constant(ir.VectorType(_I32, LANES), [(lane + distance) % LANES for lane in range(LANES)])
            value = builder.add(value, builder.shuffle_vector(value, value, order))
        return builder.sext(builder.extract_element(value, _I32(0)), _I64)

    return types.int64(int32x16), code


@intrinsic
def run_threads(typing: Any, parallel: Any, function: Any, data: Any, threads: Any) -> Any:
    """parallel(function, data, threads, 0), all given as addresses, as OpenMP runtimes are asked for a region.

    Without a `parallel` function(data) on this thread.
    """

    def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place, nothing = _I8.as_pointer(), ir.VoidType()
        function, data = (builder.inttoptr(address, place) for address in args[1:3])
        with builder.if_else(builder.icmp_unsigned("!=", args[0], _I64(0))) as (then, otherwise):
            with then:
                kind = ir.FunctionType(nothing, [place, place, _I32, _I32]).as_pointer()
                builder.call(builder.inttoptr(args[0], kind), [function, data, builder.trunc(args[3], _I32), _I32(0)])
            with otherwise:
                kind = ir.FunctionType(nothing, [place]).as_pointer()
                builder.call(builder.inttoptr(args[1], kind), [data])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), code
