"""Round whole rows to one step, straight into packed codes."""

from __future__ import annotations

import numpy as np

from alphaq.formats.kernels import pack_group
from alphaq.quantizers.kernels import _read
from alphaq.simd.vectors import LANES, fma, kernel, lane_sum, load, maximum, minimum, nearest, splat, store_bytes

_AT_ONCE = 128


@kernel
def round_rows(weight, columns, bits, step, packed):
    """Codes of whole rows on the grid step·(q − 2^(bits − 1)); returns Σ w·l and Σ l² of the levels l, in float64.

    weight: flat float32, float16 or bfloat16 bits. step: float32 above 0. packed: uint8 [rows · bytes per row], zeroed.
    """
    rows = weight.size // columns
    row_bytes = 4 * -(-columns * bits // 32)
    values = np.empty(_AT_ONCE + LANES, np.float32)
    codes = np.empty(_AT_ONCE + LANES, np.uint8)
    eights = codes.view(np.uint64)
    middle = np.float32(2 ** (bits - 1))
    shift, bottom, ceiling = splat(middle), splat(-middle), splat(middle - np.float32(1))
    inverse, none = splat(np.float32(1) / step), splat(np.float32(0))
    products, squares = 0.0, 0.0
    for row in range(rows):
        for begin in range(0, columns, _AT_ONCE):
            count = min(_AT_ONCE, columns - begin)
            _read(weight, row * columns + begin, count, values, none, none)
            product, square = none, none
            for at in range(0, count, LANES):
                value = load(values, at)
                level = minimum(maximum(nearest(value * inverse), bottom), ceiling)
                product = fma(value, level, product)
                square = fma(level, level, square)
                store_bytes(codes, at, level + shift)
            products += lane_sum(product)
            squares += lane_sum(square)
            pack_group(codes, eights, count, bits, packed, row * row_bytes + begin * bits // 8, (row + 1) * row_bytes)
    return products, squares
