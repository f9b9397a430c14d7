"""Which rows of a model are read where only a share of its bytes may be: runs of rows that lie together, spread evenly.

Matrices that do the same in a layer are a stack: one projection of its experts, or a matrix of its own. Of a stack's
weights relative errors differ little, so a few runs stand for all of it. Each is long enough for a request to a store
to be worth its while, and drawn by a seed that is the stack's name. Where disk has the columns of a matrix, no rows can
be read alone, and it is read whole.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from alphaq.checkpoint.encoded.reading import rows_as_stored
from alphaq.checkpoint.ranges import Range, missing, ranges_of, ranges_of_tensor
from alphaq.checkpoint.reader import Checkpoint
from alphaq.nouns.matrix import MatrixRef, Role

RUN_BYTES = 1 << 17  # of one request, where a stack's share is as much
FEWEST_RUNS, MOST_RUNS = 4, 64
FEWEST_ROWS = 8  # of a stack
WHOLE = (Role.ROUTER, Role.NORM)  # what is read in full


def stack_of(matrix: MatrixRef) -> str:
    """The name of the stack that a matrix belongs to: its own, or one for a projection of a layer's experts."""
    if matrix.expert is None:
        return matrix.name
    return f"{matrix.role.value} {matrix.layer} {matrix.projection}"


@dataclass(frozen=True)
class Extent:
    """Bytes that are read of rows, of what is read in full, and of headers; of all matrices that rows are drawn of; and
    those that are still to be fetched from a store. ranges: how many requests the first two take."""

    rows: int
    whole: int
    headers: int
    matrices: int
    ranges: int
    missing: int


@dataclass(frozen=True)
class RowSample:
    """Runs of rows by stack, each as a matrix of its own. whole: tensors that are read in full."""

    checkpoint: Checkpoint
    runs: Mapping[str, Sequence[MatrixRef]]
    whole: Sequence[str]

    @property
    def matrices(self) -> list[MatrixRef]:
        """All runs."""
        return [run for runs in self.runs.values() for run in runs]

    @cached_property
    def row_ranges(self) -> list[Range]:
        """What is read for the runs, each range once."""
        return list(dict.fromkeys(one for run in self.matrices for one in ranges_of(self.checkpoint, run)))

    @cached_property
    def whole_ranges(self) -> list[Range]:
        """What is read in full."""
        return [one for name in self.whole for one in ranges_of_tensor(self.checkpoint, name)]

    @property
    def extent(self) -> Extent:
        """What is read, in bytes."""
        checkpoint, every = self.checkpoint, [*self.row_ranges, *self.whole_ranges]
        matrices = sum(checkpoint.stored_bytes(one) for one in checkpoint.matrices if one.role not in WHOLE)
        headers = (min(one.begin for one in tensors.values()) for tensors in checkpoint.shards.values() if tensors)
        return Extent(
            rows=_total(self.row_ranges),
            whole=_total(self.whole_ranges),
            headers=sum(headers),
            matrices=matrices,
            ranges=len(every),
            missing=_total(missing(checkpoint, every)),
        )


def _total(ranges: Sequence[Range]) -> int:
    return sum(one.nbytes for one in ranges)


def draw_rows(checkpoint: Checkpoint, share: float) -> RowSample:
    """Runs that take this share of the bytes of all matrices, or what a few rows of each stack take if that is more."""
    stacks: dict[str, list[MatrixRef]] = {}
    for matrix in checkpoint.matrices:
        if matrix.role not in WHOLE:
            stacks.setdefault(stack_of(matrix), []).append(matrix)
    sizes = {name: sum(map(checkpoint.stored_bytes, members)) for name, members in stacks.items()}
    least = {name: FEWEST_ROWS * _row_bytes(checkpoint, members[0]) for name, members in stacks.items()}
    allowed = _shared_out(sizes, least, share * sum(sizes.values()))
    runs = {name: _runs(checkpoint, name, members, allowed[name]) for name, members in stacks.items()}
    return RowSample(checkpoint, runs, [name for name in checkpoint.roles if _in_full(checkpoint, name)])


def _in_full(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is a router's or a norm's: the biases of those go with their weights."""
    weight = f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name
    return checkpoint.roles[name] in WHOLE or checkpoint.roles.get(weight) in WHOLE


def _row_bytes(checkpoint: Checkpoint, matrix: MatrixRef) -> float:
    """Bytes that a row takes, with those of another matrix that lie between."""
    return checkpoint.stored_bytes(matrix) / matrix.shape[0] * matrix.row_step


def _shared_out(sizes: Mapping[str, int], least: Mapping[str, float], total: float) -> dict[str, float]:
    """Bytes for each stack, in proportion to its size, but not less than the least: of what that leaves, so much the
    less for the others."""
    at_least: set[str] = set()
    while True:
        left = total - sum(least[name] for name in at_least)
        rest = sum(size for name, size in sizes.items() if name not in at_least)
        scale = max(0.0, left / rest) if rest else 0.0
        short = {name for name, size in sizes.items() if name not in at_least and scale * size < least[name]}
        if not short:
            return {name: least[name] if name in at_least else scale * size for name, size in sizes.items()}
        at_least |= short


def _runs(checkpoint: Checkpoint, stack: str, members: Sequence[MatrixRef], nbytes: float) -> list[MatrixRef]:
    """Runs of one stack that take about so many bytes, of as many of its matrices as there are runs."""
    first = members[0]
    sliceable = rows_as_stored(checkpoint.info(first.tensor), first) and not _decoded_whole(checkpoint, first)
    # Of columns a slice is read whole, for all that lie in it: those are drawn together.
    seed = stack if sliceable or first.index is None else first.tensor
    draw = random.Random(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little"))
    shuffled = draw.sample(members, len(members))
    if not sliceable:
        return shuffled[: max(1, math.floor(nbytes / checkpoint.stored_bytes(first)))]
    row_bytes = _row_bytes(checkpoint, first)
    rows = max(1, math.floor(nbytes / row_bytes))
    count = min(max(round(nbytes / RUN_BYTES), FEWEST_RUNS), MOST_RUNS, rows)
    length = min(rows // count, first.shape[0])
    free = {matrix.name: draw.sample(range(matrix.shape[0] // length), matrix.shape[0] // length) for matrix in members}
    runs: list[MatrixRef] = []
    while len(runs) < rows // length and any(free.values()):
        for matrix in shuffled:
            if free[matrix.name] and len(runs) < rows // length:
                runs.append(_run(matrix, length * free[matrix.name].pop(), length))
    return runs


def _decoded_whole(checkpoint: Checkpoint, matrix: MatrixRef) -> bool:
    encoding = checkpoint.info(matrix.tensor).encoding
    return encoding is not None and encoding.decoder is not None


def _run(matrix: MatrixRef, start: int, count: int) -> MatrixRef:
    """Rows [start, start + count) of a matrix as one of its own."""
    return replace(
        matrix,
        name=f"{matrix.name}[{start}:{start + count}]",
        shape=(count, matrix.shape[1]),
        row_start=matrix.row_start + start * matrix.row_step,
    )
