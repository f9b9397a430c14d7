"""What is measured of the matrices themselves: spectra, errors at each choice, and what methods ask for beside.

Where matrices share a choice, their errors are only needed in sum: of a large unit some matrices are measured, of each
some rows, and they stand for the rest.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from alphaq.calibration.fisher import Fisher
from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
from alphaq.formats.gaussian import gaussian_errors
from alphaq.formats.table import storage_bytes
from alphaq.measuring.measurement import Measured, Sampling, Wanted, measure
from alphaq.measuring.resources import Resources
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.spectrum import Spectrum
from alphaq.planning.formula import expected_error
from alphaq.planning.measured import Beside
from alphaq.planning.scope import Scope
from alphaq.quantizers.base import QUANTIZERS
from alphaq.quantizers.rounded import SAMPLE_VALUES, ErrorWeights
from alphaq.spectra.measure import Stats
from alphaq.spectra.variants import SpectrumVariant

SAMPLE_MEMBERS = 32  # matrices of a unit whose errors are measured


@dataclass(frozen=True, eq=False)
class Survey:
    """How the matrices of a scope are measured.

    stats: spectra that a user gave in place of the weights'. probes: names in `PROBES`. importance: float32 [columns]
    by matrix; digest: what tells errors by it, and by this version of the quantizer, from others.
    """

    scope: Scope
    stats: Stats | None
    probes: tuple[str, ...]
    importance: Mapping[str, np.ndarray]
    digest: str
    fisher: Fisher | None = None

    @classmethod
    def of(
        cls,
        scope: Scope,
        stats: Stats | None,
        probes: tuple[str, ...],
        imatrix: ImportanceMatrix | None,
        fisher: Fisher | None = None,
    ) -> Survey:
        """A survey by the importance matrix that a user gave, and the Fisher information, if any."""
        importance = scope.request.profile.importance_of(scope.checkpoint, imatrix).columns
        digest = f"{QUANTIZERS[scope.request.profile.quantizer].version} {imatrix.digest if imatrix else ''}".strip()
        return cls(scope, stats, probes, importance, digest, fisher)

    @cached_property
    def rounded(self) -> tuple[Choice, ...]:
        """Choices whose errors are measured; those of the others come from a formula."""
        config, choices = self.scope.request.config, self.scope.request.choices
        if config.noise != "measured":
            return ()
        return tuple(choice for choice in choices if not choice.kept or config.codec is not None)

    @cached_property
    def counting(self) -> dict[str, ErrorWeights]:
        """What the errors of each matrix count, where the Fisher information tells; coded ones are measured plainly."""
        if self.fisher is None or self.scope.request.config.codec is not None:
            return {}
        return {name: ErrorWeights(one.rows, one.columns) for name, one in self.fisher.matrices.items()}

    @cached_property
    def counted_by(self) -> str:
        """What tells errors that count so from others."""
        return f"fisher {self.fisher.digest}" if self.fisher is not None and self.counting else ""

    @cached_property
    def _measurable(self) -> dict[frozenset[Choice], frozenset[Choice]]:
        return {}

    def measurable(self, matrix: MatrixRef) -> frozenset[Choice]:
        """Choices at which a matrix' errors are measured."""
        open_to = self.scope.open_to(matrix)
        return self._measurable.setdefault(open_to, open_to.intersection(self.rounded))

    def sampling(self, units: Mapping[str, list[MatrixRef]]) -> Sampling:
        """Of each unit some matrices, and fewer rows of each the more there are."""
        drawn = {
            matrix.name: self.measurable(matrix)
            for unit, members in units.items()
            for matrix in random.Random(unit).sample(members, min(len(members), SAMPLE_MEMBERS))
        }
        values = SAMPLE_VALUES // min(max(map(len, units.values())), SAMPLE_MEMBERS)
        request = self.scope.request
        return Sampling(
            request.profile.quantizer,
            values,
            drawn,
            self.importance,
            self.digest,
            request.config.codec,
            self.counting,
            self.counted_by,
        )


@dataclass(frozen=True, eq=False)
class MatrixTable:
    """What was measured of the planned matrices.

    errors: Σ(w − ŵ)² [matrices, choices]. deviations: relative standard error of their unit's sum. energies: Σw²
    [matrices]. coded: bytes once entropy-coded, int64 [matrices, choices]; None without a codec. probes:
    by their names.
    """

    spectra: dict[str, Spectrum]
    errors: np.ndarray
    deviations: np.ndarray
    energies: np.ndarray
    coded: np.ndarray | None
    probes: dict[str, tuple[object, ...]]


@dataclass(frozen=True)
class _Row:
    spectrum: Spectrum
    energy: float
    errors: list[float]
    deviations: list[float]
    coded: list[int]


def measure_planned(survey: Survey, resources: Resources) -> MatrixTable:
    """Measure the planned matrices, leaving out what the cache knows."""
    scope, units = survey.scope, survey.scope.members()
    config, planned = scope.request.config, scope.planned
    variant = None if survey.stats is not None else SpectrumVariant(config.spectrum, config.tail)
    wanted = Wanted(variant, survey.rounded, survey.sampling(units), survey.probes)
    measured = measure(scope.checkpoint, planned, wanted, resources)
    probes: dict[str, list[object]] = {probe: [] for probe in survey.probes}
    rows = []
    for matrix, one in zip(planned, resources.wrap(measured, len(planned), "measure"), strict=True):
        rows.append(_row(survey, matrix, one))
        for probe, record in one.probes.items():
            probes[probe].append(record)
    spectra = {matrix.name: row.spectrum for matrix, row in zip(planned, rows, strict=True)}
    energies = np.array([row.energy for row in rows])
    errors, deviations = np.array([row.errors for row in rows]), np.array([row.deviations for row in rows])
    return MatrixTable(
        spectra,
        *_by_unit(units, {name: number for number, name in enumerate(spectra)}, errors, deviations, energies),
        energies,
        None if config.codec is None else np.array([row.coded for row in rows], np.int64),
        {probe: tuple(records) for probe, records in probes.items()},
    )


def _row(survey: Survey, matrix: MatrixRef, measured: Measured) -> _Row:
    """One matrix' numbers at every choice: measured, from a formula, or NaN where others of its unit stand for it."""
    errors, parameters, choices = measured.squared_errors, matrix.parameters, survey.scope.request.choices
    spectrum = measured.spectrum or (survey.stats.spectra[matrix.name] if survey.stats is not None else None)
    assert spectrum is not None  # measured unless given
    if math.isnan(spectrum.mean_square):  # only α is known
        mean_square = errors.energy / parameters
        spectrum = replace(spectrum, variance=mean_square, mean_square=mean_square)
    counted = errors.energy if survey.counting and errors.expected else None
    energy, measurable = spectrum.mean_square * parameters if counted is None else counted, survey.measurable(matrix)
    own = survey.scope.stored_as(matrix)

    def expected(choice: Choice) -> float:
        if choice == own:
            return 0.0
        if choice in measurable:
            return errors.expected.get(choice, np.nan)
        return expected_error(spectrum, choice, energy, parameters)

    return _Row(
        spectrum,
        energy,
        [expected(one) for one in choices],
        [errors.deviation.get(one, 0.0) for one in choices],
        [errors.coded.get(one) or storage_bytes(one, matrix.shape) for one in choices if errors.coded],
    )


def measure_beside(survey: Survey, resources: Resources) -> Beside:
    """Errors of the matrices that share the budget, and, where nats are wanted, of those that are fixed; nothing if
    errors come from a formula."""
    scope, choices = survey.scope, survey.scope.request.choices
    fixed = {} if survey.fisher is None else {name: one for name, one in scope.fixed.items() if not one.kept}
    if not survey.rounded or not (scope.joined or fixed):
        return Beside()
    others = [matrix for matrix in scope.checkpoint.matrices if matrix.name in fixed]
    matrices = [*scope.joined, *others]
    open_to = {matrix.name: survey.measurable(matrix) for matrix in scope.joined}
    open_to |= {name: frozenset({one}) for name, one in fixed.items()}
    quantizer = scope.request.profile.quantizer
    sampling = Sampling(
        quantizer,
        SAMPLE_VALUES,
        open_to,
        survey.importance,
        survey.digest,
        counting=survey.counting,
        counted_by=survey.counted_by,
    )
    rounded = tuple(sorted({*survey.rounded, *fixed.values()}))
    wanted = Wanted(None, rounded, sampling)
    # A device is for spectra, of which none are wanted.
    measured = measure(scope.checkpoint, matrices, wanted, replace(resources, device="cpu"))
    shown: Iterator[Measured] = iter(resources.wrap(measured, len(matrices), "measure the rest"))
    usual = gaussian_errors(choices)
    relative, of_fixed, energies = {}, {}, {}
    for matrix, one in zip(matrices, shown, strict=True):
        energies[matrix.name] = one.squared_errors.energy
        if matrix.name in fixed:
            errors_of = one.squared_errors.expected
            of_fixed[matrix.name] = errors_of[fixed[matrix.name]] / (one.squared_errors.energy or 1.0)
            continue
        errors, energy = one.squared_errors.expected, one.squared_errors.energy or 1.0
        known = [errors[one] / energy if one in errors else error for one, error in zip(choices, usual, strict=True)]
        own = scope.stored_as(matrix)
        relative[matrix.name] = np.where([one == own for one in choices], 0.0, known)
    return Beside(relative, of_fixed, energies)


def _by_unit(
    units: Mapping[str, list[MatrixRef]],
    places: Mapping[str, int],
    errors: np.ndarray,
    deviations: np.ndarray,
    energies: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Errors [matrices, choices] of matrices left out of the sample (NaN) from those of their unit, in proportion to
    their energy; and the relative standard error [matrices, choices] of their unit's sum. places: rows by name."""
    errors, relative = errors.copy(), np.zeros_like(errors)
    for members in units.values():
        rows = np.array([places[matrix.name] for matrix in members])
        drawn = rows[np.isfinite(errors[rows]).all(axis=1)]
        total, energy = errors[drawn].sum(axis=0), energies[drawn].sum()
        ratio = total / energy if energy > 0 else np.zeros(errors.shape[1])
        missing = np.setdiff1d(rows, drawn)
        spread = np.square(deviations[drawn]).sum(axis=0)
        if len(missing):  # and how much the members differ, as far as they were not all seen
            misses = errors[drawn] - ratio * energies[drawn, None]
            bessel = len(drawn) / max(1, len(drawn) - 1)
            spread = spread + np.square(misses).sum(axis=0) * bessel * len(missing) / len(rows)
        relative[rows] = np.sqrt(spread) / np.where(total > 0, total, 1.0)
        errors[missing] = ratio * energies[missing, None]
    return errors, relative
