"""The smallest plan that keeps an expected acceptance rate: budgets tried for real, and the curve of what they gave.

Budgets are whole multiples of a step in stored bits per planned weight; roles outside the budget go along, a bit wider
than the experts (`rest_bits`). The widest is tried first, then the range is halved until two neighbours are left of
which the larger reaches the target and the smaller does not. Then the other roles keep their widths, and the experts'
budget goes down as long as the target is reached. Each trial plans, quantizes and scores the model, so the answer does
not rest on predicted losses. EAR grows with the budget but for what is within its noise; if it does not, the answer is
one such pair of neighbours, maybe not the smallest, and the curve shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

import alphaq
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.writer import atomic_file
from alphaq.engines.profile import ROLE_BITS, Profile
from alphaq.engines.profiles import ENGINES
from alphaq.errors import BudgetError
from alphaq.evaluation.certificate import Estimate, Settings, digest_of, figures
from alphaq.evaluation.fidelity import read_texts, score_texts, window_beginning
from alphaq.measuring.resources import USUAL, Resources
from alphaq.nouns.plan import Plan, SourceIdentity
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.settings import Budget
from alphaq.nouns.target import Reaches, Target
from alphaq.planning import Measurements, Request, Scope, make_plan, problem_of
from alphaq.trials.trial import Trials, settled, window_scores
from alphaq.writing.rounding import Rounding


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def reached(target: Target, ear: Estimate) -> bool:
    """Whether a model of this EAR will do."""
    return {"within": ear.high, "estimate": ear.value, "above": ear.low}[target.reaches] >= target.ear


class Point(_Record):
    """One budget that was tried. budget_bpw: stored bits per planned weight allowed, and the bits of
    roles outside; the others: what came of it."""

    budget_bpw: float
    attention_bits: int
    shared_bits: int
    bits_per_weight: float | None
    average_bits: float | None
    size_bytes: int | None
    predicted_loss: float | None
    ear: Estimate
    kl: Estimate
    perplexity_ratio: Estimate
    reached: bool
    seconds_to_quantize: float | None


class Curve(_Record):
    """Every budget that was tried, from small to large; what `--curve` writes.

    chosen: the plan's, null while the search is under way, or if nothing reaches the target. failed: one step less with
    the same widths of other roles, which does not reach it; null where that is not feasible.
    """

    format_version: Literal[1] = 1
    alphaq_version: str
    source: SourceIdentity
    engine: str
    method: str
    quantizer: str
    texts: dict[str, str]
    target: float
    reaches: Reaches
    step: float
    settings: Settings
    points: tuple[Point, ...]
    chosen: Point | None = None
    failed: Point | None = None

    def write(self, path: Path) -> None:
        """Put it at `path`, complete or not at all. Raises OutputError."""
        with atomic_file(path) as partial_file:
            partial_file.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def smallest_reaching(low: int, high: int, reaches: Callable[[int], bool]) -> int | None:
    """A step in [low, high] that reaches the target while the one before it does not, or is below `low`.

    None if not even `high` does. Each step is asked for at most once.
    """
    if not reaches(high):
        return None
    return _between(low - 1, high, reaches)


def _between(failing: int, reaching: int, reaches: Callable[[int], bool]) -> int:
    """A step that reaches the target while the one before it does not, from one that fails and one that reaches."""
    while reaching - failing > 1:
        middle = (failing + reaching) // 2
        failing, reaching = (failing, middle) if reaches(middle) else (middle, reaching)
    return reaching


def descend(low: int, high: int, reaches: Callable[[int], bool]) -> int:
    """The same from a step `high` that reaches, in strides that double: cheap where the answer is near."""
    failing, stride = low - 1, 1
    while high - stride >= low:
        if not reaches(high - stride):
            failing = high - stride
            break
        high, stride = high - stride, 2 * stride
    return _between(failing, high, reaches)


def require_searchable(profile: Profile) -> None:
    """Raise BudgetError for an engine whose files are not run here."""
    if not profile.searchable:
        able = " or ".join(name for name, one in ENGINES.items() if one.searchable)
        raise BudgetError(f"--ear searches plans for engine {able} only, not for {profile.name}. Use --size.")


@dataclass(frozen=True)
class Trying:
    """How budgets are tried.

    rounding: the engine's usual one by default. curve_file: written anew after every trial, so that what was found is
    kept whatever happens. scratch: where quantized matrices lie meanwhile; the system's temporary folder by default.
    told: gets each point as it is found.
    """

    scoring: Scoring
    rounding: Rounding | None = None
    curve_file: Path | None = None
    scratch: Path | None = None
    told: Callable[[Point], object] = lambda point: None


def search(
    checkpoint: Checkpoint,
    request: Request,
    measured: Measurements,
    target: Target,
    trying: Trying,
    resources: Resources = USUAL,
) -> tuple[Plan, Curve]:
    """The plan of the smallest budget that reaches the target, and the curve; the request's own budget is replaced.

    Raises BudgetError if even the widest choices do not reach the target, saying what they reach.
    """
    require_searchable(request.profile)
    if request.config.unweighted:
        raise BudgetError("--unweighted counts matrices, and --ear searches bytes. Drop one or the other.")
    contents = read_texts(trying.scoring.texts)
    low, high = _steps(checkpoint, request, measured, target.step)
    with TemporaryDirectory(prefix=".alphaq-search-", dir=trying.scratch) as folder:
        scoring, _ = settled(trying.scoring, checkpoint, high * target.step)
        trying = replace(trying, scoring=scoring)
        score = partial(score_texts, texts=contents, scoring=scoring)
        scratch = Path(folder) / "trials"
        trials = Trials(checkpoint, score, scratch, scoring, resources.wrap, resources.workers)
        tried = _Tried(checkpoint, request, measured, target, trying, trials, contents)
        step = smallest_reaching(low, high, tried.reaches)
        if step is None:
            raise _out_of_reach(target, tried.points[high, rest_bits(target.budget(high))])
        # Where the other roles became wider just there, experts may do with less now.
        rest = rest_bits(target.budget(step))
        step = descend(low, step, lambda step: tried.reaches(step, rest))
        curve = tried.curve().model_copy(
            update={"chosen": tried.points[step, rest], "failed": tried.points.get((step - 1, rest))}
        )
    if trying.curve_file is not None:
        curve.write(trying.curve_file)
    return tried.plans[step, rest], curve


class _Tried:
    """The budgets that were tried so far: plans and points by step and the bits of other roles."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        request: Request,
        measured: Measurements,
        target: Target,
        trying: Trying,
        trials: Trials,
        contents: Mapping[str, str],
    ) -> None:
        self.checkpoint, self.request, self.measured = checkpoint, request, measured
        self.target, self.trying, self.trials = target, trying, trials
        self.rounding = trying.rounding or Rounding.of(request.profile.name)
        self.digests = {name: digest_of(text) for name, text in contents.items()}
        self.plans: dict[tuple[int, int], Plan] = {}
        self.points: dict[tuple[int, int], Point] = {}

    def reaches(self, step: int, rest: int | None = None) -> bool:
        """Whether a budget of so many steps reaches the target; each is tried once."""
        bpw = self.target.budget(step)
        rest = rest or rest_bits(bpw)
        if (key := (step, rest)) not in self.points:
            self.plans[key] = _plan(self.checkpoint, self.request, self.measured, bpw, rest)
            tried = self.trials.run(self.plans[key], self.rounding)
            self.points[key] = _point(bpw, self.plans[key], tried, self.target)
            self.trying.told(self.points[key])
            if self.trying.curve_file is not None:
                self.curve().write(self.trying.curve_file)
        return self.points[key].reached

    def curve(self) -> Curve:
        """What was found so far."""
        scoring, target, trials = self.trying.scoring, self.target, self.trials
        return Curve(
            alphaq_version=alphaq.__version__,
            source=self.checkpoint.identity,
            engine=self.request.profile.name,
            method=self.request.config.method,
            quantizer=str(self.rounding),
            texts=self.digests,
            target=target.ear,
            reaches=target.reaches,
            step=target.step,
            settings=Settings(
                window=scoring.window,
                max_tokens=scoring.max_tokens,
                skip_tokens=scoring.skip_tokens,
                begins_with=window_beginning(trials.tokenizer, scoring.bos),
                dtype=scoring.dtype,
                computed_in=trials.computed_in,
                device=str(trials.reference.device),
                layer_by_layer=bool(scoring.stream),
            ),
            points=tuple(sorted(self.points.values(), key=lambda point: (point.size_bytes or 0, point.budget_bpw))),
        )


def _out_of_reach(target: Target, widest: Point) -> BudgetError:
    return BudgetError(
        f"Not even the widest choices reach an EAR of {target.ear:g}: with {widest.size_bytes:,} bytes "
        f"({widest.budget_bpw:g} bits per weight) it is {widest.ear}. Ask for less, or offer wider --choices, 16 "
        "among them; given --attention-bits and --shared-bits may be too narrow as well."
    )


def widest_bits(checkpoint: Checkpoint, request: Request, measured: Measurements, target: Target) -> float:
    """Of an expert weight, in the plan that a search tries first. Raises BudgetError as the search does."""
    return _steps(checkpoint, request, measured, target.step)[1] * target.step


def _steps(checkpoint: Checkpoint, request: Request, measured: Measurements, step: float) -> tuple[int, int]:
    """First and last step between the narrowest and the widest plan. Raises BudgetError if that is too many."""
    most = request.config.model_copy(update={"budget": Budget(bpw=32.0)})
    problem = problem_of(Scope.of(checkpoint, replace(request, config=most)), measured.evidence)
    parameters = sum(matrix.parameters for matrix in checkpoint.planned)
    least, most_bytes = (int(problem.unit_costs.min(axis=1).sum()), int(problem.unit_costs.max(axis=1).sum()))
    low, high = (math.ceil(8 * nbytes / parameters / step - 1e-9) for nbytes in (least, most_bytes))
    return low, max(low, high)


def _plan(checkpoint: Checkpoint, request: Request, measured: Measurements, bpw: float, rest: int) -> Plan:
    config = request.config
    widths = {name: rest for name in ("attention_bits", "shared_bits") if getattr(config, name) is None}
    config = config.model_copy(update={"budget": Budget(bpw=bpw), **widths})
    made = make_plan(checkpoint, replace(request, config=config), measured)
    return made.model_copy(update={"unchecked": "--ear tries plans on your texts"} if config.check else {})


def rest_bits(bpw: float) -> int:
    """Bits of roles outside the budget, where none were asked for: at least one more than the experts have.

    At the usual 4 bits attention and shared experts alone may cost more than the target allows, however much the
    experts get; and they are few, so that a bit more of them costs little. What has no next width up to 8 keeps its 16.
    """
    bits = max(*ROLE_BITS.values(), math.ceil(bpw - 1e-9) + 1)
    return bits if bits <= 8 else 16


def _point(bpw: float, plan: Plan, tried: Mapping[str, Any], target: Target) -> Point:
    overall, _ = figures(window_scores(tried["scores"]))
    widths = plan.config
    assert widths is not None and widths.attention_bits is not None and widths.shared_bits is not None  # by `_plan`
    return Point(
        budget_bpw=bpw,
        attention_bits=widths.attention_bits,
        shared_bits=widths.shared_bits,
        bits_per_weight=plan.bits_per_weight,
        average_bits=plan.average_bits,
        size_bytes=plan.size_bytes,
        predicted_loss=plan.objective,
        ear=overall.ear,
        kl=overall.kl,
        perplexity_ratio=overall.perplexity_ratio,
        reached=reached(target, overall.ear),
        seconds_to_quantize=tried["seconds_to_quantize"],
    )
