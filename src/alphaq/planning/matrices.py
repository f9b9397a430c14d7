"""What is measured of the matrices themselves: spectra, errors at each choice, and what methods ask for beside.

Errors are measured of some matrices and rows (`samples`), which stand for the rest (`estimates`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.spectrum import Spectrum
from alphaq.planning.estimates import Between, between, of_unit
from alphaq.planning.formula import expected_error
from alphaq.planning.samples import Group, Samples
from alphaq.planning.scope import Scope
from alphaq.quantizers.base import QUANTIZERS
from alphaq.quantizers.rounded import SAMPLE_VALUES, ErrorWeights, SquaredErrors
from alphaq.spectra.measure import Stats
from alphaq.spectra.variants import SpectrumVariant


@dataclass(frozen=True, eq=False)
class Survey:
    """How the matrices of a scope are measured.

    stats: spectra that a user gave in place of the weights'. probes: names in `PROBES`. importance: float32 [columns]
    by matrix; digest: what tells errors by it, and by this version of the quantizer, from others. staged: whether few
    weights come first. fisher: what errors count, where losses are to be nats.
    """

    scope: Scope
    stats: Stats | None
    probes: tuple[str, ...]
    importance: Mapping[str, np.ndarray]
    digest: str
    staged: bool = False
    fisher: Fisher | None = None

    @classmethod
    def of(cls, scope: Scope, stats: Stats | None, probes: tuple[str, ...], imatrix: ImportanceMatrix | None) -> Survey:
        """A survey by the importance matrix that a user gave, if any."""
        importance = scope.request.profile.importance_of(scope.checkpoint, imatrix).columns
        digest = f"{QUANTIZERS[scope.request.profile.quantizer].version} {imatrix.digest if imatrix else ''}".strip()
        return cls(scope, stats, probes, importance, digest)

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
    def _follow(self) -> dict[frozenset[Choice], tuple[Between, ...]]:
        return {}

    def known(self, matrix: MatrixRef) -> frozenset[Choice]:
        """Choices at which a matrix' errors are measured, or follow from such."""
        return self.scope.open_to(matrix).intersection(self.rounded)

    def follow(self, matrix: MatrixRef) -> tuple[Between, ...]:
        """Choices of a matrix whose errors follow from others'. None of coded ones, since their bytes are wanted."""
        known, request = self.known(matrix), self.scope.request
        if request.config.codec is not None:
            return ()
        if known not in self._follow:  # most are alike, and there may be 70,000 matrices
            self._follow[known] = between(request.choices, known)
        return self._follow[known]

    def measurable(self, matrix: MatrixRef) -> frozenset[Choice]:
        """Choices at which a matrix' errors are measured."""
        return self.known(matrix).difference(self.scope.request.choices[one.column] for one in self.follow(matrix))

    @cached_property
    def planned(self) -> Group:
        """The planned matrices."""
        return self._group(self.scope.members(), self.scope.request.config.codec)

    @cached_property
    def joined(self) -> tuple[Group, ...]:
        """Those that share the budget, each a unit of its own: the small ones, which are measured whole, and others."""
        joined = self.scope.joined if self.rounded else ()
        small = [matrix for matrix in joined if matrix.parameters <= SAMPLE_VALUES]
        large = [matrix for matrix in joined if matrix.parameters > SAMPLE_VALUES]
        return tuple(self._group({matrix.name: [matrix] for matrix in some}) for some in (small, large) if some)

    @cached_property
    def fixed(self) -> dict[str, MatrixRef]:
        """Those outside the budget that are quantized, where losses are nats, which want to be known of them too."""
        if not self.rounded or self.fisher is None:
            return {}
        quantized = {name for name, choice in self.scope.fixed.items() if not choice.kept}
        return {matrix.name: matrix for matrix in self.scope.checkpoint.matrices if matrix.name in quantized}

    def fixed_samples(self) -> Samples:
        """Of the same, each at its one choice."""
        members = {name: [matrix] for name, matrix in self.fixed.items()}
        measurable = {name: frozenset({self.scope.fixed[name]}) for name in members}
        return Samples(Group(members, measurable, self._sampling(None), False))

    def _group(self, members: Mapping[str, Sequence[MatrixRef]], codec: str | None = None) -> Group:
        measurable = {matrix.name: self.measurable(matrix) for unit in members.values() for matrix in unit}
        return Group(members, measurable, self._sampling(codec), self.staged)

    def _sampling(self, codec: str | None) -> Sampling:
        return Sampling(
            self.scope.request.profile.quantizer,
            importance=self.importance,
            digest=self.digest,
            codec=codec,
            counting=self.counting,
            counted_by=f"fisher {self.fisher.digest}" if self.fisher is not None and self.counting else "",
        )


@dataclass(frozen=True, eq=False)
class MatrixTable:
    """What was measured of the planned matrices beside their errors.

    energies: Σw² [matrices]. coded: bytes once entropy-coded, int64 [matrices, choices]; None without a codec. probes:
    by their names.
    """

    spectra: dict[str, Spectrum]
    energies: np.ndarray
    coded: np.ndarray | None
    probes: dict[str, tuple[object, ...]]


def measure_planned(survey: Survey, samples: Samples, resources: Resources) -> MatrixTable:
    """Measure the planned matrices, leaving out what the cache knows: a first sample of their errors, and all else."""
    scope, planned = survey.scope, survey.scope.planned
    config = scope.request.config
    variant = None if survey.stats is not None else SpectrumVariant(config.spectrum, config.tail)
    wanted = Wanted(variant, survey.rounded, samples.first(), survey.probes)
    measured = measure(scope.checkpoint, planned, wanted, resources)
    probes: dict[str, list[object]] = {probe: [] for probe in survey.probes}
    spectra, coded = {}, []
    for matrix, one in zip(planned, resources.wrap(measured, len(planned), "measure"), strict=True):
        samples.learn(matrix.name, one.squared_errors)
        spectra[matrix.name] = _spectrum(survey, matrix, one)
        sizes = one.squared_errors.coded
        coded.append([sizes.get(choice) or storage_bytes(choice, matrix.shape) for choice in scope.request.choices])
        for probe, record in one.probes.items():
            probes[probe].append(record)
    return MatrixTable(
        spectra,
        np.array([one.mean_square for one in spectra.values()]) * [matrix.parameters for matrix in planned],
        None if config.codec is None else np.array(coded, np.int64),
        {probe: tuple(records) for probe, records in probes.items()},
    )


def _spectrum(survey: Survey, matrix: MatrixRef, measured: Measured) -> Spectrum:
    spectrum = measured.spectrum or (survey.stats.spectra[matrix.name] if survey.stats is not None else None)
    assert spectrum is not None  # measured unless given
    if math.isnan(spectrum.mean_square):  # only α is known
        mean_square = measured.squared_errors.energy / matrix.parameters
        spectrum = replace(spectrum, variance=mean_square, mean_square=mean_square)
    return spectrum


def measure_errors(survey: Survey, samples: Samples, sampling: Sampling, resources: Resources, label: str) -> None:
    """Measure errors alone, and take them in."""
    named = {matrix.name: matrix for unit in samples.group.members.values() for matrix in unit}
    drawn = [named[name] for name, choices in (sampling.matrices or {}).items() if choices]
    in_order = {name: number for number, name in enumerate([*(m.name for m in survey.scope.matrices), *survey.fixed])}
    drawn.sort(key=lambda matrix: in_order[matrix.name])  # as they lie on disk
    choices = tuple(sorted({*survey.rounded, *(one for some in (sampling.matrices or {}).values() for one in some)}))
    # A device is for spectra, of which none are wanted.
    measured = measure(
        survey.scope.checkpoint, drawn, Wanted(None, choices, sampling), replace(resources, device="cpu")
    )
    for matrix, one in zip(drawn, resources.wrap(measured, len(drawn), label), strict=True):
        samples.learn(matrix.name, one.squared_errors)


@dataclass(frozen=True, eq=False)
class Errors:
    """Of the planned matrices: measured, from a formula, or from those of their unit that stand for them.

    expected: Σ(w − ŵ)² [matrices, choices], of columns by their importance, where an importance matrix tells it; plain:
    the same without, None where there is none. deviations: relative standard error of their unit's sum [matrices,
    choices].
    """

    expected: np.ndarray
    plain: np.ndarray | None
    deviations: np.ndarray


def planned_errors(survey: Survey, table: MatrixTable, samples: Samples) -> Errors:
    """What the samples tell of all planned matrices."""
    found = [samples.errors[matrix.name] for matrix in survey.scope.planned]
    deviations = np.array(
        [[one.deviation.get(choice, 0.0) for choice in survey.scope.request.choices] for one in found]
    )
    expected, relative = _completed(survey, table, [one.expected for one in found], deviations)
    if not (survey.importance or survey.counting):
        return Errors(expected, None, relative)
    plain = [one.expected | one.plain for one in found]
    return Errors(expected, _completed(survey, table, plain, deviations)[0], relative)


def _completed(
    survey: Survey, table: MatrixTable, measured: Sequence[Mapping[Choice, float]], deviations: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Errors, and relative standard errors of their unit's sums, both [matrices, choices], of what was measured of each
    planned matrix."""
    planned, choices = survey.scope.planned, survey.scope.request.choices
    errors = np.array(
        [
            _errors(survey, matrix, table.spectra[matrix.name], one)
            for matrix, one in zip(planned, measured, strict=True)
        ]
    )
    places = {matrix.name: number for number, matrix in enumerate(planned)}
    usual = gaussian_errors(choices)
    relative = np.zeros_like(errors)
    for members in survey.planned.members.values():
        own = np.array([places[matrix.name] for matrix in members])
        follow = survey.follow(planned[own[0]])  # members of a unit are open to the same
        estimate = of_unit(errors[own], deviations[own], table.energies[own], usual, follow)
        errors[own], relative[own] = estimate.errors, estimate.deviations
    return errors, relative


def _errors(survey: Survey, matrix: MatrixRef, spectrum: Spectrum, measured: Mapping[Choice, float]) -> list[float]:
    """One matrix' errors at every choice; NaN where they were to be measured and were not."""
    energy, known = spectrum.mean_square * matrix.parameters, survey.known(matrix)
    own = survey.scope.stored_as(matrix)

    def expected(choice: Choice) -> float:
        if choice == own:
            return 0.0
        if choice in known:
            return measured.get(choice, np.nan)
        return expected_error(spectrum, choice, energy, matrix.parameters)

    return [expected(one) for one in survey.scope.request.choices]


@dataclass(frozen=True, eq=False)
class Relative:
    """Of one matrix that shares the budget, all [choices]: Σ(w − ŵ)²/Σw² as `Errors` has it, and its relative standard
    error."""

    expected: np.ndarray
    plain: np.ndarray
    deviations: np.ndarray


def joined_errors(survey: Survey, several: Sequence[Samples]) -> dict[str, Relative]:
    """By name; nothing where errors come from a formula."""
    found = {name: one for samples in several for name, one in samples.errors.items()}
    return {matrix.name: _relative(survey, matrix, found[matrix.name]) for matrix in survey.scope.joined if found}


def _relative(survey: Survey, matrix: MatrixRef, measured: SquaredErrors) -> Relative:
    choices, known = survey.scope.request.choices, survey.known(matrix)
    usual, energy, own = gaussian_errors(choices), measured.energy or 1.0, survey.scope.stored_as(matrix)
    spread = np.array([[measured.deviation.get(one, 0.0) for one in choices]])

    def completed(errors: Mapping[Choice, float]) -> tuple[np.ndarray, np.ndarray]:
        found = [
            errors.get(one, np.nan) if one in known else energy * error
            for one, error in zip(choices, usual, strict=True)
        ]
        estimate = of_unit(np.array([found]), spread, np.array([energy]), usual, survey.follow(matrix))
        return np.where([one == own for one in choices], 0.0, estimate.errors[0] / energy), estimate.deviations

    expected, deviations = completed(measured.expected)
    return Relative(expected, completed(measured.expected | measured.plain)[0], deviations)


def harms(survey: Survey, several: Sequence[Samples], energies: Mapping[str, float]) -> dict[str, float]:
    """Nats per token and per unit of relative error of every matrix, by name; nothing where losses are not nats.

    several: what was measured. energies: Σw² where it is known of a matrix that was not; what such a one counts is
    taken for the mean of its role, or of all. So is a matrix that the pass was not shown, since the model's class
    computes with it in a way of its own.
    """
    fisher = survey.fisher
    if fisher is None:
        return {}
    found = {name: one for samples in several for name, one in samples.errors.items()}
    matrices = [*survey.scope.matrices, *survey.fixed.values()]
    counted = _by_role(matrices, {name: one.counted for name, one in found.items() if one.expected})
    means = _by_role(matrices, {name: one.mean for name, one in fisher.matrices.items()})
    by_name = {}
    for matrix in matrices:
        one = found.get(matrix.name)
        energy = energies.get(matrix.name) or (one.energy if one is not None else 0.0)
        by_name[matrix.name] = 0.5 * means(matrix) * energy * counted(matrix)
    return by_name


def _by_role(matrices: Sequence[MatrixRef], known: Mapping[str, float]) -> Callable[[MatrixRef], float]:
    """A figure of each matrix: its own if it is known by name, or the mean of its role, or of all; 1 without any."""
    of_role: dict[Role, list[float]] = {}
    for matrix in matrices:
        if matrix.name in known:
            of_role.setdefault(matrix.role, []).append(known[matrix.name])
    means = {role: float(np.mean(values)) for role, values in of_role.items()}
    of_all = float(np.mean(list(known.values()))) if known else 1.0
    return lambda matrix: known.get(matrix.name, means.get(matrix.role, of_all))
