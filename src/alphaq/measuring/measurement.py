"""The stage before a plan: spectra of matrices and their errors at each choice, measured once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np
import torch

from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import DTYPE_NAMES, TensorSpec, stored_bytes
from alphaq.measuring.cache import Cache, Known
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.spectrum import Spectrum, WeightStatistics
from alphaq.quantizers.coding import coder_version, encode_tensor
from alphaq.quantizers.rounded import SAMPLE_VALUES, SourceMatrix, SquaredErrors
from alphaq.spectra.device import device_batch, device_spectra, device_tasks
from alphaq.spectra.measure import PANEL_VALUES, spectrum, streamed_spectrum
from alphaq.spectra.statistics import weight_statistics
from alphaq.spectra.variants import FAST_VARIANT, SpectrumVariant, variant_spectrum
from alphaq.work.workers import Workers

T = TypeVar("T")
ENERGY = "energy"  # what the cache calls Σw², beside the errors of choices
BYTES = "bytes"  # after the name of an error: how many the matrix takes once coded


@dataclass(frozen=True, slots=True)
class MeasureTask:
    """What is still to be measured of one matrix."""

    matrix: MatrixRef
    spectrum: bool
    choices: tuple[Choice, ...]
    statistics: bool = False
    variant: SpectrumVariant = FAST_VARIANT
    quantizer: str = "rtn"
    sample_values: int = SAMPLE_VALUES
    importance: np.ndarray | None = None
    codec: str | None = None

    @property
    def tensor(self) -> str:
        """The stored tensor that is read."""
        return self.matrix.tensor

    @property
    def streamed(self) -> bool:
        """Whether the matrix is large and can be measured without being held."""
        whole = self.choices or self.statistics or self.variant != FAST_VARIANT or self.matrix.transposed
        return not whole and self.matrix.parameters > 2 * PANEL_VALUES

    @property
    def nbytes(self) -> int:
        """Bytes held while the task runs."""
        return 2 * (PANEL_VALUES if self.streamed else self.matrix.parameters)


@dataclass(frozen=True, slots=True)
class Measured:
    """Spectrum and statistics (None if not asked for) and Σ(w − ŵ)² by choice of one matrix."""

    spectrum: Spectrum | None = None
    squared_errors: SquaredErrors = field(default_factory=SquaredErrors)
    statistics: WeightStatistics | None = None


def measure_one(checkpoint: Checkpoint, task: MeasureTask) -> Measured:
    """Read one matrix and measure it. Raises QuantizationError if it holds NaN or infinity."""
    name = task.matrix.name
    if task.streamed:
        return Measured(streamed_spectrum(partial(checkpoint.read_rows, task.matrix), task.matrix.shape, name))
    source = SourceMatrix(checkpoint, task.matrix, task.quantizer, task.importance)
    errors = source.errors(task.choices, task.sample_values) if task.codec is None else source.coded(task.choices)
    own = spectrum if task.variant == FAST_VARIANT else partial(variant_spectrum, variant=task.variant)
    return Measured(
        own(source.weight, name) if task.spectrum else None,
        errors,
        weight_statistics(source.weight, name) if task.statistics else None,
    )


@dataclass(frozen=True)
class Sampling:
    """How errors are to be measured: by which quantizer, on how many weights of a matrix, of which matrices.

    matrices: at which choices the errors of each are measured, None for all. importance: of the columns, by matrix;
    digest: what tells it from others. codec: what codes the files; errors and bytes are then those of whole matrices.
    """

    quantizer: str = "rtn"
    values: int = SAMPLE_VALUES
    matrices: Mapping[str, frozenset[Choice]] | None = None
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    digest: str = ""
    codec: str | None = None

    def key(self, choice: Choice) -> str:
        """What the cache calls an error measured so."""
        values = self.values if self.codec is None else coder_version(self.codec)
        return f"{choice} {self.quantizer} {values} {self.digest}".rstrip()

    def of(self, name: str, choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
        """The choices to measure of one matrix."""
        if self.matrices is None:
            return choices
        return _kept(choices, self.matrices.get(name, frozenset()))


@lru_cache(maxsize=256)
def _kept(choices: tuple[Choice, ...], wanted: frozenset[Choice]) -> tuple[Choice, ...]:
    """One tuple for all matrices alike."""
    return tuple(choice for choice in choices if choice in wanted)


def measure(
    matrices: Sequence[MatrixRef],
    workers: Workers,
    cache: Cache | None = None,
    spectra: bool = True,
    choices: tuple[Choice, ...] = (),
    device: str = "cpu",
    statistics: bool = False,
    variant: SpectrumVariant = FAST_VARIANT,
    sampling: Sampling = Sampling(),
) -> Iterator[Measured]:
    """Measure matrices of the workers' checkpoint in order, leaving out what the cache knows.

    device: where eigenvalues are computed; "cpu" is the workers' own kernel, anything else torch's name of it.
    """
    checkpoint: Checkpoint = workers.shared
    known = Known() if cache is None else cache.known
    kind = str(variant)
    keys = {choice: sampling.key(choice) for choice in choices}
    tasks = {}
    for matrix in matrices:
        name = matrix.name
        wanted = sampling.of(name, choices)
        missing = _kept(wanted, frozenset(one for one in wanted if (name, keys[one]) not in known.errors))
        task = MeasureTask(
            matrix,
            spectra and (name, kind) not in known.spectra,
            missing,
            statistics and name not in known.statistics,
            variant,
            sampling.quantizer,
            sampling.values,
            sampling.importance.get(name),
            sampling.codec,
        )
        if task.spectrum or task.choices or task.statistics:
            tasks[name] = task
    found = _found(workers, list(tasks.values()), device)
    results = leaving(((checkpoint.shard_of[t.matrix.tensor], next(found)) for t in tasks.values()), checkpoint.forget)
    for matrix in matrices:
        name = matrix.name
        one = next(results) if name in tasks else Measured()
        fresh = one.squared_errors
        pairs = {c: (error, fresh.deviation.get(c, 0.0)) for c, error in fresh.expected.items()}
        coded = dict(fresh.coded)
        if cache is not None and name in tasks:
            kept = {keys[choice]: pair for choice, pair in pairs.items()}
            kept |= {f"{keys[choice]} {BYTES}": (float(nbytes), 0.0) for choice, nbytes in coded.items()}
            if pairs:
                kept[ENERGY] = fresh.energy, 0.0
            cache.add(name, one.spectrum, kept, one.statistics, kind)
        for choice in sampling.of(name, choices):
            if choice not in pairs:
                pairs[choice] = known.errors[name, keys[choice]]
                if sampling.codec is not None:
                    coded[choice] = int(known.errors[name, f"{keys[choice]} {BYTES}"][0])
        expected, deviation = ({choice: pair[part] for choice, pair in pairs.items()} for part in (0, 1))
        energy = fresh.energy or known.errors.get((name, ENERGY), (0.0, 0.0))[0]
        yield Measured(
            one.spectrum or (known.spectra[name, kind] if spectra else None),
            SquaredErrors(expected, deviation, energy, coded),
            one.statistics or (known.statistics[name] if statistics else None),
        )
    yield from results  # none is left, but the last shard is to be forgotten
    checkpoint.require_unchanged()


def _found(workers: Workers, tasks: list[MeasureTask], device: str) -> Iterator[Measured]:
    """Results of the tasks in order: by the workers, or their spectra by a device and only the rest by the workers."""
    checkpoint: Checkpoint = workers.shared
    apart = device != "cpu" and all(task.variant == FAST_VARIANT for task in tasks)
    local = [replace(task, spectrum=False) for task in tasks if task.choices or task.statistics] if apart else tasks
    measured = workers.map(
        measure_one,
        local if workers.cluster else ahead(local, lambda task: checkpoint.expect(task.matrix)),
        lambda task: task.nbytes,
    )
    if not apart:
        yield from measured
        return
    spectra: Iterator[Spectrum]
    wanted = [task.matrix for task in tasks if task.spectrum]
    if workers.cluster:
        groups = workers.map(
            device_batch, device_tasks(checkpoint, wanted, device), lambda task: task.nbytes, on_card=True
        )
        spectra = (one for group in groups for one in group)
    else:
        spectra = device_spectra(checkpoint, wanted, device)
    for task in tasks:
        rest = next(measured) if task.choices or task.statistics else Measured()
        yield replace(rest, spectrum=next(spectra) if task.spectrum else None)


def restored(
    checkpoint: Checkpoint, matrix: MatrixRef, choice: Choice, quantizer: str, importance: Mapping[str, np.ndarray]
) -> torch.Tensor:
    """What an engine computes with in a matrix's place, float32 [rows, columns]. importance: of columns, by matrix."""
    return SourceMatrix(checkpoint, matrix, quantizer, importance.get(matrix.name)).restored(choice)


def coded_bytes(checkpoint: Checkpoint, task: tuple[str | MatrixRef, Choice | None, str]) -> int:
    """What one tensor adds to a native file once coded, its header entry included.

    task: a tensor that is kept, or a matrix and its choice; the quantizer.
    """
    source, choice, quantizer = task
    if isinstance(source, str):
        name, stored = source, checkpoint.tensor(source)
    else:
        assert choice is not None  # of a matrix
        name, stored = source.name, SourceMatrix(checkpoint, source, quantizer).at(choice).native()
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
