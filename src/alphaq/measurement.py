"""The stage before a plan: spectra of matrices and their errors at each choice, measured once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
        return 4 * (PANEL_VALUES if self.streamed else self.matrix.parameters)


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
    on_device = device != "cpu"
    known_spectra = {} if cache is None else cache.spectra
    known_errors = {} if cache is None else cache.errors
    tasks: dict[str, MeasureTask] = {}
    for matrix in matrices:
        missing = tuple(choice for choice in choices if (matrix.name, str(choice)) not in known_errors)
        wanted = spectra and matrix.name not in known_spectra
        if wanted or missing:
            tasks[matrix.name] = MeasureTask(matrix, wanted, missing)
    apart = iter(device_spectra(checkpoint, [t.matrix for t in tasks.values() if t.spectrum and on_device], device))
    local = [task for task in tasks.values() if task.choices or not on_device]
    local = [MeasureTask(t.matrix, t.spectrum and not on_device, t.choices) for t in local]
    results = workers.map(measure_one, ahead(local, lambda task: checkpoint.expect(task.matrix)), lambda t: t.nbytes)
    shard = None
    for matrix in matrices:
        task = tasks.get(matrix.name)
        if task is not None:
            found = next(results) if task.choices or not on_device else Measured(None, {})
            if task.spectrum and on_device:
                found = Measured(next(apart), found.squared_errors)
            if cache is not None:
                cache.add(matrix.name, found.spectrum, found.squared_errors)
            if shard not in (None, checkpoint.shard_of[matrix.tensor]):
                checkpoint.forget(shard)
            shard = checkpoint.shard_of[matrix.tensor]
        else:
            found = Measured(None, {})
        kept = {c: known_errors[matrix.name, str(c)] for c in choices if c not in found.squared_errors}
        known = known_spectra[matrix.name] if spectra and found.spectrum is None else found.spectrum
        yield Measured(known, {choice: (found.squared_errors | kept)[choice] for choice in choices})


def ahead(items: Iterable[T], announce: Callable[[T], None]) -> Iterator[T]:
    """The items, each announced one before it is due."""
    last: list[T] = []
    for item in items:
        announce(item)
        yield from last
        last = [item]
    yield from last
