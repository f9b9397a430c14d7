"""Products with matrices that stay on disk: read when they are multiplied with, again for the gradient, never held.

What is read shares memory, and so do float32 copies of one shape: fresh memory costs four times what reading costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alphaq.checkpoint.reader import Checkpoint
from alphaq.nouns.matrix import MatrixRef

BLOCK_WEIGHTS = 1 << 22  # of a large matrix that are read at once: 16 MB in float32
Blocks = Callable[[], Iterable[Tensor]]
"""A matrix from its first row to its last, float32 [some rows, columns]; each block lasts until the next."""


class Room:
    """Where matrices are read to and put in float32. A copy lasts until the next one of its shape."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._buffers: dict[torch.Size, Tensor] = {}
        self._memory: dict[int, Tensor] = {}

    def read(self, matrix: MatrixRef) -> Tensor:
        """A whole matrix, float32 [rows, columns]."""
        return self.copied(self.stored(matrix))

    def stored(self, matrix: MatrixRef, place: int = 0) -> Tensor:
        """A whole matrix in its own dtype. It lasts until the next that is read to the same place."""
        return self.checkpoint.read(matrix, self._memory_at(place, matrix, 1.0))

    def _memory_at(self, place: int, matrix: MatrixRef, share: float) -> Tensor:
        """Memory for a matrix, or for a share of it."""
        nbytes = math.ceil(self.checkpoint.place(matrix)[1] * share)
        if place not in self._memory or len(self._memory[place]) < nbytes:
            self._memory[place] = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory[place]

    def blocks(self, matrix: MatrixRef) -> Iterator[Tensor]:
        """A matrix a few rows at a time."""
        rows, columns = matrix.shape
        step = max(1, BLOCK_WEIGHTS // columns)
        memory = self._memory_at(0, matrix, min(1.0, step / rows))
        for first in range(0, rows, step):
            yield self.copied(self.checkpoint.read_rows(matrix, slice(first, min(first + step, rows)), memory))

    def copied(self, values: Tensor) -> Tensor:
        """What was read, in float32."""
        if values.shape not in self._buffers:
            self._buffers[values.shape] = torch.empty(values.shape)
        return self._buffers[values.shape].copy_(values)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, rows: int, blocks: Blocks) -> Tensor:
        ctx.blocks, first = blocks, 0
        found = inputs.new_empty(*inputs.shape[:-1], rows)
        for block in blocks():
            found[..., first : first + len(block)] = inputs @ block.T
            first += len(block)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        found, first = gradient.new_zeros(()), 0
        for block in ctx.blocks():
            found = found + gradient[..., first : first + len(block)] @ block
            first += len(block)
        return found, None, None


def product(inputs: Tensor, rows: int, blocks: Blocks) -> Tensor:
    """inputs @ matrix.T, float32 [..., rows], of inputs [..., columns]."""
    result: Tensor = _Product.apply(inputs, rows, blocks)
    return result


def look_up_rows(embedding: Any, checkpoint: Checkpoint, matrix: MatrixRef) -> None:
    """Have an embedding read the rows that it is asked for, and no others, each time that it runs."""
    forward = embedding.forward

    def run(ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        numbers, places = ids.unique(return_inverse=True)
        rows = [checkpoint.read_rows(matrix, slice(one, one + 1)) for one in numbers.tolist()]
        weight, padding = embedding.weight, embedding.padding_idx
        embedding.weight, embedding.padding_idx = nn.Parameter(torch.cat(rows).float(), False), None
        try:
            return forward(places, *args, **kwargs)
        finally:
            embedding.weight, embedding.padding_idx = weight, padding

    embedding.forward = run
