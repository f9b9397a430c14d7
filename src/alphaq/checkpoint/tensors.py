"""Where a tensor lies in a checkpoint, and how its values are stored there.

Half a million of them are held at once, so they have slots, and what is alike is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes [begin, end) of its file, header included in the count.

    With an encoding, name, dtype and shape are those of the decoded tensor; the bytes are its codes'.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    encoding: Encoding | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor that helps to decode another: scales, or zero points. Each of its rows serves `height` rows."""

    info: TensorInfo
    shard: str
    height: int

    def rows(self, start: int, stop: int) -> tuple[int, int]:
        """Its first row, and the row after its last, that rows [start, stop) of codes need."""
        return start // self.height, -(-stop // self.height)

    def slice_of(self, index: int) -> int:
        """Which of its slices serves a slice of the codes: the only one, or that slice's own."""
        return index if stored_grid(self.info)[0] > 1 else 0


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a tensor's values are stored.

    scheme: plain, fp8, mxfp4, fp4, int8, packed2, packed4, packed8, a quantized type of ggml such as Q8_0, or the name
    of a format whose `decoder` says all. block: rows and columns of a stored matrix that share a scale. scales: where
    these lie, one to a block, None if they are among the codes. head_rows: rows of an attention head whose halves lie
    on disk row by row in turns, as llama.cpp's rotary embedding pairs them; 0 if rows are in order.
    """

    scheme: str
    block: tuple[int, int]
    scales: Part | None = None
    head_rows: int = 0
    decoder: Callable[[Tensor, str], Tensor] | None = None
    """Gives the values of a whole tensor from its bytes and name, where a format of this package's own is read."""
    factor: Part | None = None
    """One number that all scales are multiplied by."""
    divisor: Part | None = None
    """One number that all scales are divided by."""
    zero_points: Part | None = None
    """Int32 words of packed codes along the rows, or one number to a block."""
    columns: int = 0
    """Of a matrix whose codes may not fill a row's last word; 0 where they always do."""
    turned: bool = False
    """Whether disk holds rows and columns in the other order than the decoded tensor."""
    label: str = ""
    """What users call it, where that is not the scheme's name."""
    kept: tuple[int, ...] = ()
    """Of a tensor [slices, rows, columns] the numbers, on disk, of those that it has; all where empty."""

    @property
    def parts(self) -> Iterator[tuple[str, Part]]:
        """What has to be read besides the codes, by this record's name for it."""
        for name in ("scales", "factor", "divisor", "zero_points"):
            if (part := getattr(self, name)) is not None:
                yield name, part


def stored_grid(info: TensorInfo) -> tuple[int, int, int]:
    """Slices, rows and columns of a tensor [..., rows, columns] as they lie on disk."""
    *slices, rows, columns = (1, 1, *info.shape)
    if info.encoding is not None and info.encoding.turned:
        rows, columns = columns, rows
    return math.prod(slices), rows, columns


def rows_place(info: TensorInfo, index: int, start: int, stop: int) -> tuple[int, int]:
    """First byte in its file, and number of bytes, of rows [start, stop) of one slice as they lie on disk."""
    slices, rows, _ = stored_grid(info)
    index = info.encoding.kept[index] if info.encoding is not None and info.encoding.kept else index
    row_bytes = info.nbytes // (slices * rows)
    return info.begin + (index * rows + start) * row_bytes, (stop - start) * row_bytes


def with_slices(info: TensorInfo, kept: tuple[int, ...]) -> TensorInfo:
    """A tensor [slices, …] that has only some of its slices, in this order. Its bytes count those alone."""
    nbytes = info.nbytes // info.shape[0] * len(kept)
    cut = replace(info, shape=(len(kept), *info.shape[1:]), end=info.begin + nbytes)
    encoding = info.encoding or Encoding("plain", (1, 1))

    def of_part(part: Part | None) -> Part | None:
        alone = part is None or stored_grid(part.info)[0] == 1
        return part if alone or part is None else replace(part, info=with_slices(part.info, kept))

    return replace(
        cut,
        encoding=replace(
            encoding,
            kept=kept,
            scales=of_part(encoding.scales),
            factor=of_part(encoding.factor),
            divisor=of_part(encoding.divisor),
            zero_points=of_part(encoding.zero_points),
        ),
    )


def stored_dtype(info: TensorInfo) -> str:
    """What the values are stored as: a dtype's name, or F8_E4M3, MXFP4, NVFP4, INT4, Q8_0."""
    if info.encoding is None or info.encoding.scheme == "plain":
        return info.dtype
    return info.encoding.label or info.encoding.scheme


def bytes_on_disk(info: TensorInfo) -> int:
    """Bytes of a tensor's data and of its scales."""
    parts = info.encoding.parts if info.encoding is not None else ()
    return info.nbytes + sum(part.info.nbytes for _, part in parts)
