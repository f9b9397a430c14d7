"""Multiply with packed matrices on the CPU: codes are unpacked in registers and never written out.

Inputs become whole numbers n with one step for 128 neighbours, x ≈ σ·n, cut into signed bytes: two for 16-bit inputs
without large outliers, else three. What is lost is of the size of the inputs' own rounding. Then with ŵ = s·q + β

    Σ ŵ·x  ≈  Σ over groups of  s·σ·(Σ q·n)  +  β·σ·(Σ n)

where the sums over a group are exact in whole numbers and processors add 64 products in one instruction. The second
part needs no codes. A task is 64 rows of one matrix with all tokens that want it; threads take tasks by a counter, so
which thread did what is not fixed, what each task computes is.
"""

from __future__ import annotations

import numpy as np
from numba import carray, types

from alphaq.runtime.block_kernels import HEADER, TASK_ROWS, last_codes, read_grids, restore_block, room_of
from alphaq.runtime.input_kernels import LIMITS, prepare, widen
from alphaq.runtime.kept_kernels import multiply_kept
from alphaq.simd.codes import (
    CODES,
    add_products,
    as_floats,
    codes_at,
    fetch,
    no_products,
    pointer,
    run_threads,
    shifted_sum,
    take,
    two_halves,
    unpack,
)
from alphaq.simd.vectors import (
    LANES,
    fma,
    kernel,
    lane_sum,
    load,
    load_bytes,
    splat,
    store,
)

MIXED = 3  # flags beyond it are of blocks that have no kernel here
AHEAD = 2048  # bytes: processors foresee a stream of codes only to the end of its page
WORTH_THREADS = 1 << 20  # products, some tens of microseconds

# Places in a request, an array of int64.
(COUNTER, TASKS, JOBS, PAIRS, PAIR_COUNT, TOKENS, ROWS, COLUMNS) = range(8)
(WIDTH, PLANES, DIGITS, STEPS, SUMS, VALUES, OUT, RESTORING, MOST) = range(8, 17)
REQUEST = 17
# Columns of a job: where the block is, how it is coded, where its products go, which pairs want it.
(JOB_ADDRESS, JOB_BITS, JOB_GROUP, JOB_FLAGS, JOB_COLUMN, JOB_FIRST, JOB_COUNT) = range(7)
JOB = 7


@kernel
def multiply_block(block, first, mine, planes, digits, steps, sums, out, column, pairs, room):
    """Products of up to 64 rows of a block, from `first` on, with some tokens.

    mine: int64 [count], rows of digits [planes, tokens, padded], steps and sums. out: float32 [pairs, width]; products
    of mine[i] go to row pairs[i], from `column` on. room: see `room_of`.
    """
    address, bits, group_size, symmetric, rows, columns = block
    scales, means, weights, totals, zeros, rest = room
    tokens, count = mine.size, min(TASK_ROWS, rows - first)
    groups = -(-columns // group_size)
    level = 0 if group_size == 32 else 1 if group_size == 64 else 2
    row_bytes = 4 * -(-columns * bits // 32)
    read_grids(block, first, count, scales, means, zeros)
    padded_groups = -(-groups // LANES) * LANES
    halves = np.float32(0.5) if symmetric > 1 else np.float32(0)
    middle = splat(np.float32(2 ** (bits - 1)) - halves if bits > 1 else np.float32(1))
    factor = splat(np.float32(2) if bits == 1 else np.float32(1))
    padded = digits.shape[2]
    stride = digits.shape[1] * padded
    digits_at = digits.ctypes.data
    none = splat(np.float32(0))
    for row in range(count):
        for token in range(tokens):
            store(totals, LANES * token, none)
        for group in range(0, groups, LANES):
            scale = load(scales, row * groups + group)
            if bits == 1:
                base = load(means, row * groups + group) - scale if not symmetric else none - scale
            elif symmetric:
                base = none - scale * middle
            else:
                base = none - scale * load_bytes(zeros, group * CODES + LANES * row)
            scale = scale * factor
            for token in range(tokens):
                known = sums[level, mine[token]]
                store(totals, LANES * token, fma(base, load(known, group), load(totals, LANES * token)))
                store(weights, token * padded_groups + group, scale * load(steps[level, mine[token]], group))
        source = address + HEADER + (first + row) * row_bytes
        last = last_codes(source, columns, bits, rest)
        token = 0
        while token < tokens:
            place = token * padded_groups
            if token + 2 >= tokens:
                at = digits_at + mine[token] * padded
                total = load(totals, LANES * token)
                total = _one_token(source, last, columns, bits, level, planes, stride, at, weights[place:], total)
                out[pairs[token], column + first + row] = lane_sum(total)
                token += 1
                continue
            second, third, fourth = token + 1, token + 2, min(token + 3, tokens - 1)
            products = _four_tokens(
                source,
                last,
                columns,
                bits,
                level,
                planes,
                stride,
                digits_at + mine[token] * padded,
                digits_at + mine[second] * padded,
                digits_at + mine[third] * padded,
                digits_at + mine[fourth] * padded,
                weights,
                place,
                second * padded_groups,
                third * padded_groups,
                fourth * padded_groups,
            )
            out[pairs[token], column + first + row] = lane_sum(products[0] + load(totals, LANES * token))
            out[pairs[second], column + first + row] = lane_sum(products[1] + load(totals, LANES * second))
            out[pairs[third], column + first + row] = lane_sum(products[2] + load(totals, LANES * third))
            out[pairs[fourth], column + first + row] = lane_sum(products[3] + load(totals, LANES * fourth))
            token += 4


@kernel
def _one_token(source, last, columns, bits, level, planes, stride, at, weights, total):
    """Add the products of a row's codes with one token's digits at an address, weighted by group."""
    whole, chunk = columns // CODES, 0
    if level == 2:
        while chunk + 2 <= whole:
            place = source + 8 * bits * chunk
            fetch(place + AHEAD)
            one = unpack(place, bits)
            two = unpack(place + 8 * bits, bits)
            total = fma(_products_of_two(one, two, at, planes, stride), splat(weights[chunk >> 1]), total)
            at += 2 * CODES
            chunk += 2
    while chunk * CODES < columns:
        one = unpack(source + 8 * bits * chunk if chunk < whole else last, bits)
        total = fma(_products(one, at, planes, stride), _weight(weights, 0, chunk, level), total)
        at += CODES
        chunk += 1
    return total


@kernel
def _four_tokens(
    source, last, columns, bits, level, planes, stride, at0, at1, at2, at3, weights, place0, place1, place2, place3
):
    """`_one_token` for four of them, unpacking once."""
    whole, chunk, more = columns // CODES, 0, 0
    total0 = total1 = total2 = total3 = splat(np.float32(0))
    if level == 2:
        while chunk + 2 <= whole:
            one = unpack(source + 8 * bits * chunk, bits)
            two = unpack(source + 8 * bits * (chunk + 1), bits)
            group = chunk >> 1
            total0 = fma(_products_of_two(one, two, at0 + more, planes, stride), splat(weights[place0 + group]), total0)
            total1 = fma(_products_of_two(one, two, at1 + more, planes, stride), splat(weights[place1 + group]), total1)
            total2 = fma(_products_of_two(one, two, at2 + more, planes, stride), splat(weights[place2 + group]), total2)
            total3 = fma(_products_of_two(one, two, at3 + more, planes, stride), splat(weights[place3 + group]), total3)
            more += 2 * CODES
            chunk += 2
    while chunk * CODES < columns:
        one = unpack(source + 8 * bits * chunk if chunk < whole else last, bits)
        total0 = fma(_products(one, at0 + more, planes, stride), _weight(weights, place0, chunk, level), total0)
        total1 = fma(_products(one, at1 + more, planes, stride), _weight(weights, place1, chunk, level), total1)
        total2 = fma(_products(one, at2 + more, planes, stride), _weight(weights, place2, chunk, level), total2)
        total3 = fma(_products(one, at3 + more, planes, stride), _weight(weights, place3, chunk, level), total3)
        more += CODES
        chunk += 1
    return total0, total1, total2, total3


@kernel
def _weight(weights, place, chunk, level):
    """What the sixteen sums of a chunk are worth."""
    if level == 0:
        return two_halves(weights[place + 2 * chunk], weights[place + 2 * chunk + 1])
    return splat(weights[place + (chunk if level == 1 else chunk >> 1)])


@kernel
def _products(one, at, planes, stride):
    """Sixteen sums of four products each, of 64 codes with the digits at an address."""
    low = at + (planes - 2) * stride
    high = add_products(no_products(), one, codes_at(low))
    product = as_floats(shifted_sum(high, add_products(no_products(), one, codes_at(low + stride))))
    if planes == 3:
        highest = add_products(no_products(), one, codes_at(at))
        product = fma(as_floats(highest), splat(np.float32(65536)), product)
    return product


@kernel
def _products_of_two(one, two, at, planes, stride):
    """`_products` of 128 codes, which share a weight."""
    low = at + (planes - 2) * stride
    product = as_floats(shifted_sum(_plane(one, two, low), _plane(one, two, low + stride)))
    if planes == 3:
        product = fma(as_floats(_plane(one, two, at)), splat(np.float32(65536)), product)
    return product


@kernel
def _plane(one, two, at):
    return add_products(add_products(no_products(), one, codes_at(at)), two, codes_at(at + CODES))


@kernel
def _restore_tasks(request):
    job = carray(pointer(request[JOBS]), (JOB,), np.int64)
    row_bytes = request[COLUMNS] * (2 if request[PLANES] else 4)
    room = room_of(request[COLUMNS], 1)
    while True:
        task = take(request)
        if task >= request[TASKS]:
            return
        block = _block(job, request[ROWS], request[COLUMNS])
        first = job[JOB_FIRST] + TASK_ROWS * task
        restore_block(block, first, request[PLANES] != 0, request[OUT] + TASK_ROWS * task * row_bytes, room)


@kernel
def _block(job, rows, columns):
    """A job's block, as `block_kernels` has it."""
    return job[JOB_ADDRESS], job[JOB_BITS], job[JOB_GROUP], job[JOB_FLAGS], rows, columns


@kernel
def _work(request):
    """Take tasks until there are no more."""
    if request[RESTORING]:
        _restore_tasks(request)
        return
    rows, columns, width, planes = request[ROWS], request[COLUMNS], request[WIDTH], request[PLANES]
    blocks = -(-rows // TASK_ROWS)
    tokens = request[TOKENS]
    padded = -(-columns // 512) * 512
    jobs = carray(pointer(request[JOBS]), (request[TASKS] // blocks, JOB), np.int64)
    pairs = carray(pointer(request[PAIRS]), (2, request[PAIR_COUNT]), np.int64)
    digits = carray(pointer(request[DIGITS]), (planes, tokens, padded), np.int8)
    steps = carray(pointer(request[STEPS]), (3, tokens, padded // 32), np.float32)
    sums = carray(pointer(request[SUMS]), (3, tokens, padded // 32), np.float32)
    values = carray(pointer(request[VALUES]), (tokens, padded), np.float32)
    out = carray(pointer(request[OUT]), (request[PAIR_COUNT], width), np.float32)
    room = room_of(columns, request[MOST])
    while True:
        task = take(request)
        if task >= request[TASKS]:
            return
        job = jobs[task // blocks]
        first = task % blocks * TASK_ROWS
        begin, end = job[JOB_FIRST], job[JOB_FIRST] + job[JOB_COUNT]
        mine, targets = pairs[0, begin:end], pairs[1, begin:end]
        if job[JOB_BITS] == 16:
            multiply_kept(
                job[JOB_ADDRESS], job[JOB_FLAGS] != 0, rows, columns, first, mine, values, out, job[JOB_COLUMN], targets
            )
        else:
            block = _block(job, rows, columns)
            multiply_block(block, first, mine, planes, digits, steps, sums, out, job[JOB_COLUMN], targets, room)


@kernel
def _jobs(codings, rows, counts, few, pairs):
    """The jobs of matrices that few pairs want, their number, their pairs, the pairs that are left, the most of a job.

    counts: int64 [experts + 1], of each expert's pairs after a 0; becomes where each one's begin.
    """
    projections, known = codings.shape[0], codings.shape[1]
    jobs = np.empty((projections * min(known, pairs), JOB), np.int64)
    number, total, left, most = 0, 0, 0, 0
    for expert in range(known):
        count = counts[expert + 1]
        counts[expert + 1] += counts[expert]
        if count > few:
            left += count
        elif count:
            total += count
            most = max(most, count)
            for projection in range(projections):
                if codings[projection, expert, JOB_FLAGS] > MIXED:
                    left += count
                    continue
                for field in range(4):
                    jobs[number, field] = codings[projection, expert, field]
                jobs[number, JOB_COLUMN] = projection * rows
                jobs[number, JOB_FIRST] = counts[expert]
                jobs[number, JOB_COUNT] = count
                number += 1
    return jobs, number, total, left, most


@kernel
def _by_expert(experts, tokens, begins):
    """Tokens and numbers of pairs sorted by expert, int64 [2, pairs]. begins: where each one's begin, used up."""
    pairs = np.empty((2, experts.size), np.int64)
    for pair in range(experts.size):
        expert = experts[pair]
        if 0 <= expert < begins.size - 1:
            place = begins[expert]
            begins[expert] += 1
            pairs[0, place], pairs[1, place] = tokens[pair], pair
    return pairs


@kernel
def multiply(inputs, columns, codings, rows, experts, tokens, few, exact, out, parallel, function, threads):
    """Products of experts that at most `few` pairs want; returns the number of pairs that are left.

    Left are also those of matrices that have no kernel here, a mix of widths.
    inputs: flat [tokens · columns], float32 or bits. codings: int64 [projections, experts, fields]. experts, tokens:
    int64 [pairs]. exact: whether inputs have more than 16 bits. out: float32 [pairs, projections · rows], zeros where
    there is no such expert. parallel, function, threads: see `run_threads`; small work is done on one thread.
    """
    projections = codings.shape[0]
    counts = np.zeros(codings.shape[1] + 1, np.int64)
    for pair in range(experts.size):
        expert = experts[pair]
        if 0 <= expert < codings.shape[1]:
            counts[expert + 1] += 1
        else:
            out[pair] = 0
    jobs, number, total, left, most = _jobs(codings, rows, counts, few, experts.size)
    if number == 0:
        return left
    pairs = _by_expert(experts, tokens, counts)
    count = inputs.size // columns
    padded = -(-columns // 512) * 512
    values = np.zeros((count, padded), np.float32)
    coarse = widen(inputs, count, columns, values)
    planes = 3 if exact or coarse else 2
    digits = np.zeros((planes, count, padded), np.int8)
    steps = np.zeros((3, count, padded // 32), np.float32)
    sums = np.zeros((3, count, padded // 32), np.float32)
    prepare(values, columns, planes, LIMITS[planes - 2], digits, steps, sums)
    request = np.zeros(REQUEST, np.int64)
    request[TASKS] = number * -(-rows // TASK_ROWS)
    request[JOBS], request[PAIRS], request[PAIR_COUNT] = jobs.ctypes.data, pairs.ctypes.data, experts.size
    request[TOKENS], request[ROWS], request[COLUMNS], request[WIDTH] = count, rows, columns, projections * rows
    request[MOST] = most
    request[PLANES], request[DIGITS], request[STEPS] = planes, digits.ctypes.data, steps.ctypes.data
    request[SUMS], request[VALUES], request[OUT] = sums.ctypes.data, values.ctypes.data, out.ctypes.data
    small = threads < 2 or total * projections * rows * columns < WORTH_THREADS
    run_threads(0 if small else parallel, function, request.ctypes.data, threads)
    # Threads know arrays by address alone: numba would free each after its last use before.
    used = request.size + jobs.size + pairs.size + digits.size + steps.size + sums.size + values.size + out.size
    return left if used else 0


@kernel
def restore(coding, rows, columns, first, count, brain, out, parallel, function, threads):
    """Values of `count` rows of a block from `first` on to a flat array of bfloat16 bits or float32.

    Whole tasks: both are multiples of 64, unless the rows end before.
    """
    request = np.zeros(REQUEST, np.int64)
    job = np.zeros(JOB, np.int64)
    for field in range(4):
        job[field] = coding[field]
    job[JOB_FIRST] = first
    request[TASKS] = -(-count // TASK_ROWS)
    request[JOBS], request[ROWS], request[COLUMNS] = job.ctypes.data, rows, columns
    request[PLANES], request[OUT] = brain, out.ctypes.data
    request[RESTORING] = 1
    small = threads < 2 or count * columns < WORTH_THREADS
    run_threads(0 if small else parallel, function, request.ctypes.data, threads)
    return request.size + job.size + out.size  # which keeps them until here


def work(data):
    """What each thread runs, once compiled: the tasks of the request at an address."""
    _work(carray(data, (REQUEST,), np.int64))


SIGNATURE = types.void(types.voidptr)
