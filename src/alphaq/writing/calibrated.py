"""Quantize while tokens pass through the model: each matrix is rounded for the inputs that it will get.

What is rounded takes the place of the original at once, so the inputs of later matrices are those of the quantized
model. Peak memory is that of the pass (calibration/stream.py), the moments of one matrix's inputs, and its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from alphaq.calibration.inputs import Inputs, stream_inputs
from alphaq.calibration.proxy import Proxy
from alphaq.calibration.text import SELF, Text
from alphaq.checkpoint.files import PlainFile
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import read_header
from alphaq.engines.export import Stored, stored_in
from alphaq.engines.output import QuantizeOptions, Record
from alphaq.engines.profiles import profile
from alphaq.errors import AlphaQError, CheckpointError, PlanError
from alphaq.nouns.matrix import MatrixRef
from alphaq.quantizers.base import FORMERLY, QUANTIZERS, Rounder, looks_at_inputs, offered, rounded_by_inputs
from alphaq.registry import unknown
from alphaq.writing.tasks import StoreTask, store

DOUBT = 0.2  # of the mean diagonal, where there are as many tokens as columns (docs/LOG.md)
ENOUGH, MOST = 2, 131_072  # tokens for each column of an average expert; tokens, unless asked for otherwise


def enough_tokens(checkpoint: Checkpoint) -> int:
    """How many tokens give the experts' inputs more tokens than columns, as far as they are used alike."""
    experts = checkpoint.architecture.experts_per_layer(checkpoint.config)
    chosen = int(checkpoint.text_config.get("num_experts_per_tok") or 1)
    columns = max(matrix.shape[1] for matrix in checkpoint.planned)
    return min(max(Text.tokens, ENOUGH * columns * max(1, experts) // chosen), MOST)


@dataclass(frozen=True)
class Rounding:
    """How matrices are quantized: `plain` needs no inputs, `calibrated` improves on it; names in QUANTIZERS."""

    plain: str
    calibrated: str | None = None
    inputs: Text | Proxy | None = None
    coded: bool = False
    """Whether codes will be entropy-coded, and may then take no more bytes than those of `plain`."""

    @classmethod
    def of(cls, engine: str, name: str | None = None, inputs: Text | Proxy | None = None) -> Rounding:
        """What a user means by a quantizer's name; the engine's usual one without. Raises PlanError, AlphaQError."""
        usual = profile(engine).quantizer
        if name in FORMERLY:
            raise AlphaQError(f"Quantizer {name} is called {FORMERLY[name]} now. Use --quantizer {FORMERLY[name]}.")
        if looks_at_inputs(name) and QUANTIZERS[usual].library is not None:
            raise PlanError(
                f"Quantizer {name} cannot be used for {engine}, whose types llama.cpp's own code rounds. Drop it, or "
                "give --imatrix."
            )
        if name is not None and name not in (known := offered(usual)):
            raise AlphaQError(unknown(f"quantizer of engine {engine}", name, known))
        if not looks_at_inputs(name):
            if inputs is not None:
                raise AlphaQError(f"--calibration is of no use to quantizer {name or usual}. Drop it.")
            return cls(name or usual)
        return cls(usual, name, inputs or Text(SELF))

    @property
    def name(self) -> str:
        """The quantizer, as users call it."""
        return self.calibrated or self.plain

    def options(self, engine: str, pre_tokenizer: str | None = None) -> QuantizeOptions:
        """What a user types for it."""
        usual = self == Rounding.of(engine)
        text = self.inputs if isinstance(self.inputs, Text) else None
        return QuantizeOptions(
            quantizer=None if usual else self.name,
            calibration=None if self.inputs is None else text.name if text else str(self.inputs),
            calibration_tokens=text.tokens if text else None,
            pre_tokenizer=pre_tokenizer,
        )

    def __str__(self) -> str:
        """Tells apart what leaves other bytes."""
        coded = "coded" if self.coded else ""
        parts = (self.calibrated, self.plain, self.inputs, QUANTIZERS[self.plain].version, coded)
        return " ".join(str(part) for part in parts if part)


def store_calibrated(
    checkpoint: Checkpoint,
    tasks: Sequence[StoreTask],
    rounding: Rounding,
    keep: Callable[[StoreTask, Record], None],
) -> dict[str, str]:
    """Make the entries whose inputs are seen when the rounding's text passes; `keep` gets each record.

    With a proxy in place of a text all are made, one after the other. Returns matrices that were seen but quantized
    without their inputs, and why. Raises what `stream_inputs` does.
    """
    assert rounding.calibrated is not None and rounding.inputs is not None  # a text goes with it
    quantizer = rounding.calibrated
    left: dict[str, str] = {}
    files = {place.file: task.folder / place.file for task in tasks for place in task.entry.places}
    stored = stored_in({name: read_header(path)[0] for name, path in files.items()})
    by_name = {task.entry.source.name: task for task in tasks if isinstance(task.entry.source, MatrixRef)}

    def visit(inputs: Inputs) -> list[Tensor]:
        moments: Tensor | None = None
        restored = []
        for matrix in inputs.matrices:
            task = by_name.get(matrix.name)
            if task is None or task.entry.choice is None or task.entry.choice.kept:
                restored.append(checkpoint.read(matrix).float())
                continue
            if reason := _too_few(inputs, matrix):
                left[matrix.name] = reason
                round_ = None
            else:
                moments = _damped_moments(inputs) if moments is None else moments
                round_ = _rounder(rounding, moments)
            record = store(checkpoint, task, round_)
            keep(task, record)
            restored.append(_read_back(checkpoint, task, matrix, stored))
        return restored

    try:
        if isinstance(rounding.inputs, Proxy):
            _store_by_proxy(checkpoint, tasks, rounding, rounding.inputs, keep)
        else:
            stream_inputs(checkpoint, rounding.inputs.windows(checkpoint), visit)
    except CheckpointError as error:
        what = str(error).partition(" Use --method alphaq")[0]
        raise CheckpointError(
            f"{what} Quantizer {quantizer} needs that; --quantizer {rounding.plain} and --calibration identity do not."
        ) from error
    return left


def _store_by_proxy(
    checkpoint: Checkpoint,
    tasks: Sequence[StoreTask],
    rounding: Rounding,
    proxy: Proxy,
    keep: Callable[[StoreTask, Record], None],
) -> None:
    known = proxy.diagonals(checkpoint)
    for task in tasks:
        matrix, choice = task.entry.source, task.entry.choice
        if not isinstance(matrix, MatrixRef) or choice is None or choice.kept:
            continue
        moments = proxy.diagonal(known, matrix)
        round_ = _rounder(rounding, moments)
        keep(task, store(checkpoint, task, round_))


def _rounder(rounding: Rounding, moments: Tensor) -> Rounder:
    """What rounds matrices whose inputs have these second moments."""
    return partial(
        rounded_by_inputs, quantizer=rounding.name, plain=rounding.plain, moments=moments, coded=rounding.coded
    )


def _damped_moments(inputs: Inputs) -> Tensor:
    """Second moments that trust correlations the less, the fewer tokens show them."""
    moments, (tokens, columns) = inputs.second_moments(), inputs.values.shape
    moments.diagonal().add_(DOUBT * columns / tokens * moments.diagonal().mean())
    return moments


def _too_few(inputs: Inputs, matrix: MatrixRef) -> str:
    """Why a matrix cannot be calibrated, or nothing."""
    tokens, columns = inputs.values.shape
    if tokens < columns:
        return f"{tokens} tokens reached it, fewer than its {columns} columns"
    return "" if inputs.values.any() else "its inputs are all zero"


def _read_back(checkpoint: Checkpoint, task: StoreTask, matrix: MatrixRef, stored: Mapping[str, Stored]) -> Tensor:
    """What the engine will compute with, float32 [rows, columns]; the original where the engine has another layout."""
    entry = task.entry
    if entry.form.changes:
        return checkpoint.read(matrix).float()
    assert entry.choice is not None  # it is a matrix
    parts = [
        stored[tensor].typed(PlainFile(task.folder / place.file).read(place.begin, place.nbytes))
        for (tensor, _), place in zip(entry.parts, entry.places, strict=True)
    ]
    rows = profile(task.engine).writer.reader(parts, entry.choice, matrix.shape, matrix.name)
    return rows(slice(0, matrix.shape[0])).float()
