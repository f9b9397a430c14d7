"""What plans may go by beside the weights, what was measured for them, and what of it one request may use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from alphaq.calibration.text import Text
from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
from alphaq.errors import BudgetError
from alphaq.nouns.choice import Choice
from alphaq.nouns.spectrum import Spectrum
from alphaq.planning.request import Request
from alphaq.sensitivity.base import Evidence
from alphaq.spectra.measure import Stats, read_stats


@dataclass(frozen=True)
class PlanInputs:
    """What a user gave beside the weights. stats: spectra, as a file or read. text: what calibrated methods look at."""

    stats: Path | Stats | None = None
    text: Text | None = None
    imatrix: ImportanceMatrix | None = None

    def read_stats(self) -> Stats | None:
        """The spectra, if any were given. Raises StatsError."""
        return read_stats(self.stats) if isinstance(self.stats, Path) else self.stats


NO_INPUTS = PlanInputs()


@dataclass(frozen=True)
class Measurements:
    """What was measured of the matrices to plan; enough for any number of budgets and methods that need no more.

    squared_errors: expected Σ(w − ŵ)² [matrices, choices]. measured: choices whose errors are known of every matrix
    that could take them; those of the others, which only pins name, come from a formula. weights: parameters, or ones
    where unknown.
    """

    spectra: dict[str, Spectrum]
    choices: tuple[Choice, ...]
    measured: frozenset[Choice]
    squared_errors: np.ndarray
    weights: np.ndarray
    left_out: dict[str, str]
    evidence: Evidence
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that each need took in this run; what the cache held took next to none."""
    deviations: np.ndarray | None = None
    """Relative standard error of a unit's summed errors, for each of its matrices [matrices, choices]."""
    joined: dict[str, np.ndarray] = field(default_factory=dict)
    """Σ(w − ŵ)²/Σw² [choices] of matrices outside the experts that share their budget, where they were measured."""
    importance: dict[str, np.ndarray] = field(default_factory=dict)
    """Of the columns of a matrix, by its name, where an importance matrix tells."""
    by_shapes: bool = False
    """Whether no weight was read; enough for methods that go by places alone."""

    @property
    def zeros(self) -> list[str]:
        """Matrices that hold nothing but zeros."""
        return [name for name, energy in zip(self.evidence.names, self.evidence.energies, strict=True) if energy == 0]

    def of(self, request: Request) -> Measurements:
        """What a request would have measured by itself. Raises BudgetError if it offers what was not measured."""
        if lacking := (request.offered - self.measured) | (set(request.choices) - set(self.choices)):
            raise BudgetError(
                f"{', '.join(map(str, sorted(lacking)))} was not measured. Measure for this request, or plan with the "
                "same choices."
            )
        if request.choices == self.choices:
            return self
        columns = [self.choices.index(choice) for choice in request.choices]
        coded = self.evidence.coded
        errors = self.squared_errors[:, columns]
        return replace(
            self,
            choices=request.choices,
            measured=request.offered,
            squared_errors=errors,
            evidence=replace(
                self.evidence,
                choices=request.choices,
                errors=errors,
                coded=None if coded is None else coded[:, columns],
            ),
            deviations=None if self.deviations is None else self.deviations[:, columns],
            joined={name: relative[columns] for name, relative in self.joined.items()},
        )
