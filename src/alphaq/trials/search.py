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
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

import alphaq
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.writer import atomic_file
from alphaq.engines.profile import ROLE_BITS, Profile
from alphaq.engines.profiles import ENGINES
from alphaq.errors import BudgetError
from alphaq.evaluation.certificate import Estimate, Settings, digest_of, figures
from alphaq.evaluation.fidelity import read_texts, score_texts, window_beginning
from alphaq.nouns.plan import Plan, SourceIdentity
from alphaq.nouns.settings import Budget
from alphaq.planning import Measurements, Request, Scope, make_plan, problem_of
from alphaq.trials.trial import Trials, window_scores
from alphaq.work.workers import Workers, Wrap, silent
from alphaq.writing.calibrated import Rounding

Reaches = Literal["within", "estimate", "above"]
REACHES = get_args(Reaches)
STEP = 1 / 16


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Target(_Record):
    """What is searched for, and how it is measured.

    reaches: when an EAR counts as reached: `within` the interval, or below it; by its `estimate`; or wholly `above`.
    step: in stored bits per planned weight.
    """

    ear: float
    reaches: Reaches = "within"
    step: float = STEP
    window: int = 512
    max_tokens: int | None = None
    skip_tokens: int = 0
    dtype: str = "float32"
    device: str | None = None
    bos: bool = True

    def budget(self, steps: int) -> float:
        """Stored bits per planned weight of so many steps."""
        return round(steps * self.step, 9)

    def reached(self, ear: Estimate) -> bool:
        """Whether a model of this EAR will do."""
        return {"within": ear.high, "estimate": ear.value, "above": ear.low}[self.reaches] >= self.ear


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


def search(
    checkpoint: Checkpoint,
    request: Request,
    found: Measurements,
    texts: list[Path],
    target: Target,
    rounding: Rounding | None = None,
    curve_file: Path | None = None,
    scratch: Path | None = None,
    wrap: Wrap = silent,
    workers: Workers | None = None,
    told: Callable[[Point], Any] = lambda point: None,
) -> tuple[Plan, Curve]:
    """The plan of the smallest budget that reaches the target, and the curve; the request's own budget is replaced.

    curve_file: written anew after every trial, so that what was found is kept whatever happens. scratch: where
    quantized matrices lie meanwhile; the system's temporary folder by default. told: gets each point as it is found.
    Raises BudgetError if even the widest choices do not reach the target, saying what they reach.
    """
    require_searchable(request.profile)
    if request.config.unweighted:
        raise BudgetError("--unweighted counts matrices, and --ear searches bytes. Drop one or the other.")
    rounding = rounding or Rounding.of(request.profile.name)
    contents = read_texts(texts)
    low, high = _steps(checkpoint, request, found, target.step)
    score = partial(
        score_texts,
        texts=contents,
        window=target.window,
        max_tokens=target.max_tokens,
        skip_tokens=target.skip_tokens,
        bos=target.bos,
    )
    plans: dict[tuple[int, int], Plan] = {}
    points: dict[tuple[int, int], Point] = {}
    with TemporaryDirectory(prefix=".alphaq-search-", dir=scratch) as folder:
        trials = Trials(checkpoint, score, Path(folder) / "trials", target.dtype, wrap, workers, target.device)
        curve = _curve(checkpoint, request, rounding, contents, target, trials)

        def reaches(step: int, rest: int | None = None) -> bool:
            rest = rest or rest_bits(target.budget(step))
            if (key := (step, rest)) not in points:
                plans[key] = _plan(checkpoint, request, found, target.budget(step), rest)
                points[key] = _point(target.budget(step), plans[key], trials.run(plans[key], rounding), target)
                told(points[key])
                if curve_file is not None:
                    _with_points(curve, points).write(curve_file)
            return points[key].reached

        step = smallest_reaching(low, high, reaches)
        if step is None:
            best = points[high, rest_bits(target.budget(high))]
            raise BudgetError(
                f"Not even the widest choices reach an EAR of {target.ear:g}: with {best.size_bytes:,} bytes "
                f"({best.budget_bpw:g} bits per weight) it is {best.ear}. Ask for less, or offer wider --choices, 16 "
                "among them; given --attention-bits and --shared-bits may be too narrow as well."
            )
        # Where the other roles became wider just there, experts may do with less now.
        rest = rest_bits(target.budget(step))
        step = descend(low, step, lambda step: reaches(step, rest))
    curve = _with_points(curve, points).model_copy(
        update={"chosen": points[step, rest], "failed": points.get((step - 1, rest))}
    )
    if curve_file is not None:
        curve.write(curve_file)
    return plans[step, rest], curve


def _steps(checkpoint: Checkpoint, request: Request, found: Measurements, step: float) -> tuple[int, int]:
    """First and last step between the narrowest and the widest plan. Raises BudgetError if that is too many."""
    most = request.config.model_copy(update={"budget": Budget(bpw=32.0)})
    problem = problem_of(Scope.of(checkpoint, replace(request, config=most)), found.evidence)
    parameters = sum(matrix.parameters for matrix in checkpoint.planned)
    least, most_bytes = (int(problem.unit_costs.min(axis=1).sum()), int(problem.unit_costs.max(axis=1).sum()))
    low, high = (math.ceil(8 * nbytes / parameters / step - 1e-9) for nbytes in (least, most_bytes))
    return low, max(low, high)


def _plan(checkpoint: Checkpoint, request: Request, found: Measurements, bpw: float, rest: int) -> Plan:
    config = request.config
    widths = {name: rest for name in ("attention_bits", "shared_bits") if getattr(config, name) is None}
    config = config.model_copy(update={"budget": Budget(bpw=bpw), **widths})
    made = make_plan(checkpoint, replace(request, config=config), found)
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
    return Point(
        budget_bpw=bpw,
        attention_bits=plan.config["attention_bits"],
        shared_bits=plan.config["shared_bits"],
        bits_per_weight=plan.bits_per_weight,
        average_bits=plan.average_bits,
        size_bytes=plan.size_bytes,
        predicted_loss=plan.objective,
        ear=overall.ear,
        kl=overall.kl,
        perplexity_ratio=overall.perplexity_ratio,
        reached=target.reached(overall.ear),
        seconds_to_quantize=tried["seconds_to_quantize"],
    )


def _curve(
    checkpoint: Checkpoint,
    request: Request,
    rounding: Rounding,
    contents: Mapping[str, str],
    target: Target,
    trials: Trials,
) -> Curve:
    """The curve before the first trial."""
    return Curve(
        alphaq_version=alphaq.__version__,
        source=checkpoint.identity,
        engine=request.profile.name,
        method=request.config.method,
        quantizer=str(rounding),
        texts={name: digest_of(text) for name, text in contents.items()},
        target=target.ear,
        reaches=target.reaches,
        step=target.step,
        settings=Settings(
            window=target.window,
            max_tokens=target.max_tokens,
            skip_tokens=target.skip_tokens,
            begins_with=window_beginning(trials.tokenizer, target.bos),
            dtype=target.dtype,
            computed_in=trials.computed_in,
            device=str(trials.reference.device),
        ),
        points=(),
    )


def _with_points(curve: Curve, points: Mapping[Any, Point]) -> Curve:
    ordered = sorted(points.values(), key=lambda point: (point.size_bytes or 0, point.budget_bpw))
    return curve.model_copy(update={"points": tuple(ordered)})
