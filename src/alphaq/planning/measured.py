"""What plans may go by beside the weights, what was measured for them, and what of it one request may use."""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass(frozen=True)
class Beside:
    """What was measured of matrices outside the planned ones; both count as the Fisher information says, if it is
    known.

    relative: Σ(w − ŵ)²/Σw² [choices] of those that share the budget. fixed: the same of the others at their one choice.
    energies: Σw² of all of them.
    """

    relative: Mapping[str, np.ndarray] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    energies: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurements:
    """What was measured of the matrices to plan; enough for any number of budgets and methods that need no more.

    measured: choices whose errors are known of every matrix that could take them; those of the others, which only pins
    name, come from a formula. left_out: rows of a stats file that are not planned, and why.
    """

    spectra: dict[str, Spectrum]
    measured: frozenset[Choice]
    evidence: Evidence
    left_out: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that each need took in this run; what the cache held took next to none."""
    deviations: np.ndarray | None = None
    """Relative standard error of a unit's summed errors, for each of its matrices [matrices, choices]."""
    beside: Beside = Beside()
    """Of matrices outside the experts, where they were measured."""
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of the columns of a matrix, by its name, where an importance matrix tells."""
    unpredicted: str | None = None
    """Why losses are no nats, though the method would have them so."""
    by_shapes: bool = False
    """Whether no weight was read; enough for methods that go by places alone."""

    @property
    def zeros(self) -> list[str]:
        """Matrices that hold nothing but zeros."""
        return [name for name, energy in zip(self.evidence.names, self.evidence.energies, strict=True) if energy == 0]

    def of(self, request: Request) -> Measurements:
        """What a request would have measured by itself. Raises BudgetError if it offers what was not measured."""
        evidence = self.evidence
        if lacking := (request.offered - self.measured) | (set(request.choices) - set(evidence.choices)):
            raise BudgetError(
                f"{', '.join(map(str, sorted(lacking)))} was not measured. Measure for this request, or plan with the "
                "same choices."
            )
        if request.choices == evidence.choices:
            return self
        columns = [evidence.choices.index(choice) for choice in request.choices]
        return replace(
            self,
            measured=request.offered,
            evidence=replace(
                evidence,
                choices=request.choices,
                errors=evidence.errors[:, columns],
                coded=None if evidence.coded is None else evidence.coded[:, columns],
            ),
            deviations=None if self.deviations is None else self.deviations[:, columns],
            beside=replace(
                self.beside, relative={name: relative[columns] for name, relative in self.beside.relative.items()}
            ),
        )
