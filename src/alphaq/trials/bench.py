"""Where plans near each other are tried without writing any: a model in memory, and its matrices at a few choices.

Tokens are the model's own writing, in two parts: on one gradients are taken, on the other plans are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from alphaq.calibration.text import REWRITINGS
from alphaq.calibration.tokens import model_prefix, random_windows, rewritten, written
from alphaq.checkpoint.files import memory_bytes
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import PassError, PlanError
from alphaq.evaluation.fidelity import Remembered, score_windows
from alphaq.formats.table import parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.plan import Plan
from alphaq.quantizers.rounded import relative
from alphaq.simd.sums import squared_distance, squared_norm
from alphaq.trials.exchange import Units
from alphaq.trials.held import HeldModel

BYTES_HELD, BYTES_EXCHANGED = 8, 10
"""Of each weight, in the model and its reference; and of what is planned, in a gradient and three choices."""
WORKING_BYTES = 1 << 30  # activations, about
REMEMBERED_BYTES = 2 << 30  # of the reference's logits, at most


def require_memory(checkpoint: Checkpoint, plan: Plan, tokens: int) -> None:
    """Raise PlanError for a model that does not fit into memory with what is needed beside it, on so many tokens."""
    weights = sum(matrix.parameters for matrix in checkpoint.matrices)
    planned = sum(matrix.parameters for matrix in checkpoint.matrices if matrix.name in plan.assignment)
    logits = min(REMEMBERED_BYTES, 4 * tokens * int(checkpoint.text_config["vocab_size"]))
    needed = BYTES_HELD * weights + BYTES_EXCHANGED * planned + logits + WORKING_BYTES
    there = memory_bytes()
    if there and needed > there:
        raise PlanError(
            f"Refining holds {checkpoint.name} in memory twice in float32, and gradients: about "
            f"{needed / 2**30:.1f} GiB, and this process may use {there / 2**30:.1f} GiB. Use a machine with more "
            "memory, or quantize with the plan as it is."
        )


def own_tokens(checkpoint: Checkpoint, windows: int, length: int, bos: bool, seed: int) -> Tensor:
    """What the model writes, int64 [windows, length]; other text than plans are made with (calibration/text.py)."""
    prefix = model_prefix(checkpoint) if bos else ()
    try:
        return written(checkpoint, windows, length, prefix, seed + 1)
    except PassError:  # of a class that keeps nothing of earlier tokens: random ones, rewritten by it
        ids = random_windows(int(checkpoint.text_config["vocab_size"]), windows, length, seed + 1, prefix)
        for number in range(REWRITINGS):
            ids = rewritten(checkpoint, ids, (seed + 1) * REWRITINGS + number, max(1, len(prefix)))
        return ids


@dataclass(frozen=True, eq=False)
class Windows:
    """Own writing, int64 [windows, length] each: for gradients, and to judge by. context: tokens that are given."""

    training: Tensor
    judging: Tensor
    context: int

    @property
    def judged(self) -> int:
        """Tokens that plans are judged by."""
        return self.judging[:, self.context :].numel()


class Bench:
    """A model at plans of one table.

    rounding: what stands in for a matrix at a choice, float32 [rows, columns].
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        windows: Windows,
        rounding: Callable[[Checkpoint, MatrixRef, Choice], Tensor],
    ) -> None:
        assert plan.table is not None  # checked before
        self.checkpoint, self.windows = checkpoint, windows
        self.model, reference = HeldModel(checkpoint), HeldModel(checkpoint)
        self.reference = Remembered(reference, REMEMBERED_BYTES)
        self._matrices: Mapping[str, MatrixRef] = {matrix.name: matrix for matrix in checkpoint.matrices}
        self._rounding = partial(rounding, checkpoint)
        self.units = Units.of(plan.table)
        self.open = np.array([set(members) <= self.model.exchangeable for members in self.units.members])
        self._held: dict[tuple[str, int], Tensor] = {}
        self._now = np.full(len(self.units.names), -1)
        of_units = {name for members in self.units.members for name in members}
        for name, choice in plan.every_choice().items():
            if name not in of_units and name in self.model.exchangeable:
                self.model.put(name, self._rounding(self._matrices[name], choice))

    @property
    def hidden(self) -> tuple[str, ...]:
        """Units that the class computes with in an order of its own: they keep their choices, and are not measured."""
        return tuple(name for name, may in zip(self.units.names, self.open, strict=True) if not may)

    def neighbours(self, columns: np.ndarray) -> list[tuple[int, ...]]:
        """Of each unit the columns that it may move to."""
        return [
            self.units.neighbours(unit, int(column)) if may else ()
            for unit, (column, may) in enumerate(zip(columns, self.open, strict=True))
        ]

    def groups(self) -> list[list[int]]:
        """Units whose losses may be wrong by a like factor: those of a layer's projection, or role."""
        found: dict[tuple[object, ...], list[int]] = {}
        for unit in np.flatnonzero(self.open).tolist():
            matrix = self._matrices[self.units.members[unit][0]]
            found.setdefault((matrix.layer, matrix.role, matrix.projection), []).append(unit)
        return list(found.values())

    def hold(self, columns: np.ndarray) -> None:
        """Have what plans near this one need in memory, and nothing else."""
        wanted = {
            (name, column)
            for unit, (own, others) in enumerate(zip(columns.tolist(), self.neighbours(columns), strict=True))
            for name in self.units.members[unit]
            for column in (own, *others)
        }
        for key in self._held.keys() - wanted:
            del self._held[key]

    def choices(self, columns: np.ndarray) -> dict[str, Choice]:
        """The choice of every matrix of the units."""
        parsed = [parse_choice(choice) for choice in self.units.choices]
        return {
            name: parsed[column]
            for members, column in zip(self.units.members, columns.tolist(), strict=True)
            for name in members
        }

    def divergence(self, columns: np.ndarray) -> list[float]:
        """Mean KL in nats per token of each window that judges, with units at these columns."""
        self._put(columns)
        return self._divergence(self.windows.judging)

    def divergence_without(self, columns: np.ndarray, units: Sequence[int], part: slice) -> float:
        """Mean KL in nats per token on some windows that do not judge, with some units as they are in the source."""
        self._put(columns)
        for unit in units:
            for name in self.units.members[unit]:
                self.model.put(name, self.checkpoint.read(self._matrices[name]).float())
        self._now[list(units)] = -1
        return float(np.mean(self._divergence(self.windows.training[part])))

    def _divergence(self, windows: Tensor) -> list[float]:
        context = self.windows.context
        scores = [
            score
            for ids in self.model.groups(windows)
            for score in score_windows(self.model, self.reference, ids, context)
        ]
        return [score.kl / score.tokens for score in scores]

    def relative_error(self, name: str, choice: Choice) -> float:
        """Σ(w − ŵ)²/Σw² of one matrix at a choice."""
        weight = self.checkpoint.read(self._matrices[name]).float()
        energy = squared_norm(weight)
        missed = squared_distance(weight, self._rounding(self._matrices[name], choice))
        return float(f"{relative(missed, energy):.4g}")

    def products(self, columns: np.ndarray, near: Sequence[Sequence[int]], part: slice) -> list[dict[int, float]]:
        """Of each unit ⟨G, Ŵ⟩ at its `near` columns, G the gradient of KL on some windows with units at `columns`."""
        self._put(columns)
        moving = [unit for unit, others in enumerate(near) if others]
        names = [name for unit in moving for name in self.units.members[unit]]
        ids = self.windows.training[part]
        gradients = self.model.gradients(ids, self.reference, self.windows.context, names)
        found: list[dict[int, float]] = [{} for _ in near]
        for unit in moving:
            for column in near[unit]:
                found[unit][column] = sum(
                    float((gradients[name] * self._values(name, column)).sum(dtype=torch.float64))
                    for name in self.units.members[unit]
                )
        return found

    def _put(self, columns: np.ndarray) -> None:
        for unit in np.flatnonzero((columns != self._now) & self.open):
            for name in self.units.members[unit]:
                self.model.put(name, self._values(name, int(columns[unit])))
        self._now = columns.copy()

    def _values(self, name: str, column: int) -> Tensor:
        """A matrix at a choice; bfloat16, which adds a relative squared error of a millionth."""
        if (name, column) not in self._held:
            choice = parse_choice(self.units.choices[column])
            self._held[name, column] = self._rounding(self._matrices[name], choice).bfloat16()
        return self._held[name, column]
