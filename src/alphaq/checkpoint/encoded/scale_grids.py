"""Which weights share a scale: told by the shape of what codes stand for and by that of their scales.

A tensor, an expert, a row, a group of a row's columns or a block may have a scale; of each, makers store some shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from alphaq.checkpoint.encoded.announced import COMPRESSED_TENSORS, MODELOPT, Announcement
from alphaq.checkpoint.encoded.encodings import MXFP4_COLUMNS
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import CheckpointError

Shape = tuple[int, ...]
Grid = tuple[tuple[int, int], Shape, Shape]
"""Rows and columns that share a scale; the shape of such scales on disk, and that in which to see them."""

NUMBERS = ("F32", "BF16", "F16")
EXPONENTS = ("U8", "F8_E8M0")
NVFP4_COLUMNS = 16


@dataclass(frozen=True)
class Form:
    """How codes are decoded, and the shape of what they stand for."""

    announcement: Announcement
    codes: TensorInfo
    scheme: str
    shape: Shape


def required_grid(form: Form, scales: TensorInfo) -> tuple[tuple[int, int], Shape]:
    """Rows and columns that share a scale, and the shape [..., rows, columns] in which to see the scales."""
    grids = list(_grids(form, scales))
    for block, stored, seen in grids:
        if scales.shape == stored:
            return block, seen
    raise misfit(form.codes, scales, (scales.dtype,), [stored for _, stored, _ in grids])


def _grids(form: Form, scales: TensorInfo) -> Iterator[Grid]:
    """Those that codes of a form may have."""
    *lead, rows, columns = form.shape
    announcement, fp8 = form.announcement, form.scheme == "fp8"
    for block in announcement.blocks if fp8 else ():  # the same tuple for all tensors, of which there are many
        height, width = block
        grid = (*lead, -(-rows // height), -(-columns // width))
        yield block, grid, grid
        if announcement.method == MODELOPT:  # which keeps the blocks' own sides
            yield block, (*grid[:-1], 1, grid[-1], 1), grid
    if form.scheme != "fp4" and not (fp8 and announcement.strict):
        yield from _whole_grids(tuple(lead), rows, columns)
    if not fp8 or scales.dtype in EXPONENTS or announcement.method == COMPRESSED_TENSORS:
        size = _group_size(columns, scales)
        if size and columns % size == 0:
            grid = (*lead, rows, columns // size)
            yield (1, size), grid, grid


def _whole_grids(lead: Shape, rows: int, columns: int) -> Iterator[Grid]:
    """A scale to each row, to each matrix or, where a stack holds columns before rows, to each column."""
    for stored in ((*lead, rows, 1), (*lead, rows)):
        yield (1, columns), stored, (*lead, rows, 1)
    for stored, seen in single(lead):
        yield (rows, columns), stored, seen
    if lead:
        yield (rows, 1), (*lead, 1, columns), (*lead, 1, columns)


def single(lead: Shape) -> Iterator[tuple[Shape, Shape]]:
    """The shapes of a number to each matrix, or of one to all of a stack; and those in which to see them."""
    for stored in ((*lead, 1, 1), *([(*lead, 1), lead] if lead else [])):
        yield stored, (*lead, 1, 1)
    for stored in ((), (1,)):
        yield stored, (1, 1)


def _group_size(columns: int, scales: TensorInfo) -> int:
    """Columns to a scale: fixed by the format, else what the number of scales makes of a row; 0 if nothing does."""
    if scales.dtype == "F8_E4M3":
        return NVFP4_COLUMNS
    if scales.dtype in EXPONENTS:
        return MXFP4_COLUMNS
    groups = scales.shape[-1] if scales.shape else 0
    return columns // groups if groups and columns % groups == 0 else 0


def misfit(codes: TensorInfo, helper: TensorInfo, dtypes: Sequence[str], shapes: Sequence[Shape]) -> CheckpointError:
    """The error for what helps to decode codes but has another dtype or shape than they need."""
    wanted, forms = " or ".join(dtypes), " or ".join(dict.fromkeys(str(list(shape)) for shape in shapes))
    return CheckpointError(
        f"{helper.name} is {helper.dtype} {list(helper.shape)}, but {codes.name} of shape {list(codes.shape)} needs "
        f"{wanted}{' ' if forms else ''}{forms}. Download the checkpoint again or correct config.json."
    )
