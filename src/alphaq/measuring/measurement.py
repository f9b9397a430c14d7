"""The stage before a plan: spectra of matrices and their errors at each choice, measured once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import torch

from alphaq.checkpoint.ranges import expect
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import DTYPE_NAMES, TensorSpec, stored_bytes
from alphaq.formats.coding import coder_version, encode_tensor
from alphaq.measuring.cache import Cache, Entry, Known
from alphaq.measuring.probes import PROBES
from alphaq.measuring.resources import Resources
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.spectrum import Spectrum
from alphaq.quantizers.base import DEFAULT
from alphaq.quantizers.rounded import SAMPLE_VALUES, ErrorWeights, SourceMatrix, SquaredErrors
from alphaq.research.tails import variant_spectrum
from alphaq.spectra.device import device_batch, device_spectra, device_tasks
from alphaq.spectra.measure import PANEL_VALUES, spectrum, streamed_spectrum
from alphaq.spectra.variants import FAST_VARIANT, SpectrumVariant
from alphaq.work.workers import Workers

T = TypeVar("T")
ENERGY = "energy"  # what the cache calls Σw², beside the errors of choices
BYTES = "bytes"  # after the name of an error: how many the matrix takes once coded
COUNTED = "counted"
PLAIN = "plain"  # the same: the error without the importance of columns


@dataclass(frozen=True, slots=True)
class MeasureTask:
    """What is still to be measured of one matrix. variant: of its spectrum, None for no spectrum."""

    matrix: MatrixRef
    variant: SpectrumVariant | None
    choices: tuple[Choice, ...]
    probes: tuple[str, ...] = ()
    quantizer: str = DEFAULT
    sample_values: int = SAMPLE_VALUES
    importance: np.ndarray | None = None
    codec: str | None = None
    counting: ErrorWeights | None = None

    @property
    def tensor(self) -> str:
        """The stored tensor that is read."""
        return self.matrix.tensor

    @property
    def of_weights(self) -> bool:
        """Whether more than a spectrum is wanted."""
        return bool(self.choices or self.probes)

    @property
    def streamed(self) -> bool:
        """Whether the matrix is large and can be measured without being held."""
        whole = self.of_weights or self.variant != FAST_VARIANT or self.matrix.transposed
        return not whole and self.matrix.parameters > 2 * PANEL_VALUES

    @property
    def nbytes(self) -> int:
        """Bytes held while the task runs."""
        return 2 * (PANEL_VALUES if self.streamed else self.matrix.parameters)


@dataclass(frozen=True, slots=True)
class Measured:
    """Spectrum (None if not asked for), Σ(w − ŵ)² by choice, and what probes found, by their names, of one matrix."""

    spectrum: Spectrum | None = None
    squared_errors: SquaredErrors = field(default_factory=SquaredErrors)
    probes: Mapping[str, Any] = field(default_factory=dict)


def measure_one(checkpoint: Checkpoint, task: MeasureTask) -> Measured:
    """Read one matrix and measure it. Raises QuantizationError if it holds NaN or infinity."""
    name = task.matrix.name
    if task.streamed:
        return Measured(streamed_spectrum(partial(checkpoint.read_rows, task.matrix), task.matrix.shape, name))
    source = SourceMatrix(checkpoint, task.matrix, task.quantizer, task.importance, task.counting)
    errors = source.errors(task.choices, task.sample_values) if task.codec is None else source.coded(task.choices)
    return Measured(
        None if task.variant is None else _spectrum_of(source.weight, name, task.variant),
        errors,
        {probe: PROBES[probe].measure(source.weight, name) for probe in task.probes},
    )


def _spectrum_of(weight: torch.Tensor, name: str, variant: SpectrumVariant) -> Spectrum:
    return spectrum(weight, name) if variant == FAST_VARIANT else variant_spectrum(weight, name, variant)


@dataclass(frozen=True)
class Sampling:
    """How errors are to be measured: by which quantizer, on how many weights of a matrix, of which matrices.

    matrices: at which choices the errors of each are measured, None for all. importance: of the columns, by matrix;
    digest: what tells it from others. codec: what codes the files; errors and bytes are then those of whole
    matrices. counting: what errors count, by matrix; counted_by: what tells that from others.
    """

    quantizer: str = DEFAULT
    values: int = SAMPLE_VALUES
    matrices: Mapping[str, frozenset[Choice]] | None = None
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    digest: str = ""
    codec: str | None = None
    counting: Mapping[str, ErrorWeights] = field(default_factory=dict)
    counted_by: str = ""

    @property
    def counted_key(self) -> str:
        """What the cache calls what all of a matrix counts, over its energy."""
        return f"{COUNTED} {self.counted_by}"

    def key(self, choice: Choice) -> str:
        """What the cache calls an error measured so."""
        values = self.values if self.codec is None else coder_version(self.codec)
        return " ".join(f"{choice} {self.quantizer} {values} {self.digest} {self.counted_by}".split())

    def of(self, name: str, choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
        """The choices to measure of one matrix."""
        if self.matrices is None:
            return choices
        return _kept(choices, self.matrices.get(name, frozenset()))


@lru_cache(maxsize=256)
def _kept(choices: tuple[Choice, ...], wanted: frozenset[Choice]) -> tuple[Choice, ...]:
    """One tuple for all matrices alike."""
    return tuple(choice for choice in choices if choice in wanted)


@dataclass(frozen=True)
class Wanted:
    """What is to be measured of matrices. variant: of their spectra, None for none. probes: names in `PROBES`."""

    variant: SpectrumVariant | None = FAST_VARIANT
    choices: tuple[Choice, ...] = ()
    sampling: Sampling = Sampling()
    probes: tuple[str, ...] = ()


class _Ledger:
    """What is wanted, and what of it is known: from earlier runs, where there is a cache, and from this one."""

    def __init__(self, wanted: Wanted, cache: Cache | None) -> None:
        self.wanted, self.cache = wanted, cache
        self.known = Known() if cache is None else cache.known
        self.keys = {choice: wanted.sampling.key(choice) for choice in wanted.choices}

    def task(self, matrix: MatrixRef) -> MeasureTask:
        """What is still to be measured of a matrix."""
        wanted, known, name = self.wanted, self.known, matrix.name
        choices = wanted.sampling.of(name, wanted.choices)
        return MeasureTask(
            matrix,
            None if (name, str(wanted.variant)) in known.spectra else wanted.variant,
            _kept(choices, frozenset(one for one in choices if (name, self.keys[one]) not in known.errors)),
            tuple(probe for probe in wanted.probes if (name, probe) not in known.probes),
            wanted.sampling.quantizer,
            wanted.sampling.values,
            wanted.sampling.importance.get(name),
            wanted.sampling.codec,
            wanted.sampling.counting.get(name),
        )

    def enter(self, name: str, measured: Measured) -> None:
        """Take in, and keep for later runs, what was measured of a matrix."""
        errors = measured.squared_errors
        pairs = {self.keys[one]: (error, errors.deviation.get(one, 0.0)) for one, error in errors.expected.items()}
        pairs |= {f"{self.keys[one]} {BYTES}": (float(nbytes), 0.0) for one, nbytes in errors.coded.items()}
        pairs |= {f"{self.keys[one]} {PLAIN}": (error, 0.0) for one, error in errors.plain.items()}
        if errors.expected:
            pairs[ENERGY] = errors.energy, 0.0
            pairs[self.wanted.sampling.counted_key] = errors.counted, 0.0
        records = {probe: asdict(record) for probe, record in measured.probes.items()}
        entry = Entry(name, pairs, measured.spectrum, str(self.wanted.variant), records)
        if self.cache is None:
            self.known.learn(entry)
        else:
            self.cache.add(entry)

    def of(self, name: str) -> Measured:
        """All that is wanted of a matrix, once it is known."""
        wanted, errors = self.wanted, self.known.errors
        choices = wanted.sampling.of(name, wanted.choices)
        pairs = {choice: errors[name, self.keys[choice]] for choice in choices}
        coded = {} if wanted.sampling.codec is None else {one: f"{self.keys[one]} {BYTES}" for one in choices}
        return Measured(
            None if wanted.variant is None else self.known.spectra[name, str(wanted.variant)],
            SquaredErrors(
                {choice: error for choice, (error, _) in pairs.items()},
                {choice: deviation for choice, (_, deviation) in pairs.items()},
                errors.get((name, ENERGY), (0.0, 0.0))[0],
                {choice: int(errors[name, key][0]) for choice, key in coded.items()},
                {one: errors[name, key][0] for one in choices if (name, key := f"{self.keys[one]} {PLAIN}") in errors},
                errors.get((name, wanted.sampling.counted_key), (1.0, 0.0))[0],
            ),
            {probe: PROBES[probe].record(**self.known.probes[name, probe]) for probe in wanted.probes},
        )


def measure(
    checkpoint: Checkpoint,
    matrices: Sequence[MatrixRef],
    wanted: Wanted = Wanted(),
    resources: Resources = Resources(),
) -> Iterator[Measured]:
    """Measure matrices of a checkpoint in order, leaving out what the cache knows. Progress is the caller's to show."""
    ledger = _Ledger(wanted, resources.cache)
    tasks = [task for task in map(ledger.task, matrices) if task.variant or task.of_weights]
    measured = _measured(checkpoint, tasks, resources)
    results = leaving(((checkpoint.shard_of[task.tensor], next(measured)) for task in tasks), checkpoint.forget)
    missing = {task.matrix.name for task in tasks}
    for matrix in matrices:
        if matrix.name in missing:
            ledger.enter(matrix.name, next(results))
        yield ledger.of(matrix.name)
    yield from results  # none is left, but the last shard is to be forgotten
    checkpoint.require_unchanged()


def _measured(checkpoint: Checkpoint, tasks: list[MeasureTask], resources: Resources) -> Iterator[Measured]:
    """Results of the tasks in order: by the workers, or their spectra by a device and only the rest by the workers."""
    workers, device = resources.pool(checkpoint), resources.device
    if device == "cpu" or any(task.variant not in (None, FAST_VARIANT) for task in tasks):
        yield from _by_workers(checkpoint, tasks, workers)
        return
    local = [replace(task, variant=None) for task in tasks if task.of_weights]
    spectra = _on_device(checkpoint, [task.matrix for task in tasks if task.variant], workers, device)
    measured = _by_workers(checkpoint, local, workers)
    for task in tasks:
        rest = next(measured) if task.of_weights else Measured()
        yield replace(rest, spectrum=next(spectra) if task.variant else None)


def _by_workers(checkpoint: Checkpoint, tasks: list[MeasureTask], workers: Workers) -> Iterator[Measured]:
    expected = tasks if workers.cluster else ahead(tasks, lambda task: expect(checkpoint, task.matrix))
    return workers.map(measure_one, expected, lambda task: task.nbytes)


def _on_device(checkpoint: Checkpoint, matrices: list[MatrixRef], workers: Workers, device: str) -> Iterator[Spectrum]:
    if not workers.cluster:
        return device_spectra(checkpoint, matrices, device)
    tasks = device_tasks(checkpoint, matrices, device)
    groups = workers.map(device_batch, tasks, lambda task: task.nbytes, on_card=True)
    return (one for group in groups for one in group)


def restored(
    checkpoint: Checkpoint, matrix: MatrixRef, choice: Choice, quantizer: str, importance: Mapping[str, np.ndarray]
) -> torch.Tensor:
    """What an engine computes with in a matrix's place, float32 [rows, columns]. importance: of columns, by matrix."""
    return SourceMatrix(checkpoint, matrix, quantizer, importance.get(matrix.name)).restored(choice)


@dataclass(frozen=True, slots=True)
class CodedTask:
    """A tensor that is kept as it is, or a matrix and the choice that it is stored at."""

    source: str | MatrixRef
    choice: Choice | None
    quantizer: str


def coded_bytes(checkpoint: Checkpoint, task: CodedTask) -> int:
    """What one tensor adds to a native file once coded, its header entry included."""
    source, choice = task.source, task.choice
    if isinstance(source, str):
        name, stored = source, checkpoint.tensor(source)
    else:
        assert choice is not None  # of a matrix
        name, stored = source.name, SourceMatrix(checkpoint, source, task.quantizer).at(choice).native()
    coded = encode_tensor(stored)
    return stored_bytes(name, TensorSpec(DTYPE_NAMES[coded.dtype], tuple(coded.shape)))


def leaving(items: Iterable[tuple[str, T]], forget: Callable[[str], None]) -> Iterator[T]:
    """The items without the shard each came from, a shard forgotten once all of it has passed."""
    current = None
    for shard, item in items:
        if current not in (None, shard):
            forget(current)
        current = shard
        yield item
    if current is not None:
        forget(current)


def ahead(items: Iterable[T], announce: Callable[[T], None]) -> Iterator[T]:
    """The items, each announced one before it is due."""
    last: list[T] = []
    for item in items:
        announce(item)
        yield from last
        last = [item]
    yield from last
