"""Multiply with packed matrices on the CPU: codes are unpacked in registers and never written out.

Inputs become whole numbers n with one step for 128 neighbours, x ≈ σ·n, cut into signed bytes: two for 16-bit inputs
without large outliers, else three. What is lost is of the size of the inputs' own rounding. Then with ŵ = s·q + β

    Σ ŵ·x  ≈  Σ over groups of  s·σ·(Σ q·n)  +  β·σ·(Σ n)

where the sums over a group are exact in whole numbers and processors add 64 products in one instruction. The second
part needs no codes. A task is 64 rows of one matrix (or 128, for `tile_kernels`) with all tokens that want it; threads
take tasks by a counter, so which thread did what is not fixed, what each task computes is.
"""

from __future__ import annotations

import numpy as np
from numba import carray, types

from alphaq.nouns.choice import KEPT_BITS
from alphaq.runtime.block_kernels import RESTORED, TASK_ROWS, TRELLIS, restore_block, room_of
from alphaq.runtime.input_kernels import LIMITS, prepare, widen
from alphaq.runtime.integer_kernels import multiply_block
from alphaq.runtime.kept_kernels import multiply_kept
from alphaq.runtime.restored_kernels import DEPTH, LINE, multiply_many, tile_of
from alphaq.runtime.tile_kernels import BLOCK_BYTES, TILE_NUMBERS, multiply_tiles, tile_sums, turn_block
from alphaq.runtime.trellis_kernels import multiply_trellis, restore_trellis
from alphaq.simd.codes import pointer, run_threads, take
from alphaq.simd.vectors import LANES, kernel, stamped

MOST_TURNED = 3 << 18  # numbers: 1.5 MiB of a job's turned tokens, beside the rows of a task
MORE_ROWS = 2 * TASK_ROWS
TASKS_A_THREAD = 4  # at least
WORTH_THREADS = 1 << 20  # products, some tens of microseconds

# Places in a request, an array of int64.
(COUNTER, TASKS, JOBS, PAIRS, PAIR_COUNT, TOKENS, ROWS, COLUMNS) = range(8)
(WIDTH, PLANES, DIGITS, STEPS, SUMS, VALUES, OUT, WORK, MOST, INPUTS, FEW) = range(8, 19)
(BLOCKS, TURNED) = range(19, 21)  # of tokens for tiles: which they are, where they lie turned
SPAN, THREADS = range(21, 23)  # rows of a task for tiles; how many threads work on them
REQUEST = 23
MULTIPLY, RESTORE, TURN, TILES = range(4)  # what `WORK` may be
# Columns of a job: where the block is, how it is coded, where its products go, which pairs want it, their first block.
(JOB_ADDRESS, JOB_BITS, JOB_GROUP, JOB_FLAGS, JOB_COLUMN, JOB_FIRST, JOB_COUNT, JOB_TURNED) = range(8)
JOB = 8


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
        place = request[OUT] + TASK_ROWS * task * row_bytes
        if job[JOB_FLAGS] & TRELLIS:
            restore_trellis(block, first, request[PLANES] != 0, place, room)
        else:
            restore_block(block, first, request[PLANES] != 0, place, room)


@kernel
def _turn_tasks(request):
    pairs = carray(pointer(request[PAIRS]), (2, request[PAIR_COUNT]), np.int64)
    blocks = carray(pointer(request[BLOCKS]), (request[TASKS], 2), np.int64)
    columns = request[COLUMNS]
    while True:
        task = take(request)
        if task >= request[TASKS]:
            return
        mine = pairs[0, blocks[task, 0] : blocks[task, 0] + blocks[task, 1]]
        turn_block(request[INPUTS], columns, mine, request[TURNED] + BLOCK_BYTES * columns * task)


@kernel
def _block(job, rows, columns):
    """A job's block, as `block_kernels` has it."""
    return job[JOB_ADDRESS], job[JOB_BITS], job[JOB_GROUP], job[JOB_FLAGS], rows, columns


@kernel
def _work(request):
    """Take tasks until there are no more."""
    if request[WORK] == RESTORE:
        _restore_tasks(request)
    elif request[WORK] == TURN:
        _turn_tasks(request)
    elif request[WORK] == TILES:
        _tile_tasks(request)
    else:
        _multiply_tasks(request)


@kernel
def _tile_tasks(request):
    rows, columns, width, span = request[ROWS], request[COLUMNS], request[WIDTH], request[SPAN]
    parts = -(-rows // span)
    jobs = carray(pointer(request[JOBS]), (request[TASKS] // parts, JOB), np.int64)
    pairs = carray(pointer(request[PAIRS]), (2, request[PAIR_COUNT]), np.int64)
    out = carray(pointer(request[OUT]), (request[PAIR_COUNT], width), np.uint16)
    room = room_of(columns, 0)
    tile = tile_of(span, min(columns, TILE_NUMBERS // span))
    sums = tile_sums(jobs[:, JOB_COUNT].max(), span)
    while True:
        task = take(request)
        if task >= request[TASKS]:
            return
        job = jobs[task // parts]
        targets = pairs[1, job[JOB_FIRST] : job[JOB_FIRST] + job[JOB_COUNT]]
        turned = request[TURNED] + BLOCK_BYTES * columns * job[JOB_TURNED]
        block = _block(job, rows, columns)
        first = task % parts * span
        after = first + span * request[THREADS]
        multiply_tiles(block, first, span, turned, out, job[JOB_COLUMN], targets, tile, sums, room, after)


@kernel
def _multiply_tasks(request):
    rows, columns, width, planes = request[ROWS], request[COLUMNS], request[WIDTH], request[PLANES]
    blocks = -(-rows // TASK_ROWS)
    tokens = request[TOKENS] if request[MOST] else 0
    padded = -(-columns // 512) * 512
    jobs = carray(pointer(request[JOBS]), (request[TASKS] // blocks, JOB), np.int64)
    pairs = carray(pointer(request[PAIRS]), (2, request[PAIR_COUNT]), np.int64)
    digits = carray(pointer(request[DIGITS]), (planes, tokens, padded), np.int8)
    steps = carray(pointer(request[STEPS]), (3, tokens, padded // 32), np.float32)
    sums = carray(pointer(request[SUMS]), (3, tokens, padded // 32), np.float32)
    values = carray(pointer(request[VALUES]), (tokens, padded), np.float32)
    out = carray(pointer(request[OUT]), (request[PAIR_COUNT], width), np.float32)
    room = room_of(columns, request[MOST])
    tile = tile_of(TASK_ROWS, min(columns, DEPTH) if request[INPUTS] else 0)
    while True:
        task = take(request)
        if task >= request[TASKS]:
            return
        job = jobs[task // blocks]
        first = task % blocks * TASK_ROWS
        begin, end = job[JOB_FIRST], job[JOB_FIRST] + job[JOB_COUNT]
        mine, targets = pairs[0, begin:end], pairs[1, begin:end]
        block = _block(job, rows, columns)
        if job[JOB_COUNT] > request[FEW]:
            multiply_many(block, first, mine, request[INPUTS], out, job[JOB_COLUMN], targets, tile, room)
        else:
            column = job[JOB_COLUMN]
            multiply_few(block, first, mine, planes, digits, steps, sums, values, out, column, targets, room)


@kernel
def multiply_few(block, first, mine, planes, digits, steps, sums, values, out, column, pairs, room):
    """`integer_kernels.multiply_block` for every way to store a matrix that has a kernel."""
    address, bits, _, flags, rows, columns = block
    if flags & TRELLIS:
        multiply_trellis(block, first, mine, planes, digits, steps, sums, out, column, pairs, room)
    elif bits == KEPT_BITS:
        multiply_kept(address, flags != 0, rows, columns, first, mine, values, out, column, pairs)
    else:
        multiply_block(block, first, mine, planes, digits, steps, sums, out, column, pairs, room)


@kernel
def _jobs(codings, rows, counts, least, few, many, pairs):
    """The jobs of matrices, their number, their pairs, the pairs that are left, the most of a job that is for few.

    Matrices that more than `many` pairs want are left, those that fewer than `least` want are passed over.
    counts: int64 [experts + 1], of each expert's pairs after a 0; becomes where each one's begin.
    """
    projections, known = codings.shape[0], codings.shape[1]
    jobs = np.empty((projections * min(known, pairs), JOB), np.int64)
    number, total, left, most = 0, 0, 0, 0
    for expert in range(known):
        count = counts[expert + 1]
        counts[expert + 1] += counts[expert]
        if count > many:
            left += count
        elif count >= least:
            total += count
            if count <= few:
                most = max(most, count)
            for projection in range(projections):
                if codings[projection, expert, JOB_FLAGS] & RESTORED:
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
def count_pairs(experts, known):
    """How many pairs want each expert, after a 0: int64 [known + 1]."""
    counts = np.zeros(known + 1, np.int64)
    for pair in range(experts.size):
        if 0 <= experts[pair] < known:
            counts[experts[pair] + 1] += 1
    return counts


@kernel
def _token_blocks(jobs):
    """Sixteen pairs or fewer of every expert: first and count, int64 [blocks, 2].

    Jobs get the number of their first block. Those of one expert lie together.
    """
    most = 0
    for job in range(len(jobs)):
        most += -(-jobs[job, JOB_COUNT] // LANES)
    blocks = np.empty((most, 2), np.int64)
    number, start, known = 0, 0, -1
    for job in range(len(jobs)):
        count, first = jobs[job, JOB_COUNT], jobs[job, JOB_FIRST]
        if first != known:
            known, start = first, number
            for begin in range(0, count, LANES):
                blocks[number, 0], blocks[number, 1] = first + begin, min(LANES, count - begin)
                number += 1
        jobs[job, JOB_TURNED] = start
    return blocks[:number]


@kernel
def _span(jobs, rows, columns, threads):
    """Rows of a task for tiles: more, and fewer columns at a time, where a job's tokens would not stay in the cache."""
    if jobs[:, JOB_COUNT].max() * columns <= MOST_TURNED:
        return TASK_ROWS
    return MORE_ROWS if len(jobs) * rows >= TASKS_A_THREAD * threads * MORE_ROWS else TASK_ROWS


@kernel
def multiply_tiled(inputs, columns, codings, rows, experts, tokens, least, out, parallel, function, threads):
    """Products of experts that at least so many pairs want, by tiles; returns how many of their products are left.

    inputs: flat bits of bfloat16 [tokens · columns], columns a multiple of 32. out: likewise [pairs, projections ·
    rows], of which rows of other experts' pairs stay as they are. All else: see `multiply`.
    """
    projections, known = codings.shape[0], codings.shape[1]
    counts = count_pairs(experts, known)
    jobs, number, total, left, _ = _jobs(codings, rows, counts, least, 0, experts.size, experts.size)
    if number == 0:
        return left
    jobs, pairs = jobs[:number], _by_expert(experts, tokens, counts)
    blocks = _token_blocks(jobs)
    turned = np.empty(BLOCK_BYTES * columns * len(blocks) + LINE, np.uint8)
    request = np.zeros(REQUEST, np.int64)
    request[JOBS], request[PAIRS], request[PAIR_COUNT] = jobs.ctypes.data, pairs.ctypes.data, experts.size
    request[INPUTS], request[OUT] = inputs.ctypes.data, out.ctypes.data
    request[ROWS], request[COLUMNS], request[WIDTH] = rows, columns, projections * rows
    request[BLOCKS], request[TURNED] = blocks.ctypes.data, turned.ctypes.data + -turned.ctypes.data % LINE
    request[SPAN] = _span(jobs, rows, columns, threads)
    if threads < 2 or total * projections * rows * columns < WORTH_THREADS:
        parallel, threads = 0, 1
    request[THREADS] = threads
    request[WORK], request[TASKS] = TURN, len(blocks)
    run_threads(parallel, function, request.ctypes.data, threads)
    request[WORK], request[TASKS], request[COUNTER] = TILES, number * -(-rows // request[SPAN]), 0
    run_threads(parallel, function, request.ctypes.data, threads)
    # Threads know arrays by address alone: numba would free each after its last use before.
    return left if request.size + jobs.size + pairs.size + inputs.size + out.size + blocks.size + turned.size else 0


@kernel
def multiply(inputs, columns, codings, rows, experts, tokens, few, many, exact, out, parallel, function, threads):
    """Products of experts that at most `many` pairs want; returns how many pairs are left.

    Left are also those of matrices that have no kernel here, a mix of widths. Experts that more than `few` pairs want
    are multiplied as restored rows of bfloat16: many may be above few only if inputs are, their rows multiples of 32.
    inputs: flat [tokens · columns], float32 or bits. codings: int64 [projections, experts, fields]. experts, tokens:
    int64 [pairs]. exact: whether inputs have more than 16 bits. out: float32 [pairs, projections · rows], zeros where
    there is no such expert. parallel, function, threads: see `run_threads`; small work is done on one thread.
    """
    projections, known = codings.shape[0], codings.shape[1]
    counts = count_pairs(experts, known)
    for pair in range(experts.size):
        if not 0 <= experts[pair] < known:
            out[pair] = 0
    jobs, number, total, left, most = _jobs(codings, rows, counts, 1, few, many, experts.size)
    if number == 0:
        return left
    pairs = _by_expert(experts, tokens, counts)
    count = inputs.size // columns if most else 0
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
    request[INPUTS], request[FEW] = inputs.ctypes.data if many > few else 0, few
    request[TOKENS], request[ROWS], request[COLUMNS], request[WIDTH] = count, rows, columns, projections * rows
    request[WORK], request[MOST] = MULTIPLY, most
    request[PLANES], request[DIGITS], request[STEPS] = planes, digits.ctypes.data, steps.ctypes.data
    request[SUMS], request[VALUES], request[OUT] = sums.ctypes.data, values.ctypes.data, out.ctypes.data
    small = threads < 2 or total * projections * rows * columns < WORTH_THREADS
    run_threads(0 if small else parallel, function, request.ctypes.data, threads)
    # Threads know arrays by address alone: numba would free each after its last use before.
    used = request.size + jobs.size + pairs.size + digits.size + steps.size + sums.size
    used += values.size + out.size + inputs.size
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
    request[WORK] = RESTORE
    small = threads < 2 or count * columns < WORTH_THREADS
    run_threads(0 if small else parallel, function, request.ctypes.data, threads)
    return request.size + job.size + out.size  # which keeps them until here


@stamped
def work(data):
    """What each thread runs, once compiled: the tasks of the request at an address."""
    _work(carray(data, (REQUEST,), np.int64))


SIGNATURE = types.void(types.voidptr)
