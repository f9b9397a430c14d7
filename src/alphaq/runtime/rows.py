"""Recorded operations as rows for `step_kernels`; what has none there is left to torch, on the same memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from alphaq.runtime import row_kernels as kernels
from alphaq.runtime.recording import Call

KINDS = {
    torch.float32: kernels.FLOAT32,
    torch.bfloat16: kernels.BFLOAT16,
    torch.float16: kernels.FLOAT16,
    torch.int64: kernels.INT64,
    torch.bool: kernels.BOOL,
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
AXES = 4


class NotHere(Exception):
    """An operation has no row of this kind."""


@dataclass(frozen=True)
class Outside:
    """A row that torch runs, or may run. slots: of the keys and values that it is given instead of those recorded."""

    call: Call
    slots: tuple[int, ...] = ()

    def run(self, caches: Sequence[Tensor]) -> None:
        """Its result to where it is looked for."""
        args = self.call.args
        if self.slots:
            args = (args[0], *(caches[slot] for slot in self.slots), *args[3:])
        found = self.call.function(*args, **self.call.kwargs)
        if not self.call.changed:
            for target, one in zip(self.call.outputs, tree_leaves(found), strict=True):
                target.copy_(one)


class Rows:
    """Rows in the making."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.numbers: list[list[float]] = []
        self.outside: dict[int, Outside] = {}
        self.kept: list[Any] = []
        """What only addresses refer to."""
        self.packed_kinds: set[torch.dtype] = set()

    def add(
        self,
        operation: int,
        tensors: Sequence[Tensor | None],
        own: Sequence[int] = (),
        numbers: Sequence[float] = (),
    ) -> None:
        """A row; tensors: the result and operands, which are broadcast to its shape."""
        target = tensors[0]
        assert target is not None  # the result
        wide = [None if one is None else one.expand(target.shape) for one in tensors]
        sizes, strides = _merged(wide)
        row = np.zeros(kernels.ROW, np.int64)
        row[kernels.OP] = operation
        row[kernels.EXTENTS : kernels.TENSORS] = sizes
        for number, (tensor, steps) in enumerate(zip(wide, strides, strict=True)):
            if tensor is not None:
                at = kernels.TENSORS + kernels.TENSOR * number
                row[at : at + kernels.TENSOR] = [tensor.data_ptr(), kind_of(tensor), *steps]
        row[kernels.OWN : kernels.OWN + len(own)] = own
        self.rows.append(row)
        self.numbers.append([*numbers, *([0.0] * (4 - len(numbers)))])
        self.kept += [one for one in tensors if one is not None]

    def leave(self, call: Call, slots: tuple[int, ...] = ()) -> None:
        """A row that stops, for an operation of torch's."""
        self.may_stop(call, slots)
        self.rows.append(np.zeros(kernels.ROW, np.int64))
        self.numbers.append([0.0] * 4)

    def may_stop(self, call: Call, slots: tuple[int, ...] = ()) -> None:
        """Let torch run the next row where the interpreter does not."""
        if slots:  # what was recorded of keys and values need not be kept
            call = Call(call.function, (call.args[0], None, None, *call.args[3:]), call.kwargs, call.result)
        self.outside[len(self.rows)] = Outside(call, slots)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n, ROW] and float64 [n, 4]."""
        return np.stack(self.rows), np.array(self.numbers)


def kind_of(tensor: Tensor) -> int:
    if tensor.dtype not in KINDS:
        raise NotHere
    return KINDS[tensor.dtype]


def _merged(tensors: Sequence[Tensor | None]) -> tuple[list[int], list[list[int]]]:
    """Four extents and the strides of each tensor; axes that lie one behind the other in all of them are one."""
    shape = next(one for one in tensors if one is not None).shape
    axes = [
        (size, [0 if one is None else one.stride(axis) for one in tensors])
        for axis, size in enumerate(shape)
        if size != 1
    ]
    merged: list[tuple[int, list[int]]] = []
    for size, steps in axes:
        if merged and all(before == size * step for before, step in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = merged[-1][0] * size, steps
        else:
            merged.append((size, steps))
    if len(merged) > AXES:
        raise NotHere
    merged = [(1, [0] * len(tensors))] * (AXES - len(merged)) + merged
    return [size for size, _ in merged], [[steps[at] for _, steps in merged] for at in range(len(tensors))]
