"""The spectra's tail at memory speed: only what the Hill estimator needs, sixteen blocks to a vector.

1. Gram matrices of sixteen blocks, interleaved so that lane l of every vector belongs to block l.
2. Householder tridiagonalisation of all sixteen at once. The rank-2 update that one reflection asks
   for is fused with the matrix–vector product of the next, so the matrix streams through once a step.
3. The number of negative pivots of T − xI counts the eigenvalues below x (Sturm). Bisection on the
   pooled count finds the start of the tail, then every eigenvalue above it; none below is computed.

The plain torch path in `eigenvalues.py` is the reference that tests compare with.
"""

from __future__ import annotations

import math

import numpy as np

from alphaq.simd.vectors import LANES, copysign, fma, kernel, load, magnitude, splat, square_root, store, where_less

TOLERANCE = 1e-6  # relative width at which an eigenvalue counts as found
PANEL = 4 * LANES  # eigenvalues bisected together: enough independent divisions to hide their latency
_TINY = np.float32(1e-30)
_SMALLEST = np.float32(1e-37)  # below it a reciprocal overflows, and a reflection would change nothing


def row_length(size):
    """Floats from one row of sixteen interleaved matrices to the next: one vector more than they need,
    or rows would lie a power of two apart and drive one another out of the cache."""
    return (size + 1) * LANES


_row_length = kernel(row_length)


@kernel
def tridiagonals(weight, columns, corners, size, scale, scratch, diagonal, off_squared):
    """Tridiagonal forms of the Gram matrices of sixteen square blocks of a flat [rows · columns] matrix.

    weight: float32, or bits of float16 or bfloat16. corners: offsets of the blocks' first elements, int64
    [16]. scratch: float32 [2 · (size + 1) · row_length(size)], best aligned to 64 bytes.
    diagonal, off_squared: float32 [size · 16], filled; off_squared[0] is 0.
    """
    row = _row_length(size)
    blocks, gram = scratch[: size * row], scratch[size * row : 2 * size * row]
    _interleave(weight, columns, corners, size, scale, blocks)
    _gram(blocks, size, gram)
    partner, product = scratch[2 * size * row : (2 * size + 1) * row], scratch[(2 * size + 1) * row :]
    _tridiagonalise(gram, size, diagonal, off_squared, partner, product)


@kernel
def _interleave(weight, columns, corners, size, scale, out):
    """out[k, i, l] = scale · element (k, i) of block l."""
    line = np.empty(size, np.float32)
    factor = splat(scale)
    row = _row_length(size)
    for lane in range(LANES):
        for k in range(size):
            source = corners[lane] + k * columns
            for i in range(0, size, LANES):
                store(line, i, load(weight, source + i) * factor)
            target = k * row + lane
            for i in range(size):
                out[target + i * LANES] = line[i]


@kernel
def _gram(blocks, size, gram):
    """Lower triangles gram[i, j, l] = Σₖ blocks[k, i, l]·blocks[k, j, l], in tiles of 4 rows × 4 terms."""
    row = _row_length(size)
    zero = splat(np.float32(0))
    for i in range(0, size, 4):
        for tile_row in range(4):
            for j in range(i + 4):
                store(gram, (i + tile_row) * row + j * LANES, zero)
        for k in range(0, size, 4):
            p = k * row + i * LANES
            a00, a01, a02, a03 = _four(blocks, p)
            a10, a11, a12, a13 = _four(blocks, p + row)
            a20, a21, a22, a23 = _four(blocks, p + 2 * row)
            a30, a31, a32, a33 = _four(blocks, p + 3 * row)
            for j in range(i + 4):
                q = k * row + j * LANES
                b0 = load(blocks, q)
                b1 = load(blocks, q + row)
                b2 = load(blocks, q + 2 * row)
                b3 = load(blocks, q + 3 * row)
                o = i * row + j * LANES
                store(gram, o, fma(a30, b3, fma(a20, b2, fma(a10, b1, fma(a00, b0, load(gram, o))))))
                o += row
                store(gram, o, fma(a31, b3, fma(a21, b2, fma(a11, b1, fma(a01, b0, load(gram, o))))))
                o += row
                store(gram, o, fma(a32, b3, fma(a22, b2, fma(a12, b1, fma(a02, b0, load(gram, o))))))
                o += row
                store(gram, o, fma(a33, b3, fma(a23, b2, fma(a13, b1, fma(a03, b0, load(gram, o))))))


@kernel
def _four(array, offset):
    return (
        load(array, offset),
        load(array, offset + LANES),
        load(array, offset + 2 * LANES),
        load(array, offset + 3 * LANES),
    )


@kernel
def _reflector(matrix, base, count):
    """Make row elements 0 … count − 1 the vector v that annihilates all but the last.

    Returns |x|² and β = 1/(|x|² + |x_last|·|x|), for which (I − β v vᵀ) x = ∓|x| e.
    """
    zero = splat(np.float32(0))
    total = zero
    for j in range(count):
        value = load(matrix, base + j * LANES)
        total = fma(value, value, total)
    last = load(matrix, base + (count - 1) * LANES)
    length = copysign(square_root(total), last)
    store(matrix, base + (count - 1) * LANES, last + length)
    divisor = fma(last, length, total)
    return total, where_less(splat(_SMALLEST), divisor, splat(np.float32(1)) / divisor, zero)


@kernel
def _tridiagonalise(a, size, diagonal, off_squared, w, y):
    """Reduce lower triangles a[i, j, l] from the last row up; row i keeps its reflection's v.

    With p = β A v and w = (β/2)(pᵀv) v − p the reflection is A ← A + v wᵀ + w vᵀ.
    """
    row = _row_length(size)
    zero = splat(np.float32(0))
    half = splat(np.float32(0.5))
    last = size - 1
    store(off_squared, 0, zero)
    store(diagonal, last * LANES, load(a, last * row + last * LANES))
    for j in range(size):
        store(w, j * LANES, zero)
    old = last * row  # where the previous v lies; with w = 0 the first update changes nothing
    for i in range(last, 0, -1):
        # Row i is up to date already; make its v, then update rows above and multiply them by v at once.
        v = i * row
        total, beta = _reflector(a, v, i)
        store(off_squared, i * LANES, total)
        for j in range(i):
            store(y, j * LANES, zero)
        r = 0
        while r + 1 < i:
            v0, v1 = load(a, v + r * LANES), load(a, v + (r + 1) * LANES)
            old0, old1 = load(a, old + r * LANES), load(a, old + (r + 1) * LANES)
            w0, w1 = load(w, r * LANES), load(w, (r + 1) * LANES)
            sum0, sum1 = zero, zero
            top, low = r * row, (r + 1) * row
            for j in range(0, r * LANES, LANES):
                old_j, w_j, v_j = load(a, old + j), load(w, j), load(a, v + j)
                t0 = fma(old0, w_j, fma(w0, old_j, load(a, top + j)))
                t1 = fma(old1, w_j, fma(w1, old_j, load(a, low + j)))
                store(a, top + j, t0)
                store(a, low + j, t1)
                sum0, sum1 = fma(t0, v_j, sum0), fma(t1, v_j, sum1)
                store(y, j, fma(t0, v0, fma(t1, v1, load(y, j))))
            j = r * LANES
            t0 = fma(old0, w0, fma(w0, old0, load(a, top + j)))
            t1 = fma(old1, w0, fma(w1, old0, load(a, low + j)))
            t2 = fma(old1, w1, fma(w1, old1, load(a, low + j + LANES)))
            store(a, top + j, t0)
            store(a, low + j, t1)
            store(a, low + j + LANES, t2)
            store(y, j, fma(t0, v0, fma(t1, v1, sum0)))
            store(y, j + LANES, fma(t1, v0, fma(t2, v1, sum1)))
            r += 2
        if r < i:
            v0, old0, w0 = load(a, v + r * LANES), load(a, old + r * LANES), load(w, r * LANES)
            sum0 = zero
            top = r * row
            for j in range(0, r * LANES, LANES):
                t0 = fma(old0, load(w, j), fma(w0, load(a, old + j), load(a, top + j)))
                store(a, top + j, t0)
                sum0 = fma(t0, load(a, v + j), sum0)
                store(y, j, fma(t0, v0, load(y, j)))
            j = r * LANES
            t0 = fma(old0, w0, fma(w0, old0, load(a, top + j)))
            store(a, top + j, t0)
            store(y, j, fma(t0, v0, sum0))
        projection = zero
        for j in range(0, i * LANES, LANES):
            scaled = load(y, j) * beta
            store(y, j, scaled)
            projection = fma(scaled, load(a, v + j), projection)
        projection = projection * beta * half
        for j in range(0, i * LANES, LANES):
            store(w, j, projection * load(a, v + j) - load(y, j))
        old = v
        # The next row must be up to date before its own v can be made; the sweep above skips it.
        above = (i - 1) * row
        v0, w0 = load(a, v + (i - 1) * LANES), load(w, (i - 1) * LANES)
        for j in range(0, i * LANES, LANES):
            store(a, above + j, fma(v0, load(w, j), fma(w0, load(a, v + j), load(a, above + j))))
        store(diagonal, (i - 1) * LANES, load(a, above + (i - 1) * LANES))


@kernel
def _pivot(shifted, off, previous):
    """Next pivot d − x − e²/q of the factorisation of T − xI."""
    return _not_zero(shifted - off / previous)


@kernel
def _not_zero(value):
    return where_less(magnitude(value), splat(_TINY), splat(-_TINY), value)


@kernel
def count_below(diagonal, off_squared, size, shift, counts):
    """counts[block] = eigenvalues below `shift`; returns their sum. One vector per group of 16 blocks."""
    x = splat(np.float32(shift))
    zero, one = splat(np.float32(0)), splat(np.float32(1))
    total = 0.0
    for group in range(counts.size // LANES):
        base = group * size * LANES
        pivot = _not_zero(load(diagonal, base) - x)
        found = where_less(pivot, zero, one, zero)
        for j in range(base + LANES, base + size * LANES, LANES):
            pivot = _pivot(load(diagonal, j) - x, load(off_squared, j), pivot)
            found = found + where_less(pivot, zero, one, zero)
        store(counts, group * LANES, found)
        for lane in range(LANES):
            total += counts[group * LANES + lane]
    return total


@kernel
def tail_start(diagonal, off_squared, size, tail_count):
    """Bracket the pooled eigenvalue that has `tail_count` above it, and list those above the bracket.

    Returns the bracket's ends, an upper bound of all eigenvalues, and for each one above the bracket its
    block and its rank within the block, counted from below. Lanes without a block must hold negative
    eigenvalues only, so that they are never above.
    """
    lanes = diagonal.size // size
    counts = np.empty(lanes, np.float32)
    bound = np.float32(0)
    for group in range(lanes // LANES):
        base = group * size * LANES
        for j in range(size):
            for lane in range(LANES):
                at = base + j * LANES + lane
                radius = np.float32(0)
                if j > 0:
                    radius += math.sqrt(off_squared[at])
                if j + 1 < size:
                    radius += math.sqrt(off_squared[at + LANES])
                bound = max(bound, diagonal[at] + radius)
    bound *= np.float32(1.0001)
    low, high = np.float32(0), bound
    everything = lanes * size
    while high - low > np.float32(TOLERANCE) * high:
        middle = np.float32(0.5) * (low + high)
        if not low < middle < high:
            break
        if everything - count_below(diagonal, off_squared, size, middle, counts) > tail_count:
            low = middle
        else:
            high = middle
    above = everything - int(count_below(diagonal, off_squared, size, high, counts)) if bound > 0 else 0
    if above == 0:
        counts[:] = size
    owner = np.empty(above, np.int64)
    rank = np.empty(above, np.float32)
    position = 0
    for block in range(lanes):
        for index in range(int(counts[block]), size):
            owner[position], rank[position] = block, index
            position += 1
    return low, high, bound, owner, rank


@kernel
def bisect(diagonal, off_squared, size, owner, rank, low, high, result):
    """result[n] = eigenvalue number rank[n] of block owner[n], all of them between low and high."""
    d = np.empty(size * PANEL, np.float32)
    e = np.empty(size * PANEL, np.float32)
    ranks = np.empty(PANEL, np.float32)
    lows = np.empty(PANEL, np.float32)
    highs = np.empty(PANEL, np.float32)
    zero, one, half = splat(np.float32(0)), splat(np.float32(1)), splat(np.float32(0.5))
    for first in range(0, owner.size, PANEL):
        count = min(PANEL, owner.size - first)
        for slot in range(PANEL):
            task = first + min(slot, count - 1)
            ranks[slot], lows[slot], highs[slot] = rank[task], low, high
            source = owner[task] // LANES * size * LANES + owner[task] % LANES
            for j in range(size):
                d[j * PANEL + slot] = diagonal[source + j * LANES]
                e[j * PANEL + slot] = off_squared[source + j * LANES]
        for _ in range(64):
            x0 = half * (load(lows, 0) + load(highs, 0))
            x1 = half * (load(lows, 16) + load(highs, 16))
            x2 = half * (load(lows, 32) + load(highs, 32))
            x3 = half * (load(lows, 48) + load(highs, 48))
            p0, p1 = _not_zero(load(d, 0) - x0), _not_zero(load(d, 16) - x1)
            p2, p3 = _not_zero(load(d, 32) - x2), _not_zero(load(d, 48) - x3)
            c0, c1 = where_less(p0, zero, one, zero), where_less(p1, zero, one, zero)
            c2, c3 = where_less(p2, zero, one, zero), where_less(p3, zero, one, zero)
            for j in range(PANEL, size * PANEL, PANEL):
                p0 = _pivot(load(d, j) - x0, load(e, j), p0)
                p1 = _pivot(load(d, j + 16) - x1, load(e, j + 16), p1)
                p2 = _pivot(load(d, j + 32) - x2, load(e, j + 32), p2)
                p3 = _pivot(load(d, j + 48) - x3, load(e, j + 48), p3)
                c0, c1 = c0 + where_less(p0, zero, one, zero), c1 + where_less(p1, zero, one, zero)
                c2, c3 = c2 + where_less(p2, zero, one, zero), c3 + where_less(p3, zero, one, zero)
            _narrow(lows, highs, ranks, 0, x0, c0)
            _narrow(lows, highs, ranks, 16, x1, c1)
            _narrow(lows, highs, ranks, 32, x2, c2)
            _narrow(lows, highs, ranks, 48, x3, c3)
            widest = np.float32(0)
            for slot in range(PANEL):
                widest = max(widest, (highs[slot] - lows[slot]) / highs[slot])
            if widest < np.float32(TOLERANCE):
                break
        for slot in range(count):
            result[first + slot] = np.float32(0.5) * (lows[slot] + highs[slot])


@kernel
def _narrow(lows, highs, ranks, at, x, below):
    """Keep the half of each interval that holds the eigenvalue of that rank."""
    wanted = load(ranks, at)
    store(lows, at, where_less(wanted, below, load(lows, at), x))
    store(highs, at, where_less(wanted, below, x, load(highs, at)))
