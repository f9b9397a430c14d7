"""Passes through the model that methods ask for by name. To add one: a function and a line in `PASSES`."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch

from alphaq.calibration.prior import routing_prior, seen_uses
from alphaq.calibration.text import Text, own_writing
from alphaq.calibration.tokens import model_prefix
from alphaq.calibration.traffic import FORMAT_VERSION, PROBE, Calibration, Expert, ExpertUse, gather
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import CheckpointError, QuantizationError
from alphaq.measuring.resources import Resources
from alphaq.nouns.choice import Choice
from alphaq.sensitivity.base import Need
from alphaq.simd.sums import squared_norm
from alphaq.work.workers import Wrap

SYNTHETIC_WINDOWS, SYNTHETIC_LENGTH = 8, 256


@dataclass(frozen=True)
class PassRun:
    """What a pass may look at.

    choices: those whose output errors are wanted. observed: how the engine itself runs what transformers cannot.
    results: of earlier passes.
    """

    checkpoint: Checkpoint
    bos: bool
    text: Text | None
    choices: tuple[Choice, ...]
    resources: Resources
    observed: Callable[[Checkpoint, int, int, bool, Wrap], Calibration] | None = None
    results: Mapping[Need, Any] = field(default_factory=dict)


def synthetic(run: PassRun) -> Calibration:
    """How errors join the signal, seen with random tokens that the model has rewritten once."""
    by_engine = run.observed if run.checkpoint.plain else None
    shape = SYNTHETIC_WINDOWS, SYNTHETIC_LENGTH

    def make() -> str:
        if by_engine is not None:  # which shows its own progress
            return by_engine(run.checkpoint, *shape, run.bos, run.resources.wrap).to_json()
        ids = own_writing(run.checkpoint, *shape, run.bos)
        return gather(run.checkpoint, ids, with_signal=True).to_json()

    prefix = model_prefix(run.checkpoint) if run.bos else ()
    tokens = f"{SYNTHETIC_WINDOWS}x{SYNTHETIC_LENGTH} after {prefix}"
    if by_engine is not None:  # which knows what comes first even where the metadata do not say
        tokens += f" with BOS {run.bos}"
    return _remembered(run, "synthetic", tokens, make, None if by_engine else "random tokens")


def prior(run: PassRun) -> Mapping[Expert, ExpertUse]:
    """How a router uses its experts, from its weights, or where it sees more than a norm's output by random tokens."""
    if run.checkpoint.architecture.router_norm:
        return routing_prior(run.checkpoint)
    return seen_uses(run.results["synthetic"] if "synthetic" in run.results else synthetic(run))


def text(run: PassRun) -> Calibration:
    """What the tokens of a text do to each expert."""
    source = run.text
    assert source is not None  # methods that need one are refused without

    def make() -> str:
        return gather(run.checkpoint, source.windows(run.checkpoint), run.choices, with_baq=True).to_json()

    tokens = f"{source} {' '.join(map(str, run.choices))}"
    return _remembered(run, "text", tokens, make, f"calibrate on {source.name}")


PASSES: dict[Need, Callable[[PassRun], Any]] = {"synthetic": synthetic, "prior": prior, "text": text}
"""In the order in which they run: a pass may use what an earlier one found."""


def run_passes(run: PassRun, needs: Collection[Need]) -> tuple[dict[Need, Any], dict[Need, float]]:
    """What those that are needed found, and the seconds that each took; what the cache held took next to none.

    Raises QuantizationError naming a damaged tensor, and what the passes raise.
    """
    results: dict[Need, Any] = {}
    seconds: dict[Need, float] = {}
    for need, found_by in PASSES.items():
        if need in needs:
            begin = time.perf_counter()
            results[need] = _sound(replace(run, results=results), found_by)
            seconds[need] = time.perf_counter() - begin
    return results, seconds


def _remembered(run: PassRun, kind: str, tokens: str, make: Callable[[], str], label: str | None) -> Calibration:
    """A pass through the model, or what the cache keeps of one with the same model, code and tokens.

    label: None where no progress is to be shown.
    """
    cache = run.resources.cache
    depends_on = f"{tokens} {PROBE} {FORMAT_VERSION} {run.checkpoint.settings_digest()}"
    key = f"{kind}-{hashlib.sha256(depends_on.encode()).hexdigest()[:24]}.json"
    calibration = Calibration()
    for _ in [key] if label is None else run.resources.wrap([key], 1, label):
        if cache is None:
            calibration = Calibration.from_json(make(), key)
        else:
            calibration = cache.recall(key, make, Calibration.from_json)
    return calibration


def _sound(run: PassRun, found_by: Callable[[PassRun], Any]) -> Any:
    """What a pass found. Raises QuantizationError naming a damaged tensor if it met NaN or infinity.

    Where sound weights overflow, the numbers stay as they are: methods take them for undefined or refuse them.
    """
    try:
        result = found_by(run)
    except CheckpointError as error:
        if isinstance(error.__cause__ or error.__context__, torch.linalg.LinAlgError):  # of NaN no matrix is positive
            _refuse_damaged(run.checkpoint)
        raise
    if not _finite(result):
        _refuse_damaged(run.checkpoint)
    return result


def _finite(result: object) -> bool:
    if isinstance(result, float):
        return math.isfinite(result)
    if isinstance(result, Mapping):
        return all(map(_finite, result.values()))
    return not is_dataclass(result) or all(_finite(getattr(result, one.name)) for one in fields(result))


def _refuse_damaged(checkpoint: Checkpoint) -> None:
    """Raise QuantizationError for the first tensor with a weight that is no number, if there is one."""
    of_matrices = {matrix.tensor for matrix in checkpoint.matrices}
    for name in sorted(checkpoint.shard_of.keys() - of_matrices):
        _refuse_if_damaged(checkpoint.tensor(name), name)
    for matrix in checkpoint.matrices:
        _refuse_if_damaged(checkpoint.read(matrix), matrix.name)


def _refuse_if_damaged(values: torch.Tensor, name: str) -> None:
    if values.is_floating_point() and not math.isfinite(squared_norm(values)):
        raise QuantizationError(f"{name} holds NaN or infinite weights. The checkpoint is damaged.")
