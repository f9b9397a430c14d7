"""Passes through the model that methods ask for by name. To add one: a function and a line in `PASSES`."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

from alphaq.calibration.dropping import DROPS_VERSION, Drops, gather_drops, require_rankable
from alphaq.calibration.fisher import FISHER_VERSION, Fisher, gather_fisher
from alphaq.calibration.prior import FEW_SAMPLES, PRIOR_VERSION, SAMPLES, routing_prior, seen_uses
from alphaq.calibration.text import Text, own_text, own_writing, writes
from alphaq.calibration.tokens import model_prefix
from alphaq.calibration.traffic import FORMAT_VERSION, PROBE, Calibration, Expert, ExpertUse, gather
from alphaq.checkpoint.families.routing import experts_per_token
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import CheckpointError, PassError, QuantizationError
from alphaq.measuring.resources import Resources
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Role
from alphaq.sensitivity.base import Need
from alphaq.simd.sums import squared_norm
from alphaq.work.workers import Wrap

T = TypeVar("T")
SYNTHETIC_WINDOWS, SYNTHETIC_LENGTH = 8, 256
FISHER_LENGTH = 128
FEWEST_WINDOWS, MOST_WINDOWS = 8, 32
REWRITTEN = 8, 32
"""Windows and tokens of a model that is too large to write token by token; more where an expert would see fewer than
`EXPERT_TOKENS` on average."""
EXPERT_TOKENS = 16
FISHER_WORK = 5 * 10**11
"""Tokens × weights that a token meets, up to which there are more than the fewest windows: a minute on two cores."""


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


def fisher(run: PassRun) -> Fisher:
    """What a change of weights costs, on tokens that the model has written, with gradients of tokens that it draws."""
    checkpoint = run.checkpoint
    if checkpoint.plain:
        raise PassError(f"{checkpoint.name} is known by its tensors' names alone, so only its engine can run it.")
    prefix = model_prefix(checkpoint) if run.bos else ()
    windows, length = fisher_shape(checkpoint)

    def make() -> str:
        ids = own_text(checkpoint, windows, length, run.bos)
        uses = routing_prior(checkpoint, FEW_SAMPLES) if checkpoint.architecture.router_norm else {}
        return gather_fisher(checkpoint, ids, uses, max(1, len(prefix))).to_json()

    depends_on = f"{windows}x{length} after {prefix} {FISHER_VERSION} {checkpoint.settings_digest()}"
    return _recalled(run, "fisher", depends_on, make, "own writing", Fisher.from_json)


def drops(run: PassRun) -> Drops:
    """What layers lose without some of their experts, on the same tokens."""
    checkpoint = run.checkpoint
    require_rankable(checkpoint)
    prefix = model_prefix(checkpoint) if run.bos else ()
    windows, length = fisher_shape(checkpoint)

    def make() -> str:
        known = run.results.get("fisher")
        ids = own_text(checkpoint, windows, length, run.bos) if known is None else torch.tensor(known.tokens)
        return gather_drops(checkpoint, ids, max(1, len(prefix))).to_json()

    depends_on = f"{windows}x{length} after {prefix} {DROPS_VERSION} {checkpoint.settings_digest()}"
    return _recalled(run, "drops", depends_on, make, "experts left out", Drops.from_json)


def fisher_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many windows are taken, and of how many tokens.

    A model that writes token by token writes as much as the work allows. What one rewrites is further from text, of
    which more changes nothing (docs/research/log.md).
    """
    experts = checkpoint.architecture.experts_per_layer(checkpoint.config)
    share = experts_per_token(checkpoint.architecture, checkpoint.config) / experts if experts else 1.0
    if not writes(checkpoint):
        windows, length = REWRITTEN
        return windows, length * max(1, math.ceil(EXPERT_TOKENS / (windows * length * share)))
    met = sum(
        matrix.parameters * (share if matrix.role is Role.EXPERT else 1.0)
        for matrix in checkpoint.matrices
        if matrix.role is not Role.EMBEDDING or not checkpoint.with_role(Role.HEAD)
    )
    affordable = FISHER_WORK // (FISHER_LENGTH * max(1.0, met))
    return int(min(MOST_WINDOWS, max(FEWEST_WINDOWS, affordable))), FISHER_LENGTH


def prior(run: PassRun) -> Mapping[Expert, ExpertUse]:
    """How a router uses its experts, from its weights, or where it sees more than a norm's output by random tokens."""
    checkpoint = run.checkpoint
    if checkpoint.architecture.router_norm:
        seen = f"{SAMPLES} {PRIOR_VERSION} without {sorted(checkpoint.dropped.items())}"

        def make() -> str:
            return Calibration(routing_prior(checkpoint)).to_json()

        return _remembered(run, "prior", seen, make, None).experts
    return seen_uses(run.results["synthetic"] if "synthetic" in run.results else synthetic(run))


def text(run: PassRun) -> Calibration:
    """What the tokens of a text do to each expert."""
    source = run.text
    assert source is not None  # methods that need one are refused without

    def make() -> str:
        return gather(run.checkpoint, source.windows(run.checkpoint), run.choices, with_baq=True).to_json()

    tokens = f"{source} {' '.join(map(str, run.choices))}"
    return _remembered(run, "text", tokens, make, f"calibrate on {source.name}")


PASSES: dict[Need, Callable[[PassRun], Any]] = {
    "fisher": fisher,
    "drops": drops,
    "synthetic": synthetic,
    "prior": prior,
    "text": text,
}
"""In the order in which they run: a pass may use what an earlier one found."""


@dataclass(frozen=True)
class PassResults:
    """What passes found, by name.

    seconds: that each took; what the cache held took next to none. unpredicted: why there is no Fisher information,
    where it was asked for.
    """

    found: Mapping[Need, Any]
    seconds: Mapping[Need, float]
    unpredicted: str | None


def run_passes(run: PassRun, needs: Collection[Need], otherwise: Collection[Need] = ()) -> PassResults:
    """What those that are needed found.

    otherwise: what is needed where the Fisher information cannot be had; without any, that is an error.

    Raises QuantizationError naming a damaged tensor, and what the passes raise.
    """
    results: dict[Need, Any] = {}
    seconds: dict[Need, float] = {}
    unpredicted = None
    for need, found_by in PASSES.items():
        if need in needs:
            begin = time.perf_counter()
            try:
                results[need] = _sound(replace(run, results=results), found_by)
            except PassError as error:
                if need != "fisher" or not otherwise:
                    raise
                needs, unpredicted = {*needs, *otherwise}, error.reason
            seconds[need] = time.perf_counter() - begin
    return PassResults(results, seconds, unpredicted)


def _remembered(run: PassRun, kind: str, tokens: str, make: Callable[[], str], label: str | None) -> Calibration:
    """A pass through the model, or what the cache keeps of one with the same model, code and tokens."""
    depends_on = f"{tokens} {PROBE} {FORMAT_VERSION} {run.checkpoint.settings_digest()}"
    return _recalled(run, kind, depends_on, make, label, Calibration.from_json)


def _recalled(
    run: PassRun, kind: str, depends_on: str, make: Callable[[], str], label: str | None, parse: Callable[[str], T]
) -> T:
    """label: None where no progress is to be shown."""
    cache = run.resources.cache
    key = f"{kind}-{hashlib.sha256(depends_on.encode()).hexdigest()[:24]}.json"
    (found,) = (
        parse(make()) if cache is None else cache.recall(key, make, parse)
        for _ in ([key] if label is None else run.resources.wrap([key], 1, label))
    )
    return found


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
