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

from alphaq.simd.codes import (
    CODES,
    add_products,
    as_floats,
    as_whole,
    brains_at,
    byte_at,
    codes_at,
    fetch,
    half_at,
    halves_at,
    no_products,
    pointer,
    put_brains,
    put_byte,
    put_codes,
    put_digits,
    put_floats,
    run_threads,
    shifted_sum,
    take,
    transpose_bytes,
    two_halves,
    unpack,
    whole_sum,
    without_digit,
)
from alphaq.simd.vectors import (
    LANES,
    as_brain,
    fma,
    kernel,
    lane_maximum,
    lane_sum,
    load,
    load_bytes,
    magnitude,
    maximum,
    minimum,
    nearest,
    splat,
    store,
    where_less,
)

STEP_GROUP = 128  # inputs that share a step
TASK_ROWS = 64
LIMITS = (32639.0, 8355711.0)  # largest whole number that 2 and 3 signed bytes are cut from
HEADER = 16
MIXED = 3  # flags beyond it are of blocks that have no kernel here
AHEAD = 2048  # bytes: processors foresee a stream of codes only to the end of its page
SMALLEST = np.float32(1e-30)  # inputs below have no inverse in float32 and count as 0
WORTH_THREADS = 1 << 20  # products, some tens of microseconds

# Places in a request, an array of int64.
(COUNTER, TASKS, JOBS, PAIRS, PAIR_COUNT, TOKENS, ROWS, COLUMNS) = range(8)
(WIDTH, PLANES, DIGITS, STEPS, SUMS, VALUES, OUT, RESTORING, MOST) = range(8, 17)
REQUEST = 17
# Columns of a job: where the block is, how it is coded, where its products go, which pairs want it.
(JOB_ADDRESS, JOB_BITS, JOB_GROUP, JOB_FLAGS, JOB_COLUMN, JOB_FIRST, JOB_COUNT) = range(7)
JOB = 7


@kernel
def widen(inputs, tokens, columns, values):
    """Inputs as float32 [tokens, padded], which come zeroed; returns whether two bytes are too few for them.

    inputs: flat [tokens · columns], float32, or bits of float16 or bfloat16. Few they are where most inputs of a group
    are smaller than a 256th of its largest: an outlier would take the bits of its neighbours.
    """
    zero, one = splat(np.float32(0)), splat(np.float32(1))
    rest = np.zeros(LANES, inputs.dtype)
    coarse = False
    for token in range(tokens):
        end = columns // LANES * LANES
        row = values[token]
        for at in range(0, end, LANES):
            store(row, at, load(inputs, token * columns + at))
        if end < columns:
            for at in range(columns - end):
                rest[at] = inputs[token * columns + end + at]
            store(row, end, load(rest, 0))
        for begin in range(0, columns, STEP_GROUP):
            extent, small, number = zero, zero, zero
            for at in range(begin, begin + STEP_GROUP, LANES):
                extent = maximum(extent, magnitude(load(row, at)))
            border = splat(lane_maximum(extent) / np.float32(256))
            for at in range(begin, begin + STEP_GROUP, LANES):
                value = magnitude(load(row, at))
                number = number + where_less(zero, value, one, zero)
                small = small + where_less(zero, value, where_less(value, border, one, zero), zero)
            coarse |= lane_sum(small) > np.float32(0.5) * lane_sum(number)
    return coarse


@kernel
def prepare(values, columns, planes, limit, digits, steps, sums):
    """Inputs as whole numbers.

    values: float32 [tokens, padded], zero beyond the columns; padded: columns rounded up to 512. digits: int8
    [planes, tokens, padded]. steps, sums: float32 [3, tokens, padded / 32], σ and σ·Σn for groups of 32, 64 and 128.
    All come zeroed.
    """
    tokens, padded = values.shape
    bottom, top, none = splat(np.float32(-limit)), splat(np.float32(limit)), splat(np.float32(0))
    for token in range(tokens):
        row = values[token]
        for begin in range(0, columns, STEP_GROUP):
            extent, spoiled = none, none
            for at in range(begin, begin + STEP_GROUP, LANES):
                value = load(row, at)
                extent = maximum(extent, magnitude(value))
                spoiled = fma(value, none, spoiled)
            largest = lane_maximum(extent) + lane_sum(spoiled)
            fine = largest >= SMALLEST and largest < np.float32(np.inf)
            inverse = splat(np.float32(limit) / largest if fine else np.float32(0))
            step = np.float32(0) if largest < SMALLEST else np.float32(np.float64(largest) / limit)
            for part in range(4):
                total = np.int64(0)
                for at in range(begin + 32 * part, begin + 32 * part + 32, LANES):
                    value = load(row, at) if fine else none
                    whole = as_whole(minimum(maximum(nearest(value * inverse), bottom), top))
                    total += whole_sum(whole)
                    for plane in range(planes - 1, -1, -1):
                        put_digits(digits.ctypes.data + (plane * tokens + token) * padded + at, whole)
                        whole = without_digit(whole)
                sums[0, token, begin // 32 + part] = np.float32(np.float64(total) * step)
                steps[0, token, begin // 32 + part] = step
        for level in range(1, 3):
            for place in range(padded // 32 >> level):
                sums[level, token, place] = sums[level - 1, token, 2 * place] + sums[level - 1, token, 2 * place + 1]
                steps[level, token, place] = steps[level - 1, token, 2 * place]


@kernel
def _rest_of_row(address, length, rest):
    """The bytes of a row's last codes, where 64 codes would reach beyond it."""
    for at in range(length):
        rest[at] = byte_at(address + at)
    return rest.ctypes.data


@kernel
def _last_codes(source, columns, bits, rest):
    """Where a row's codes after the last 64 whole ones can be read as if there were 64."""
    whole = 8 * bits * (columns // CODES)
    return _rest_of_row(source + whole, 4 * -(-columns * bits // 32) - whole, rest) if columns % CODES else source


@kernel
def _scales(address, count, scales):
    """float16 at an address to float32."""
    whole = count // LANES * LANES
    store(scales, whole, splat(np.float32(0)))  # whole lanes are read, of which nothing else may spoil the sums
    for at in range(0, whole, LANES):
        store(scales, at, halves_at(address + 2 * at))
    for at in range(whole, count):
        scales[at] = half_at(address + 2 * at)


@kernel
def _zero_points(address, rows, bits, groups, first, count, turned):
    """Zero points of up to 64 rows from row `first` on: bytes [⌈groups / 16⌉, 64, 16], and room for sixteen rows."""
    stride = 4 * -(-rows * bits // 32)
    tile, rest = turned[turned.size - CODES * LANES :], np.empty(CODES, np.uint8)
    for begin in range(0, groups, LANES):
        for group in range(begin, min(begin + LANES, groups)):
            place = address + group * stride + first * bits // 8
            if count < CODES:
                place = _rest_of_row(place, -(-count * bits // 8), rest)
            put_codes(tile.ctypes.data + CODES * (group - begin), unpack(place, bits))
        transpose_bytes(tile.ctypes.data, turned.ctypes.data + begin * CODES)


@kernel
def _room(columns, tokens):
    """Memory that a thread uses for every task: scales, means, weights and totals, zero points, a row's end."""
    groups = -(-columns // 32)
    padded = -(-groups // LANES) * LANES
    grid = TASK_ROWS * groups + LANES
    weights = tokens * padded + LANES
    return (
        np.zeros(grid, np.float32),
        np.zeros(grid, np.float32),
        np.zeros(weights, np.float32),
        np.zeros(tokens * LANES, np.float32),
        np.zeros(CODES * (padded + LANES), np.uint8),
        np.zeros(2 * CODES, np.uint8),
    )


@kernel
def _grids(address, bits, group_size, symmetric, rows, columns, first, count, scales, means, zeros):
    """Read scales [count · groups] of some rows, and their means (likewise) or zero points (as `_zero_points`)."""
    groups = -(-columns // group_size)
    offsets = address + HEADER + 4 * rows * -(-columns * bits // 32)
    after = offsets
    if not symmetric:
        after += 2 * rows * groups if bits == 1 else 4 * groups * -(-rows * bits // 32)
    _scales(after + 2 * first * groups, count * groups, scales)
    if not symmetric:
        if bits == 1:
            _scales(offsets + 2 * first * groups, count * groups, means)
        else:
            _zero_points(offsets, rows, bits, groups, first, count, zeros)


@kernel
def multiply_block(
    address,
    bits,
    group_size,
    symmetric,
    rows,
    columns,
    first,
    mine,
    planes,
    digits,
    steps,
    sums,
    out,
    column,
    pairs,
    room,
):
    """Products of up to 64 rows from `first` on with some tokens.

    symmetric: 0, 1, or 3 where levels are odd halves. mine: int64 [count], rows of digits [planes, tokens, padded],
    steps and sums. out: float32 [pairs, width]; products
    of mine[i] go to row pairs[i], from `column` on. room: see `_room`.
    """
    scales, means, weights, totals, zeros, rest = room
    tokens, count = mine.size, min(TASK_ROWS, rows - first)
    groups = -(-columns // group_size)
    level = 0 if group_size == 32 else 1 if group_size == 64 else 2
    row_bytes = 4 * -(-columns * bits // 32)
    _grids(address, bits, group_size, symmetric, rows, columns, first, count, scales, means, zeros)
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
        last = _last_codes(source, columns, bits, rest)
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
            found = _four_tokens(
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
            out[pairs[token], column + first + row] = lane_sum(found[0] + load(totals, LANES * token))
            out[pairs[second], column + first + row] = lane_sum(found[1] + load(totals, LANES * second))
            out[pairs[third], column + first + row] = lane_sum(found[2] + load(totals, LANES * third))
            out[pairs[fourth], column + first + row] = lane_sum(found[3] + load(totals, LANES * fourth))
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
def multiply_kept(address, half, rows, columns, first, mine, values, out, column, pairs):
    """`multiply_block` for a matrix of float16 (`half`) or bfloat16; values: the inputs, float32 [tokens, padded]."""
    whole = columns // LANES * LANES
    for row in range(first, min(first + TASK_ROWS, rows)):
        source = address + 2 * row * columns
        for index in range(mine.size):
            inputs = values[mine[index]]
            even, odd = splat(np.float32(0)), splat(np.float32(0))
            for at in range(0, whole - LANES, 2 * LANES):
                place = source + 2 * at
                even = fma(halves_at(place) if half else brains_at(place), load(inputs, at), even)
                place += 2 * LANES
                odd = fma(halves_at(place) if half else brains_at(place), load(inputs, at + LANES), odd)
            if whole // LANES % 2:
                place = source + 2 * (whole - LANES)
                even = fma(halves_at(place) if half else brains_at(place), load(inputs, whole - LANES), even)
            total = lane_sum(even + odd)
            for at in range(whole, columns):
                total += inputs[at] * (half_at(source + 2 * at) if half else _brain_at(source + 2 * at))
            out[pairs[index], column + row] = total


@kernel
def _brain_at(address):
    """One bfloat16 at an address as float32."""
    held = np.empty(1, np.uint32)
    held[0] = np.uint32(byte_at(address) << 16 | byte_at(address + 1) << 24)
    return held.view(np.float32)[0]


@kernel
def restore_block(address, bits, group_size, symmetric, rows, columns, first, brain, out, room):
    """Values of up to 64 rows from `first` on to an address, as bfloat16 (`brain`) or float32. room: see `_room`."""
    scales, means, _, _, zeros, rest = room
    count = min(TASK_ROWS, rows - first)
    groups = -(-columns // group_size)
    row_bytes = 4 * -(-columns * bits // 32)
    _grids(address, bits, group_size, symmetric, rows, columns, first, count, scales, means, zeros)
    codes = rest[CODES:]
    width = 2 if brain else 4
    values = np.empty(2 * LANES, np.float32)
    raw = values.view(np.uint8)
    for row in range(count):
        source = address + HEADER + (first + row) * row_bytes
        last = _last_codes(source, columns, bits, rest)
        target = out + width * row * columns
        for chunk in range(-(-columns // CODES)):
            place = source + 8 * bits * chunk if (chunk + 1) * CODES <= columns else last
            put_codes(codes.ctypes.data, unpack(place, bits))
            for begin in range(chunk * CODES, min((chunk + 1) * CODES, columns), 32):  # of one group
                group = begin // group_size
                scale = scales[row * groups + group]
                zero, start = np.float32(0), np.float32(0)
                if bits == 1:
                    start = (means[row * groups + group] if not symmetric else np.float32(0)) - scale
                    scale = np.float32(2) * scale
                elif symmetric:
                    zero = np.float32(2 ** (bits - 1)) - (np.float32(0.5) if symmetric > 1 else np.float32(0))
                else:
                    zero = np.float32(zeros[group // LANES * LANES * CODES + LANES * row + group % LANES])
                low = (load_bytes(codes, begin % CODES) - splat(zero)) * splat(scale) + splat(start)
                high = (load_bytes(codes, begin % CODES + LANES) - splat(zero)) * splat(scale) + splat(start)
                if brain:
                    low, high = as_brain(low), as_brain(high)
                if begin + 32 <= columns:
                    if brain:
                        put_brains(target + 2 * begin, low)
                        put_brains(target + 2 * (begin + LANES), high)
                    else:
                        put_floats(target + 4 * begin, low)
                        put_floats(target + 4 * (begin + LANES), high)
                else:
                    store(values, 0, low)
                    store(values, LANES, high)
                    for lane in range(columns - begin):
                        for byte in range(width):
                            put_byte(target + width * (begin + lane) + byte, raw[4 * lane + 4 - width + byte])


@kernel
def _restore_tasks(request):
    job = carray(pointer(request[JOBS]), (JOB,), np.int64)
    width = 2 if request[PLANES] else 4
    room = _room(request[COLUMNS], 1)
    while True:
        task = take(request)
        if task >= request[TASKS]:
            return
        restore_block(
            job[JOB_ADDRESS],
            job[JOB_BITS],
            job[JOB_GROUP],
            job[JOB_FLAGS],
            request[ROWS],
            request[COLUMNS],
            job[JOB_FIRST] + TASK_ROWS * task,
            request[PLANES] != 0,
            request[OUT] + TASK_ROWS * task * request[COLUMNS] * width,
            room,
        )


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
    room = _room(columns, request[MOST])
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
            multiply_block(
                job[JOB_ADDRESS],
                job[JOB_BITS],
                job[JOB_GROUP],
                job[JOB_FLAGS],
                rows,
                columns,
                first,
                mine,
                planes,
                digits,
                steps,
                sums,
                out,
                job[JOB_COLUMN],
                targets,
                room,
            )


@kernel
def multiply(inputs, columns, codings, rows, experts, tokens, few, exact, out, parallel, function, threads):
    """Products of experts that at most `few` pairs want; returns the number of pairs that are left.

    Left are also those of matrices that have no kernel here, a mix of widths.
    inputs: flat [tokens · columns], float32 or bits. codings: int64 [projections, experts, fields]. experts, tokens:
    int64 [pairs]. exact: whether inputs have more than 16 bits. out: float32 [pairs, projections · rows], zeros where
    there is no such expert. parallel, function, threads: see `run_threads`; small work is done on one thread.
    """
    projections, known = codings.shape[0], codings.shape[1]
    counts = np.zeros(known + 1, np.int64)
    for pair in range(experts.size):
        expert = experts[pair]
        if 0 <= expert < known:
            counts[expert + 1] += 1
        else:
            out[pair] = 0
    jobs = np.empty((projections * min(known, experts.size), JOB), np.int64)
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
    if number == 0:
        return left
    pairs = np.empty((2, experts.size), np.int64)
    for pair in range(experts.size):
        expert = experts[pair]
        if 0 <= expert < known:
            place = counts[expert]
            counts[expert] += 1
            pairs[0, place], pairs[1, place] = tokens[pair], pair
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
