"""What plans may go by beside the weights, what was measured for them, and what of it one request may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from alphaq.calibration.dropping import Drops
from alphaq.calibration.fisher import Fisher
from alphaq.calibration.text import Text
from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import BudgetError
from alphaq.nouns.choice import Choice
from alphaq.nouns.spectrum import Spectrum
from alphaq.planning.request import Request
from alphaq.sensitivity.base import Evidence
from alphaq.spectra.measure import Stats, read_stats


@dataclass(frozen=True)
class PlanInputs:
    """What a user gave beside the weights. stats: spectra, as a file or read. text: what calibrated methods look at.

    own_imatrix: (checkpoint, Fisher information) → the importance matrix of a plan whose method runs that pass anyway,
    where none is given.
    """

    stats: Path | Stats | None = None
    text: Text | None = None
    imatrix: ImportanceMatrix | None = None
    own_imatrix: Callable[[Checkpoint, Fisher], ImportanceMatrix] | None = None

    def read_stats(self) -> Stats | None:
        """The spectra, if any were given. Raises StatsError."""
        return read_stats(self.stats) if isinstance(self.stats, Path) else self.stats


@dataclass(frozen=True)
class AtChoice:
    """A matrix outside the budget: its one choice, and Σ(w − ŵ)²/Σw² at it."""

    choice: Choice
    error: float


@dataclass(frozen=True)
class Measurements:
    """What was measured of the matrices to plan: enough for the request that it was measured for, and, where all was
    measured in full (`settle=False`), for any number of budgets and methods that need no more.

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
    joined: dict[str, np.ndarray] = field(default_factory=dict)
    """Σ(w − ŵ)²/Σw² [choices] of matrices outside the experts that share their budget, where they were measured."""
    joined_deviations: dict[str, np.ndarray] = field(default_factory=dict)
    """Relative standard error [choices] of each of these."""
    plain: np.ndarray | None = None
    """Σ(w − ŵ)²/Σw² [matrices, choices] where the evidence's errors count columns by their importance."""
    joined_plain: dict[str, np.ndarray] = field(default_factory=dict)
    """The same of matrices outside the experts, [choices]."""
    harms: Mapping[str, float] = field(default_factory=dict)
    """Nats per token and per unit of relative error, of every matrix; nothing where losses are not nats."""
    fixed: Mapping[str, AtChoice] = field(default_factory=dict)
    """Those outside the budget that are quantized; only where losses are nats."""
    unpredicted: str | None = None
    """Why losses are no nats, though the method would have them so."""
    unrouted: str | None = None
    """Why all experts of a layer count alike, though the method would weigh them by their use."""
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of the columns of a matrix, by its name, where an importance matrix tells."""
    own_imatrix: ImportanceMatrix | None = None
    """The importance matrix that tells, where it was made of a pass of this plan."""
    dropped: Mapping[int, float] = field(default_factory=dict)
    """Nats per token that experts cost which are gone, by layer."""
    drops: Drops | None = None
    """What layers lose without some of their experts, where some may be dropped."""
    by_shapes: bool = False
    """Whether no weight was read; enough for methods that go by places alone."""

    @property
    def zeros(self) -> list[str]:
        """Matrices that hold nothing but zeros."""
        return [name for name, energy in zip(self.evidence.names, self.evidence.energies, strict=True) if energy == 0]

    def _plain(self) -> Measurements:
        """With every weight's error counting alike, for methods whose losses are no nats."""
        assert self.plain is not None  # the caller has looked
        errors = self.plain * self.evidence.energies[:, None]
        evidence = replace(self.evidence, errors=errors, fisher=None, harms=None, plain=None)
        return replace(self, evidence=evidence, joined=self.joined_plain, harms={}, fixed={}, plain=None)

    def of(self, request: Request) -> Measurements:
        """What a request would have measured by itself. Raises BudgetError if it offers what was not measured."""
        if self.evidence.fisher is not None and not request.method.needs_fisher and self.plain is not None:
            return self._plain().of(request)
        evidence = self.evidence
        if lacking := (request.offered - self.measured) | (set(request.choices) - set(evidence.choices)):
            raise BudgetError(
                f"{', '.join(map(str, sorted(lacking)))} was not measured. Measure for this request, or plan with the "
                "same choices."
            )
        if request.choices == evidence.choices:
            return self
        columns = [evidence.choices.index(choice) for choice in request.choices]
        # By take, in the order of one row after the other, as measured: by the order in memory sums round.
        return replace(
            self,
            measured=request.offered,
            evidence=replace(
                evidence,
                choices=request.choices,
                errors=evidence.errors.take(columns, axis=1),
                plain=None if evidence.plain is None else evidence.plain.take(columns, axis=1),
                coded=None if evidence.coded is None else evidence.coded.take(columns, axis=1),
            ),
            deviations=None if self.deviations is None else self.deviations.take(columns, axis=1),
            joined={name: relative[columns] for name, relative in self.joined.items()},
            joined_deviations={name: relative[columns] for name, relative in self.joined_deviations.items()},
            plain=None if self.plain is None else self.plain.take(columns, axis=1),
            joined_plain={name: relative[columns] for name, relative in self.joined_plain.items()},
        )
