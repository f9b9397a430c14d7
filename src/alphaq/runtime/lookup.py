"""Rows of a packed matrix, restored one by one: what an embedding needs, whose table is never restored as a whole.

A row's codes lie together, so that looking up a token reads one row of them, and of each group a scale and a zero
point: ŵ = (q − z)·s, or mean ± s for 1 bit, to the bit what `formats.blocks.dequantize` gives. Of a trellis any weight
is told by the bits before it. These are torch's own operations: they run on every device, and compilers see through
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alphaq.formats.blocks import native_format
from alphaq.formats.native import HEADER_BYTES
from alphaq.formats.packing import MIDDLE, UNUSED
from alphaq.formats.salient import most_of
from alphaq.formats.slim import Slim
from alphaq.formats.trellis import STATE_BITS, UNIT, state_levels
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Shape


@dataclass(frozen=True)
class BlockForm:
    """Where things are in a block and what they stand for, so that compilers need to ask no format.

    sizes: bytes of header, codes, offsets, scales and the extra part. halves: whether levels are odd halves of a step.
    differing: whether groups differ in their bits. salient: weights of a group that may have 8 bits. quarters: of a
    bit that a trellis takes for a weight; 0 of other codes.
    """

    choice: Choice
    shape: Shape
    sizes: tuple[int, ...]
    means: bool
    halves: bool
    differing: bool
    salient: int
    quarters: int

    @classmethod
    def of(cls, choice: Choice, shape: Shape) -> BlockForm:
        """By the choice's format. Raises ChoiceError if it has no blocks."""
        form = native_format(choice)
        sizes = (HEADER_BYTES, *form.parts(choice, shape))
        differing, salient = isinstance(form, Slim), most_of(choice)
        return cls(choice, shape, sizes, form.means, form.halves, differing, salient, form.quarters(choice))


def restored_rows(block: Tensor, form: BlockForm, rows: Tensor) -> Tensor:
    """Some rows of a matrix, float32 [n, columns]; rows: int64 [n].

    block: uint8, as `formats.blocks.encode` makes it. Raises IndexError for a row that the matrix does not have.
    """
    choice, (count, columns) = form.choice, form.shape
    _, codes, offsets, scales, extra = block[: sum(form.sizes)].split(form.sizes)
    if form.quarters:
        step = _spread(_halves(_of(rows, scales, count)) * UNIT, choice, columns)
        return _decoded(_of(rows, codes, count), form.quarters, columns) * step
    bits = torch.full((choice.groups(columns),), choice.bits, device=block.device)
    widths = extra.long() if form.differing else bits
    step = _halves(_of(rows, scales, count))
    mean, zero = torch.zeros_like(step), 2.0 ** (widths - 1).float() - 0.5 * form.halves
    if not choice.symmetric:
        if form.means:
            mean = _halves(_of(rows, offsets, count))
        else:
            zero = _zero_points(offsets, widths, form, rows)
    one = widths == 1
    start, step, zero = torch.where(one, mean - step, 0), torch.where(one, 2 * step, step), torch.where(one, 0, zero)
    each = _spread(widths, choice, columns)
    found = _unpacked(_of(rows, codes, count), each)
    values = (found - _spread(zero, choice, columns)) * _spread(step, choice, columns) + _spread(start, choice, columns)
    return _with_salient(values, extra, form, rows) if form.salient else values


def _decoded(packed: Tensor, quarters: int, columns: int) -> Tensor:
    """Levels that packed rows of a trellis stand for: uint8 [n, bytes] → float32 [n, columns]."""
    padded = torch.nn.functional.pad(packed, (-(-STATE_BITS // 8), 2)).int()  # nothing lies before a row
    ends = torch.arange(1, columns + 1, device=packed.device) * quarters // 4
    starts = ends + (-STATE_BITS % 8)
    first = starts >> 3
    found = sum(padded.index_select(1, first + byte) << 8 * byte for byte in range(3))
    states = (found >> (starts & 7).int() & 2**STATE_BITS - 1).long()
    return torch.tensor(state_levels().tolist(), dtype=torch.float32, device=packed.device)[states]


def _of(rows: Tensor, part: Tensor, count: int) -> Tensor:
    """Some rows of a part of a block that holds as many bytes of each, uint8 [n, bytes]."""
    return part.view(count, -1).index_select(0, rows)


def _halves(raw: Tensor) -> Tensor:
    """Bytes of float16, as float32."""
    return raw.contiguous().view(torch.float16).float()


def _spread(by_group: Tensor, choice: Choice, columns: int) -> Tensor:
    """[…, groups] → […, columns]."""
    # A group may be wider than the matrix: 65,535 columns of a trellis.
    return by_group.repeat_interleave(min(choice.group_size, columns), dim=-1)[..., :columns]


def _unpacked(packed: Tensor, widths: Tensor) -> Tensor:
    """Codes of packed rows, one after the other: uint8 [n, bytes] → float32 [n, columns]; widths: [columns]."""
    starts = widths.cumsum(0) - widths
    first = starts >> 3
    second = (first + 1).clamp(max=packed.shape[1] - 1)
    return _field(packed.index_select(1, first), packed.index_select(1, second), starts, widths)


def _zero_points(packed: Tensor, widths: Tensor, form: BlockForm, rows: Tensor) -> Tensor:
    """Zero points of some rows, float32 [n, groups]: a group has those of all rows, one after the other."""
    count = form.shape[0]
    words = widths * -(-count // 32) if form.differing else -(-widths * count // 32)
    starts = 32 * (words.cumsum(0) - words) + rows[:, None] * widths
    first = starts >> 3
    return _field(packed[first], packed[(first + 1).clamp(max=len(packed) - 1)], starts, widths)


def _field(low: Tensor, high: Tensor, starts: Tensor, widths: Tensor) -> Tensor:
    """Numbers of up to 8 bits, float32, from the byte where each begins and the next; starts: their first bits."""
    both = low.int() | high.int() << 8
    return (both >> (starts & 7).int() & ((1 << widths) - 1).int()).float()


def _with_salient(values: Tensor, extra: Tensor, form: BlockForm, rows: Tensor) -> Tensor:
    """Rows with their weights of 8 bits, wide·(value − 128), in their places."""
    (count, columns), most = form.shape, form.salient
    groups = form.choice.groups(columns)
    sizes = (2 * count * groups, count * groups * most, count * groups * most)
    wide, positions, stored = (_of(rows, part, count) for part in extra.split(sizes))
    inner = positions.view(-1, groups, most).long()
    own = (stored.view(-1, groups, most).float() - MIDDLE) * _halves(wide)[..., None]
    begins = torch.arange(groups, device=rows.device)[:, None] * form.choice.group_size
    places = torch.where(inner == UNUSED, columns, begins + inner)  # what is unused goes to one column more
    room = torch.cat([values, values.new_empty(len(values), 1)], dim=1)
    return room.scatter(1, places.view(-1, groups * most), own.view(-1, groups * most))[:, :columns]
