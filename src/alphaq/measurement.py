"""The stage before a plan: spectra of matrices and their errors at each choice, measured once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from alphaq.cache import Cache
from alphaq.checkpoint.reader import Checkpoint
from alphaq.quantizers.base import squared_error
from alphaq.records import Choice, MatrixRef, Spectrum
from alphaq.spectra.device import device_spectra
from alphaq.spectra.measure import PANEL_VALUES, spectrum, streamed_spectrum
from alphaq.workers import Workers

T = TypeVar("T")


@dataclass(frozen=True)
class MeasureTask:
    """What is still to be measured of one matrix."""

    matrix: MatrixRef
    spectrum: bool
    choices: tuple[Choice, ...]

    @property
    def streamed(self) -> bool:
        """Whether the matrix is large and can be measured without being held."""
        return not self.choices and not self.matrix.transposed and self.matrix.parameters > 2 * PANEL_VALUES

    @property
    def nbytes(self) -> int:
        """Bytes held while the task runs."""
        return 2 * (PANEL_VALUES if self.streamed else self.matrix.parameters)


@dataclass(frozen=True)
class Measured:
    """Spectrum (None if not asked for) and Σ(w − ŵ)² by choice of one matrix."""

    spectrum: Spectrum | None
    squared_errors: dict[Choice, float]


def measure_one(checkpoint: Checkpoint, task: MeasureTask) -> Measured:
    """Read one matrix and measure it. Raises QuantizationError if it holds NaN or infinity."""
    name = task.matrix.name
    if task.streamed:
        return Measured(streamed_spectrum(partial(checkpoint.read_rows, task.matrix), task.matrix.shape, name), {})
    weight = checkpoint.read(task.matrix)
    return Measured(
        spectrum(weight, name) if task.spectrum else None,
        {choice: squared_error(weight, choice, name) for choice in task.choices},
    )


def measure(
    matrices: Sequence[MatrixRef],
    workers: Workers,
    cache: Cache | None = None,
    spectra: bool = True,
    choices: tuple[Choice, ...] = (),
    device: str = "cpu",
) -> Iterator[Measured]:
    """Measure matrices of the workers' checkpoint in order, leaving out what the cache knows.

    device: where eigenvalues are computed; "cpu" is the workers' own kernel, anything else torch's name of it.
    """
    checkpoint: Checkpoint = workers.shared
    known_spectra = {} if cache is None else cache.spectra
    known_errors = {} if cache is None else cache.errors
    tasks = {}
    for matrix in matrices:
        missing = tuple(choice for choice in choices if (matrix.name, str(choice)) not in known_errors)
        wanted = spectra and matrix.name not in known_spectra
        if wanted or missing:
            tasks[matrix.name] = MeasureTask(matrix, wanted, missing)
    found = _found(workers, list(tasks.values()), device)
    results = leaving(((checkpoint.shard_of[t.matrix.tensor], next(found)) for t in tasks.values()), checkpoint.forget)
    for matrix in matrices:
        one = next(results) if matrix.name in tasks else Measured(None, {})
        if cache is not None and matrix.name in tasks:
            cache.add(matrix.name, one.spectrum, one.squared_errors)
        errors = {choice: known_errors.get((matrix.name, str(choice))) for choice in choices} | one.squared_errors
        yield Measured(one.spectrum or (known_spectra[matrix.name] if spectra else None), errors)  # type: ignore[arg-type]
    yield from results  # none is left, but the last shard is to be forgotten


def _found(workers: Workers, tasks: list[MeasureTask], device: str) -> Iterator[Measured]:
    """Results of the tasks in order: by the workers, or their spectra by a device and only the rest by the workers."""
    checkpoint: Checkpoint = workers.shared
    apart = device != "cpu"
    local = [replace(task, spectrum=False) for task in tasks if task.choices] if apart else tasks
    measured = workers.map(
        measure_one,
        ahead(local, lambda task: checkpoint.expect(task.matrix)),
        lambda task: task.nbytes,
    )
    if not apart:
        yield from measured
        return
    spectra = device_spectra(checkpoint, [task.matrix for task in tasks if task.spectrum], device)
    for task in tasks:
        errors = next(measured).squared_errors if task.choices else {}
        yield Measured(next(spectra) if task.spectrum else None, errors)


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
