"""Operations on sixteen numbers at a time in float32, for those that come out as if computed with float64.

Sums, products and quotients of float32 numbers, rounded to float64 and then to float32, are as if rounded once: 53 bits
are more than twice 24 and two. So these need no float64, and no line is written out in between.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from alphaq.runtime.row_kernels import (
    ADD,
    ADDRESS,
    BFLOAT16,
    DIVIDE,
    EXTENTS,
    FLOAT16,
    MULTIPLY,
    NEGATE,
    OP,
    RELU,
    SQUARE,
    SUBTRACT,
    TENSOR,
    TENSORS,
    item_bytes,
    kind_of,
    line_of,
    stride_of,
)
from alphaq.simd.codes import brains_at, half_at, halves_at, of_brain_bits, pointer, put_floats
from alphaq.simd.lanes import put_rounded_brains, put_rounded_halves
from alphaq.simd.vectors import LANES, kernel, load, splat, where_less


@kernel
def lanes_at(address, kind):
    """Sixteen floats at an address as float32."""
    if kind == BFLOAT16:
        return brains_at(address)
    if kind == FLOAT16:
        return halves_at(address)
    return load(carray(pointer(address), (LANES,), np.float32), 0)


@kernel
def put_lanes(address, kind, value):
    """Sixteen floats to an address, rounded to their type."""
    if kind == BFLOAT16:
        put_rounded_brains(address, value)
    elif kind == FLOAT16:
        put_rounded_halves(address, value)
    else:
        put_floats(address, value)


@kernel
def number_at(address, kind):
    """A float at an address as float32."""
    if kind == BFLOAT16:
        return of_brain_bits(carray(pointer(address), (1,), np.uint16)[0])
    if kind == FLOAT16:
        return half_at(address)
    return carray(pointer(address), (1,), np.float32)[0]


@kernel
def _in_lanes(row, tensor):
    """Whether an operand is a float that lanes can read: neighbours, one for all, or none."""
    steps = stride_of(row, tensor)
    return row[TENSORS + TENSOR * tensor + ADDRESS] == 0 or (kind_of(row, tensor) <= FLOAT16 and 0 <= steps <= 1)


@kernel
def whole_lanes(row):
    """How many numbers of each line `by_lanes` can do."""
    op = row[OP]
    exact = op <= SQUARE or ADD <= op <= DIVIDE
    if not exact or row[EXTENTS + 3] < LANES or kind_of(row, 0) > FLOAT16 or stride_of(row, 0) != 1:
        return 0
    fitting = _in_lanes(row, 1) and (op < ADD or _in_lanes(row, 2))
    return row[EXTENTS + 3] // LANES * LANES if fitting else 0


@kernel
def by_lanes(row, numbers, first, second, third, whole):
    """The first numbers of a line of a plain operation."""
    op, zero = row[OP], splat(np.float32(0))
    target, kind = line_of(row, 0, first, second, third), kind_of(row, 0)
    left, left_kind, left_step = line_of(row, 1, first, second, third), kind_of(row, 1), stride_of(row, 1)
    right, right_kind, right_step = line_of(row, 2, first, second, third), kind_of(row, 2), stride_of(row, 2)
    one, two = splat(np.float32(numbers[0])), splat(np.float32(numbers[1]))
    if left and left_step == 0:
        one = splat(number_at(left, left_kind))
    if op >= ADD and right and right_step == 0:
        two = splat(number_at(right, right_kind))
    step, left_step, right_step = (
        LANES * item_bytes(kind),
        LANES * left_step * item_bytes(left_kind),
        LANES * right_step * item_bytes(right_kind),
    )
    for _ in range(0, whole, LANES):
        value = lanes_at(left, left_kind) if left_step else one
        if op >= ADD:
            other = lanes_at(right, right_kind) if right_step else two
            if op == ADD:
                value = value + other
            elif op == SUBTRACT:
                value = value - other
            elif op == MULTIPLY:
                value = value * other
            else:
                value = value / other
        elif op == NEGATE:
            value = value * splat(np.float32(-1))
        elif op == RELU:
            value = where_less(value, zero, zero, value)
        elif op == SQUARE:
            value = value * value
        put_lanes(target, kind, value)
        target += step
        left += left_step
        right += right_step
