"""A recorded step as a program: rows that are run again and again on the same memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alphaq.runtime import row_kernels as places
from alphaq.runtime import step_kernels as kernels
from alphaq.runtime.recording import NotRecorded, Step
from alphaq.runtime.row_forms import append, take
from alphaq.runtime.rows import Rows
from alphaq.runtime.sharing import share_inputs
from alphaq.runtime.threads import parallel
from alphaq.simd.vectors import flat

LEAST = 1024  # numbers of a line


def room_of(rows: np.ndarray) -> tuple[int, int, int, int]:
    """The longest line that rows ask for; the most columns, tokens and results of their packed products."""
    operations, own = rows[:, places.OP], rows[:, places.OWN :]
    packed = own[operations == places.PACKED]
    lines = [
        rows[operations != places.PACKED, places.EXTENTS + 3],
        own[np.isin(operations, (places.SUM, places.MEAN)), 0],
        own[operations == places.DENSE, 1],
        own[operations == places.ATTEND, 4:6].ravel(),
    ]
    columns, tokens, results = packed[:, 1], packed[:, 0], packed[:, 3] * packed[:, 5] * packed[:, 8]
    line, *most = (int(one.max(initial=1)) for one in (np.concatenate(lines), columns, tokens, results))
    return max(line, LEAST), most[0], most[1], most[2]


class Program:
    """A step that can be run again and again: token and position in, logits out, keys and values in slots.

    slots: int64 [2 · layers, 2], where each layer's keys and values are, [heads, room, width], and their room.
    """

    def __init__(self, step: Step) -> None:
        rows = Rows()
        for place, call in enumerate(step.calls):
            if place in step.appended:
                append(rows, call, step.appended[place])
            else:
                take(rows, call, step.attended.get(place, ()))
        self.outside, self.kept = rows.outside, rows.kept
        self.rows, self.numbers = rows.arrays()
        share_inputs(self.rows)
        self.token, self.position = step.inputs
        self.logits = step.logits
        if len(rows.packed_kinds) != 1:
            raise NotRecorded("packed products have inputs of several types, or there are none")
        (kind,) = rows.packed_kinds
        self.sample = flat(torch.empty(0, dtype=kind))
        self.room = room_of(self.rows)
        self.memory = np.zeros(kernels.memory_bytes(self.room), np.uint8)
        self.forms = [_form(one) for one in step.caches]
        self.slots = np.zeros((len(step.caches), 2), np.int64)

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether keys and values are such as were recorded."""
        return [_form(one) for one in tensors] == self.forms

    def keep(self, tensors: Sequence[Tensor]) -> None:
        """Where keys and values are from now on, [1, heads, room, width] each."""
        self.slots[:] = [(one.data_ptr(), one.shape[2]) for one in tensors]

    def run(self, token: Tensor, position: Tensor | None, length: int, caches: Sequence[Tensor]) -> Tensor:
        """Logits [1, 1, words] of a token after so many, at their number or another position.

        caches: of each slot, [1, heads, length + 1, width], for what torch does.
        """
        at = 0
        with torch.inference_mode():
            self.token.copy_(token)
            self.position.fill_(length) if position is None else self.position.copy_(position)
            while True:
                at = kernels.run(
                    self.rows, self.numbers, self.slots, length, at, self.room, self.memory, self.sample, *parallel()
                )
                if at == len(self.rows):
                    break
                self.outside[at].run(caches)
                at += 1
        return self.logits.detach().clone()


def _form(tensor: Tensor) -> tuple[object, ...]:
    """What of keys or values is the same at every length."""
    return tensor.dtype, tensor.shape[1], tensor.shape[3]
