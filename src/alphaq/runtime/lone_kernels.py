"""Products of a step's few tokens with packed matrices, without what `kernels.multiply` does for many of them.

No memory is asked for, pairs are not sorted by expert, and inputs that the row before multiplied are not made whole
numbers again. What is computed is the same, to the bit, as long as no two pairs want the same expert.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from alphaq.runtime.block_kernels import TASK_ROWS, room_at, room_bytes
from alphaq.runtime.input_kernels import LIMITS, prepare, widen
from alphaq.runtime.kernels import multiply_few
from alphaq.runtime.restored_kernels import LINE
from alphaq.simd.codes import pointer
from alphaq.simd.vectors import kernel

MOST_PAIRS = 16  # of which it is asked whether two are alike


@kernel
def desk_bytes(columns, tokens):
    """Bytes that `desk_at` takes."""
    return 8 * (-(-columns // 512) * 512 * tokens) + LINE + room_bytes(columns, 1)


@kernel
def desk_at(address, columns, tokens):
    """What `multiply_lone` works with, in zeroed memory: where inputs lie and how many have room, a 0, a task's memory.

    columns, tokens: the most that inputs have.
    """
    padded = -(-columns // 512) * 512 * tokens
    end = address + 8 * padded  # 4 bytes of each value, 3 of its digits, 24 / 32 of its groups' steps and sums
    return address, padded, carray(pointer(end), (1,), np.int64), room_at(end + LINE, columns, 1)


@kernel
def _views(desk, planes, tokens, columns):
    """Values, digits, steps and sums as `input_kernels.prepare` has them."""
    address, most, _, _ = desk
    padded = -(-columns // 512) * 512
    return (
        carray(pointer(address), (tokens, padded), np.float32),
        carray(pointer(address + 4 * most), (planes, tokens, padded), np.int8),
        carray(pointer(address + 7 * most), (3, tokens, padded // 32), np.float32),
        carray(pointer(address + 7 * most + 12 * (most // 32)), (3, tokens, padded // 32), np.float32),
    )


@kernel
def lay_out(desk, inputs, tokens, columns, exact):
    """Inputs, flat [tokens · columns], as whole numbers on the desk; returns how many bytes each has."""
    values, _, _, _ = _views(desk, 2, tokens, columns)
    values[:] = 0
    coarse = widen(inputs, tokens, columns, values)
    planes = 3 if exact or coarse else 2
    values, digits, steps, sums = _views(desk, planes, tokens, columns)
    digits[:] = 0
    steps[:] = 0
    sums[:] = 0
    prepare(values, columns, planes, LIMITS[planes - 2], digits, steps, sums)
    return planes


@kernel
def all_differ(experts):
    """Whether there are few pairs, and no two want the same expert."""
    if experts.size > MOST_PAIRS:
        return False
    for pair in range(experts.size):
        for other in range(pair):
            if experts[pair] == experts[other]:
                return False
    return True


@kernel
def multiply_lone(desk, planes, tokens, columns, codings, rows, experts, chosen, out):
    """`kernels.multiply` for inputs on the desk and experts that all differ, on this thread."""
    values, digits, steps, sums = _views(desk, planes, tokens, columns)
    (_, _, first_pair, room), projections = desk, codings.shape[0]
    for pair in range(experts.size):
        expert = experts[pair]
        if not 0 <= expert < codings.shape[1]:
            out[pair] = 0
            continue
        mine, target = chosen[pair : pair + 1], out[pair : pair + 1]
        for projection in range(projections):
            coding, column = codings[projection, expert], projection * rows
            block = coding[0], coding[1], coding[2], coding[3], rows, columns
            for first in range(0, rows, TASK_ROWS):
                multiply_few(block, first, mine, planes, digits, steps, sums, values, target, column, first_pair, room)
