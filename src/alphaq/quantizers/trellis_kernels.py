"""The cheapest trellis codes of whole rows, and the scales that then fit best."""

from __future__ import annotations

import numpy as np

from alphaq.formats.trellis import STATE_BITS
from alphaq.simd.codes import address_of, fetch
from alphaq.simd.paths import byte_step, step_1, step_2, step_3, step_4
from alphaq.simd.vectors import LANES, as_half, fma, kernel, load, load_some, magnitude, maximum, splat, store

UNREACHED = np.float32(1e30)
LAST_COST = 255  # where costs of bytes end
HEAD = STATE_BITS  # columns, after which every state was reached
LOST = 0.02  # of a row's squared error
SMALLEST = np.float32(2.0**-26)  # no smaller scale rounds to a float16 above 0
LARGEST = np.float32(65504)  # that float16 holds; a scale is thrice a row's root mean square
LINE = 64  # bytes
SOON = 8  # columns
REACH = np.float32(2.1)  # of the levels' root mean square; half of what lies beyond is lost

REVERSED = np.array(
    [[sum((number >> bit & 1) << bits - 1 - bit for bit in range(bits)) for number in range(16)] for bits in range(5)],
    np.uint8,
)
"""The lowest so many bits of a number, the other way round."""

_byte_1, _byte_2, _byte_3, _byte_4 = (byte_step(new_bits, 1 << STATE_BITS) for new_bits in (1, 2, 3, 4))


@kernel
def on_lines(nbytes):
    """Memory, uint8 [nbytes], that begins where a cache line does: no register full of it lies on two."""
    memory = np.empty(nbytes + LINE, np.uint8)
    skipped = -address_of(memory, 0) % LINE
    return memory[skipped : skipped + nbytes]


@kernel
def encode_rows(
    weights,
    columns,
    quarters,
    group_size,
    levels,
    worth,
    misses,
    bests,
    mark,
    unit,
    shares,
    granular,
    bias_weight,
    packed,
    scales,
):
    """Fill streams and scales of whole rows; Σ(w − ŵ)².

    weights: [rows · columns]. levels: float32 [states] in units of a scale, the newest bit of a state lowest. worth:
    float32 [columns], what the square of an error counts. misses, bests, mark, unit: as of `cheapest_by_bytes`,
    `_marks` and `_counts_nearly_all`, for rows of one scale whose columns count alike; else empty. shares, granular: as
    of `_first_scales`, the former of the levels' root mean square. bias_weight: how many times errors along the weights
    count in the scales' fit. packed: uint8 zeros [rows · bytes per row]; scales: float32 [rows · groups], filled.
    """
    rows, groups = weights.size // columns, -(-columns // group_size)
    row_bytes = packed.size // rows
    spread = np.float32(np.sqrt(np.mean(np.square(levels))))
    values = np.empty(columns + LANES, np.float32)
    roots, targets = np.empty(columns, np.float32), np.empty(columns, np.float32)
    path, marks = np.empty(columns, np.int32), np.empty(columns, np.int32)
    outcomes = on_lines(columns * (levels.size // 8))
    costs, byte_costs = on_lines(8 * levels.size).view(np.float32), on_lines(2 * levels.size)
    total = 0.0
    for row in range(rows):
        for at in range(0, columns, LANES):
            place = row * columns + at
            store(values, at, load(weights, place) if place + LANES <= weights.size else load_some(weights, place))
        own = scales[row * groups : (row + 1) * groups]
        if _first_scales(values, columns, group_size, worth, shares, granular, own):
            own[:] = np.minimum(own / spread, LARGEST)
            found = False
            if misses.size and groups == 1:
                _marks(values, own[0], mark, bests.size, marks)
                last, counted = cheapest_by_bytes(
                    values, own[0], marks, misses, unit, quarters, levels, roots, targets, outcomes, costs, byte_costs
                )
                trace(last, 0, quarters, levels.size, outcomes, path)
                found = _counts_nearly_all(values, own[0], levels, path, marks, bests, unit, counted)
            if not found:
                _aim(values, columns, group_size, worth, spread, own, roots, targets)
                last = cheapest(roots, targets, 0, 0, quarters, levels, outcomes, costs)
                trace(last, 0, quarters, levels.size, outcomes, path)
            write(path, 0, quarters, packed[row * row_bytes : (row + 1) * row_bytes])
        else:
            path[:] = 0
        total += _fit(values, columns, group_size, worth, levels, path, bias_weight, own)
    return total


@kernel
def _first_scales(values, columns, group_size, worth, shares, granular, scales):
    """Scales of the groups of a row before its codes are known; whether any can be stored.

    Of the sixteen shares of a group's root mean square the one of the least granular · share² + Σ overshoot² / 2: what
    levels that lie too far apart lose, and what weights lose that lie beyond most of them.
    """
    any_, sums = False, np.empty(LANES, np.float32)
    none, half = splat(np.float32(0)), splat(np.float32(0.5))
    for group in range(scales.size):
        begin, end = group * group_size, min(columns, (group + 1) * group_size)
        energy, count = 0.0, 0.0
        for column in range(begin, end):
            energy += worth[column] * (np.float64(values[column]) * values[column])
            count += worth[column]
        size = np.float32(np.sqrt(energy / count))
        scales[group] = 0
        if size > 0:
            inverse = np.float32(1) / size
            reach, lost = load(shares, 0) * splat(REACH), none
            for column in range(begin, end):
                beyond = maximum(magnitude(splat(values[column] * inverse)) - reach, none)
                lost = fma(beyond * splat(worth[column]), beyond, lost)
            apart = load(shares, 0) * load(shares, 0) * splat(np.float32(granular * count))
            store(sums, 0, fma(lost, half, apart))
            scales[group] = size * shares[np.argmin(sums)]
        any_ |= scales[group] > SMALLEST
    return any_


@kernel
def _aim(values, columns, group_size, worth, spread, scales, roots, targets):
    """Of each column: what a level and a weight have to be multiplied with for squares of differences to be costs."""
    unit = np.float32(1) / (spread * scales.max())
    for column in range(columns):
        root = np.sqrt(worth[column]) * unit
        roots[column] = root * scales[column // group_size]
        targets[column] = root * values[column]


@kernel
def _marks(values, scale, mark, count, marks):
    """The mark next to each weight: mark number m of `count` stands for (m − (count − 1)/2) · mark · scale."""
    inverse, middle = np.float32(1) / (mark * scale), np.float32(0.5) * np.float32(count - 1)
    for column in range(marks.size):
        place = np.rint(min(max(values[column] * inverse, -middle), middle) + middle)
        marks[column] = np.int32(place)


@kernel
def cheapest_by_bytes(
    values, scale, marks, misses, unit, quarters, levels, roots, targets, outcomes, costs, byte_costs
):
    """`cheapest` of a whole row, from the state 0, with costs of bytes: twice as fast, and nearly as good a path.

    misses: uint8 [marks · states], by how many units (of squares of levels) a state's squared error is above the best
    state's where the column's weight is at a mark. marks: int32 [columns]. The first columns, when not all states have
    been reached, are run through by `cheapest`. Returns the last state and how many units were counted, of all columns
    but the first ones above their best states: about what the cheapest path costs, or less. Roundings to marks and
    units cancel, unless a row has but a few different weights.
    """
    states, head = levels.size, min(HEAD, marks.size)
    inverse = np.float32(1) / scale
    for column in range(head):
        roots[column], targets[column] = 1, inverse * values[column]
    last = cheapest(roots[:head], targets[:head], 0, 0, quarters, levels, outcomes, costs)
    begin = head % 2 * states
    least = costs[begin + last]
    units = np.float32(1) / unit
    for state in range(states):
        byte_costs[state] = np.uint8(min(np.rint((costs[begin + state] - least) * units), np.float32(LAST_COST)))
    counted = np.float64(least) / unit
    if marks.size == head:
        return last, counted
    now, then = address_of(byte_costs, 0), address_of(byte_costs, states)
    contest = address_of(outcomes, 0) + head * (states // 8)
    total = 0
    for column in range(head, marks.size):
        table = address_of(misses, marks[column] * states)
        total += run_column(new_bits(column, quarters), now, then, table, contest)
        now, then, contest = then, now, contest + states // 8
    begin = (marks.size - head) % 2 * states
    end = byte_costs[begin : begin + states]
    last = np.argmin(end)
    return last, counted + total + end[last]


@kernel
def run_column(bits, costs, next_costs, misses, outcomes):
    """`simd.paths.byte_step` of a column with so many new bits."""
    if bits == 1:
        return _byte_1(costs, next_costs, misses, outcomes)
    if bits == 2:
        return _byte_2(costs, next_costs, misses, outcomes)
    if bits == 3:
        return _byte_3(costs, next_costs, misses, outcomes)
    return _byte_4(costs, next_costs, misses, outcomes)


@kernel
def _counts_nearly_all(values, scale, levels, path, marks, bests, unit, counted):
    """Whether hardly any other path can be better by more than a small part of the squared error.

    What `cheapest_by_bytes` has not counted of this one, since costs of bytes end, is all that it may have overlooked,
    but for its roundings. bests: float32 [marks], the squared error of the best state at each.
    """
    whole, best, inverse, most = 0.0, 0.0, np.float32(1) / scale, levels.max()
    for column in range(path.size):
        value = inverse * values[column]
        miss = value - levels[path[column]]
        whole += np.float64(miss) * miss
        if column >= HEAD:
            above = abs(value) - most
            best += np.float64(above) * above if above > 0 else bests[marks[column]]
    return (whole - best) / unit - counted <= LOST * whole / unit


@kernel
def cheapest(roots, targets, first, start, quarters, levels, outcomes, costs):
    """Run through some columns of a row, the first of which follows the state start; the last state of the cheapest
    path. first: the column's number. outcomes: uint8 [columns · states / 8], filled."""
    states = levels.size
    now, then = address_of(costs, 0), address_of(costs, states)
    table, contest = address_of(levels, 0), address_of(outcomes, 0)
    costs[:states] = UNREACHED
    costs[start] = 0
    for column in range(roots.size):
        bits = new_bits(first + column, quarters)
        groups, root, target = states >> bits, roots[column], targets[column]
        if bits == 1:
            for group in range(0, groups, LANES):
                step_1(now, then, table, contest, group, groups, root, target)
        elif bits == 2:
            for group in range(0, groups, LANES):
                step_2(now, then, table, contest, group, groups, root, target)
        elif bits == 3:
            for group in range(0, groups, LANES):
                step_3(now, then, table, contest, group, groups, root, target)
        else:
            for group in range(0, groups, LANES):
                step_4(now, then, table, contest, group, groups, root, target)
        now, then, contest = then, now, contest + states // 8
    begin = roots.size % 2 * states
    return np.argmin(costs[begin : begin + states])


@kernel
def new_bits(column, quarters):
    """Bits that a column adds to its row's stream."""
    return (column + 1) * quarters // 4 - column * quarters // 4


@kernel
def trace(last, first, quarters, states, outcomes, path):
    """Follow the outcomes of `cheapest` back from the last state: the state of each of its columns.

    The contest that follows from a contest's winner is known when its outcome has been read; both that it may be are
    read at once with it, since reading is what takes long.
    """
    state = last
    for column in range(path.size - 1, -1, -1):
        for line in range(0, states // 8, LINE):
            fetch(address_of(outcomes, max(column - SOON, 0) * (states // 8) + line))
        path[column] = state
        bits = new_bits(first + column, quarters)
        groups, group = states >> bits, state >> bits
        way, contests, contest, base = 0, 1, (1 << bits) - 2, column * states + group
        if bits % 2:
            way, contests, contest = _bit(outcomes, base + contest * groups), 2, contest - 2
        while contests < 1 << bits:
            below = contest - 2 * contests
            won = _bit(outcomes, base + (contest + way) * groups)
            one = _bit(outcomes, base + (below + 2 * way) * groups)
            other = _bit(outcomes, base + (below + 2 * way + 1) * groups)
            way = 4 * way + 2 * won + (other if won else one)
            contests, contest = 4 * contests, below - 4 * contests
        state = group + way * groups


@kernel
def _bit(outcomes, place):
    return np.int64((outcomes[place >> 3] >> (place & 7)) & 1)


@kernel
def write(path, first, quarters, stream):
    """Put the new bits of each column's state into its row's stream, where there are zeros.

    The newest bit is the stream's last and the state's lowest.
    """
    place = first * quarters // 4
    at, held, waiting = place >> 3, place & 7, 0
    for column in range(path.size):
        bits = new_bits(first + column, quarters)
        waiting |= np.int64(REVERSED[bits, path[column] & (1 << bits) - 1]) << held
        held += bits
        if held >= 8:
            stream[at] |= np.uint8(waiting & 255)
            at, waiting, held = at + 1, waiting >> 8, held - 8
    if held:
        stream[at] |= np.uint8(waiting)


@kernel
def _fit(values, columns, group_size, worth, levels, path, bias_weight, scales):
    """Fit a row's scales to its codes; Σ(w − ŵ)² with what float16 makes of them."""
    total = 0.0
    for group in range(scales.size):
        begin, end = group * group_size, min(columns, (group + 1) * group_size)
        along, square, energy = 0.0, 0.0, 0.0
        for column in range(begin, end):
            value, level, counts = np.float64(values[column]), np.float64(levels[path[column]]), worth[column]
            along += counts * value * level
            square += counts * level * level
            energy += counts * value * value
        whole = (bias_weight - 1) * along * along + square * energy
        best = bias_weight * along * energy / whole if whole > 0 and along > 0 else 0.0
        scales[group] = as_half(np.float32(min(best, np.float64(LARGEST))))
        for column in range(begin, end):
            miss = np.float64(values[column]) - np.float64(scales[group]) * levels[path[column]]
            total += miss * miss
    return total
