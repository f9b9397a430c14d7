"""Quantize while tokens pass through the model: each matrix is rounded for the inputs that it will get.

What is rounded takes the place of the original at once, so the inputs of later matrices are those of the quantized
model. Peak memory is that of the pass (calibration/stream.py), the moments of one matrix's inputs, and its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from torch import Tensor

from alphaq.calibration.inputs import Inputs, stream_inputs
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import CheckpointError, PassError
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.base import rounded_by_inputs
from alphaq.writing.rounding import Rounding
from alphaq.writing.storing import StoreTask, Written, read_back, store

DOUBT = 0.2  # of the mean diagonal, where there are as many tokens as columns (docs/research/log.md)
Keep = Callable[[StoreTask, Written], None]


def store_by_inputs(
    checkpoint: Checkpoint, tasks: Sequence[StoreTask], rounding: Rounding, keep: Keep
) -> dict[str, str]:
    """Make the entries whose inputs are seen when the rounding's text passes; `keep` gets what was written of each.

    Returns matrices that were seen but quantized without their inputs, and why. Raises what `stream_inputs` does.
    """
    assert rounding.inputs is not None  # a text goes with a quantizer that looks at inputs
    visitor = _Visitor(checkpoint, tasks, rounding, keep)
    try:
        stream_inputs(checkpoint, rounding.inputs.windows(checkpoint), visitor.visit)
    except CheckpointError as error:
        why = error.reason if isinstance(error, PassError) else error
        raise CheckpointError(
            f"{why} Quantizer {rounding.name} needs that; --quantizer {rounding.plain} does not."
        ) from error
    return visitor.unseen


class _Visitor:
    """Rounds and stores what a pass shows. unseen: what was rounded without inputs, and why."""

    def __init__(self, checkpoint: Checkpoint, tasks: Sequence[StoreTask], rounding: Rounding, keep: Keep) -> None:
        self.checkpoint, self.rounding, self.keep = checkpoint, rounding, keep
        self.tasks = {task.entry.source.name: task for task in tasks if isinstance(task.entry.source, MatrixRef)}
        self.unseen: dict[str, str] = {}

    def visit(self, inputs: Inputs) -> list[Tensor]:
        """What the model goes on with instead of the matrices, float32 [rows, columns] each."""
        rounder = _Rounder(inputs, self.rounding)
        return [self._round(matrix, rounder) for matrix in inputs.matrices]

    def _round(self, matrix: MatrixRef, rounder: _Rounder) -> Tensor:
        task = self.tasks.get(matrix.name)
        if task is None or task.entry.choice is None or task.entry.choice.kept:
            return self.checkpoint.read(matrix).float()
        if reason := rounder.too_few(matrix):
            self.unseen[matrix.name] = reason
        written = store(self.checkpoint, task, None if reason else rounder)
        self.keep(task, written)
        return read_back(self.checkpoint, task, written)


class _Rounder:
    """Rounds matrices that are multiplied with the same inputs."""

    def __init__(self, inputs: Inputs, rounding: Rounding) -> None:
        self.inputs, self.rounding = inputs, rounding

    @cached_property
    def moments(self) -> Tensor:
        """Second moments that trust correlations the less, the fewer tokens show them."""
        moments, (tokens, columns) = self.inputs.second_moments(), self.inputs.values.shape
        moments.diagonal().add_(DOUBT * columns / tokens * moments.diagonal().mean())
        return moments

    def too_few(self, matrix: MatrixRef) -> str:
        """Why a matrix cannot be rounded by its inputs, or nothing."""
        tokens, columns = self.inputs.values.shape
        if tokens < columns:
            return f"{tokens} tokens reached it, fewer than its {columns} columns"
        return "" if self.inputs.values.any() else "its inputs are all zero"

    def __call__(self, weight: Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix:
        """The matrix rounded for its inputs."""
        rounding = self.rounding
        return rounded_by_inputs(
            weight,
            choice,
            name,
            quantizer=rounding.name,
            plain=rounding.plain,
            moments=self.moments,
            coded=rounding.coded,
        )
