"""Passes over the rows of a step: what later rows need not do again."""

from __future__ import annotations

import numpy as np

from alphaq.runtime import row_kernels as places

ITEM_BYTES = {places.FLOAT32: 4, places.BFLOAT16: 2, places.FLOAT16: 2, places.INT64: 8, places.BOOL: 1}


def share_inputs(rows: np.ndarray) -> None:
    """Mark packed products of what the one before multiplied, if nothing was written there since."""
    known: tuple[int, ...] = ()
    for row in rows:
        if row[places.OP] == places.PACKED:
            tokens, columns = row[places.OWN : places.OWN + 2].tolist()
            address, kind = row[places.TENSORS + places.TENSOR :][:2].tolist()
            inputs = (address, address + tokens * columns * ITEM_BYTES[kind], tokens, columns)
            row[places.PREPARED] = inputs == known
            known = inputs
        if known and any(begin < known[1] and known[0] < end for begin, end in written(row)):
            known = ()


def written(row: np.ndarray) -> list[tuple[int, int]]:
    """First and last address of what a row writes to but caches; of what torch runs, all there are."""
    if row[places.OP] in (places.OUTSIDE, places.ATTEND):
        return [(0, 1 << 63)]
    if row[places.OP] == places.APPEND:
        return []
    return [_range(row, tensor) for tensor in ((0, 2) if row[places.OP] == places.TOP else (0,))]


def _range(row: np.ndarray, tensor: int) -> tuple[int, int]:
    at = places.TENSORS + places.TENSOR * tensor
    address, kind, *strides = row[at : at + places.TENSOR].tolist()
    last = sum(
        (size - 1) * step for size, step in zip(row[places.EXTENTS : places.TENSORS].tolist(), strides, strict=True)
    )
    return address, address + (last + 1) * ITEM_BYTES[kind]
