"""A plan improved by what it does to the model: measured KL on the model's own writing instead of predicted losses.

In rounds. Plans near the best one so far are drawn, one backward pass through each tells what every single exchange of
a unit's choice would do (exchange.py), and the budget is solved again for exchanges, exactly. What comes out is judged
on tokens that no gradient was taken on, beside more cautious solutions, and the best is taken if its KL is lower by
more than one standard error of the difference, window by window: the best of many tries on the same tokens is a little
better there by chance alone. It ends when a round gains next to nothing.

Everything that was measured is in a journal beside the output, so a killed run goes on and comes to the same plan.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import torch

from alphaq.calibration.tokens import model_prefix
from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.profiles import profile
from alphaq.errors import BudgetError, OutputError, PassError, PlanError
from alphaq.measuring.measurement import restored
from alphaq.measuring.resources import USUAL, Resources
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan, PlanTable, Refinement
from alphaq.quantizers.base import QUANTIZERS
from alphaq.registry import lookup
from alphaq.trials.bench import Bench, Windows, own_tokens, require_memory
from alphaq.trials.exchange import Moves, Slopes, best_columns, drawn_states, exchanged, moves_from, scaled_moves
from alphaq.trials.refined import described, size_of
from alphaq.work.journal import Journal
from alphaq.work.untrusted import JsonObject
from alphaq.writing.planned import check_importance, check_source, plan_choices

T = TypeVar("T")
REFINE_VERSION = 2  # raise it whenever the same run would come to another plan
LENGTH = 256
TRAINING_WINDOWS, JUDGING_WINDOWS = 64, 48
SAMPLES, FEWEST_SAMPLES = 24, 8  # gradients of a round
WORK = 2**38  # tokens of a gradient × weights, up to which it sees more than the fewest
FEWEST_TOKENS, MOST_TOKENS = 1024, 4096
CAUTIONS = (0.0, 1.0, 2.0)  # standard errors by which exchanges must be better, tried in turn
MOST_ROUNDS = 8
LEAST_GAIN = 0.01  # of the KL, in a round
LEAST_FACTOR = 0.1  # of the median: a group that seems to cost nothing is not known so well
Way = Literal["gradients", "groups"]


@dataclass(frozen=True)
class Refining:
    """How a plan is refined.

    samples: gradients of a round. tokens: of each gradient; by default as many as a small model can do with in seconds.
    by: what tells what exchanges do. imatrix: that the plan was made with. restart: whether to forget what an
    unfinished run has measured.
    told: gets a line about every round.
    """

    seed: int = 0
    samples: int = SAMPLES
    tokens: int | None = None
    by: Way = "gradients"
    imatrix: ImportanceMatrix | None = None
    restart: bool = False
    told: Callable[[str], object] = lambda line: None

    def __post_init__(self) -> None:
        """Raise PlanError for too few gradients: an exchange is measured twice at each end, or not at all."""
        if self.samples < FEWEST_SAMPLES:
            raise PlanError(
                f"{self.samples} gradients a round measure no exchange. Take at least {FEWEST_SAMPLES} (--gradients)."
            )

    def windows(self, checkpoint: Checkpoint) -> int:
        """Of each gradient."""
        weights = sum(matrix.parameters for matrix in checkpoint.matrices)
        usual = min(MOST_TOKENS, max(FEWEST_TOKENS, WORK // max(1, weights)))
        return max(1, (self.tokens or usual) // LENGTH)


def way(name: str) -> Way:
    """A way by its name. Raises UnknownNameError."""
    return lookup("way to refine", {known: known for known in get_args(Way)}, name)


def refine(checkpoint: Checkpoint, plan: Plan, refining: Refining, state: Path, resources: Resources = USUAL) -> Plan:
    """The plan with units' choices exchanged, at no more bytes and less KL; or the same if none is found.

    state: file for what was measured; remove it once the plan is kept somewhere, until then the same call gives the
    same plan at once. It is not left behind by a run that no other can bring to an end. Raises PlanError for a plan
    that cannot be refined or a model that does not fit into memory, OutputError if the file is of another run, and as
    `HeldModel` does.
    """
    require_refinable(checkpoint, plan, refining.imatrix)
    require_memory(checkpoint, plan, (TRAINING_WINDOWS + JUDGING_WINDOWS) * LENGTH)
    try:
        with Journal(state) as journal:
            memory = _Memory(journal, _job(checkpoint, plan, refining), state, refining.restart)
            run = _Run.of(checkpoint, plan, refining, resources, memory)
            columns, judged = run.rounds()
            return described(checkpoint, plan, run.bench, columns, _record(run, columns, judged))
    except PlanError:
        state.unlink(missing_ok=True)
        raise
    except PassError as error:
        state.unlink(missing_ok=True)
        raise PlanError(f"{error.reason} So its plan cannot be refined here; quantize with it as it is.") from error


def require_refinable(checkpoint: Checkpoint, plan: Plan, imatrix: ImportanceMatrix | None) -> None:
    """Raise PlanError for a plan whose choices cannot be exchanged under its budget, or not on this checkpoint."""
    check_source(checkpoint, plan.engine)
    plan_choices(plan, checkpoint)
    check_importance(plan, imatrix)
    config = plan.settings
    if checkpoint.store is not None:
        raise PlanError(
            f"Refining runs the model, and {checkpoint.store.url} is not on this machine. Download it first."
        )
    if plan.table is None or config is None:
        raise PlanError(
            "The plan has no table of what else its matrices could be, like one made by hand. Make one with "
            "`alphaq plan`."
        )
    if not _agrees(plan, plan.table):
        raise PlanError(
            "The plan's choices are not those of its table, so what they cost is not known. Undo what was edited, or "
            "make a new plan with --pin."
        )
    if plan.refined is not None and plan.refined.moved:
        raise PlanError(
            "The plan is refined already. Refine the one that it was made from, with another --seed for one."
        )
    if plan.counts_codes:
        raise PlanError(
            "The plan counts bits without scales, so its bytes are not its budget. Plan with --size or --bits."
        )
    if config.per_layer:
        raise PlanError("The plan has a budget for each layer (--per-layer), and refining moves bytes between them.")
    if config.min_speed is not None or (plan.memory is not None and plan.memory.placement is not None):
        raise PlanError(
            "The plan keeps a speed or parts its weights between card and memory, and refining moves bytes without "
            "looking at either. Refine one without --min-speed and --vram."
        )
    if plan.codec is not None:
        raise PlanError(
            "Refining counts bytes of fixed-length files, and the plan is for coded ones. Refine one without --codec, "
            "then code what comes of it with `alphaq recode`."
        )


def _agrees(plan: Plan, table: PlanTable) -> bool:
    """Whether each unit has one choice, and one that its table allows."""
    for unit, losses in table.losses.items():
        own = {plan.choices.get(name) for name in table.members.get(unit, (unit,))}
        allowed = {choice for choice, loss in zip(table.choices, losses, strict=True) if loss is not None}
        if len(own) != 1 or not own <= allowed:
            return False
    return True


class _Memory:
    """What was measured, by name: from the journal where an earlier run got so far."""

    def __init__(self, journal: Journal, job: str, where: Path, restart: bool) -> None:
        if restart:
            journal.clear()
        if not journal.entries:
            journal.append({"job": job})
        elif journal.entries[0] != {"job": job}:
            raise OutputError(
                f"{where} holds an unfinished run of another plan, model or settings. Add --restart, or choose another "
                "output."
            )
        if not all(one.keys() == {"key", "value"} and isinstance(one["key"], str) for one in journal.entries[1:]):
            raise OutputError(
                f"{where} holds lines that no run of `alphaq refine` wrote. Add --restart, or choose another output."
            )
        self._journal = journal
        self._known: JsonObject = {one["key"]: one["value"] for one in journal.entries[1:]}

    def recall(self, key: str, make: Callable[[], T]) -> T:
        """A JSON value, measured now or before."""
        if key not in self._known:
            self._known[key] = make()
            self._journal.append({"key": key, "value": self._known[key]})
        known: T = self._known[key]
        return known


def _job(checkpoint: Checkpoint, plan: Plan, refining: Refining) -> str:
    """What tells a run from others."""
    quantizer = profile(plan.engine).quantizer
    depends_on = [
        REFINE_VERSION,
        plan.to_json(),
        checkpoint.contents(),
        checkpoint.settings_digest(),
        [refining.seed, refining.samples, refining.tokens, refining.windows(checkpoint), refining.by],
        [quantizer, QUANTIZERS[quantizer].version],
    ]
    return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:32]


@dataclass(eq=False)
class _Run:
    """Rounds from a plan on. size: most bytes that files may have. by: as wanted, while the class has gradients."""

    checkpoint: Checkpoint
    plan: Plan
    refining: Refining
    resources: Resources
    memory: _Memory
    bench: Bench
    size: int
    by: Way

    @classmethod
    def of(cls, checkpoint: Checkpoint, plan: Plan, refining: Refining, resources: Resources, memory: _Memory) -> _Run:
        """With tokens written and the model in memory."""
        bos = plan.settings is None or plan.settings.bos

        def write() -> list[list[int]]:
            count = TRAINING_WINDOWS + JUDGING_WINDOWS
            return own_tokens(checkpoint, count, LENGTH, bos, refining.seed).tolist()

        (ids,) = (memory.recall("tokens", write) for _ in resources.wrap([0], 1, "write tokens"))
        tokens = torch.tensor(ids)
        context = max(1, len(model_prefix(checkpoint)) if bos else 0)
        windows = Windows(tokens[:TRAINING_WINDOWS], tokens[TRAINING_WINDOWS:], context)
        chosen = profile(plan.engine)
        importance = chosen.importance_of(checkpoint, refining.imatrix).columns
        rounding = partial(restored, quantizer=chosen.quantizer, importance=importance)
        bench = Bench(checkpoint, plan, windows, rounding)
        size = size_of(checkpoint, plan, plan.every_choice())
        return cls(checkpoint, plan, refining, resources, memory, bench, size, refining.by)

    @property
    def first(self) -> np.ndarray:
        """Columns of the given plan."""
        units = self.bench.units
        return np.array([units.choices.index(self.plan.choices[members[0]]) for members in units.members])

    def rounds(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """The best columns found, and KL [windows] of the given plan and after each round that gained something."""
        columns, slopes = self.first, Slopes()
        judged = [self.judge(columns)]
        if not np.isfinite(judged[0]).all():
            raise PlanError(
                f"With this plan {self.checkpoint.name} computes NaN or infinity, so there is no KL to lower. Check "
                "the model with `alphaq eval`, or plan with a larger budget."
            )
        self.refining.told(f"KL of the given plan {judged[0].mean():.5g} on {self.bench.windows.judged:,} tokens")
        for number in range(MOST_ROUNDS):
            found, kl = self.improved(columns, self.moves(number, columns, slopes), judged[-1])
            if found is columns:
                self.refining.told(f"round {number + 1}: nothing better found")
                break
            moved = exchanged(self.bench.units, columns.tolist(), found.tolist())
            self.refining.told(f"round {number + 1}: KL {kl.mean():.5g}, {moved} units have another choice")
            columns = found
            judged.append(kl)
            if kl.mean() > (1 - LEAST_GAIN) * judged[-2].mean():
                break
        return columns, judged

    def moves(self, number: int, columns: np.ndarray, slopes: Slopes) -> Moves:
        """What exchanges would do, by gradients where the model's class has them."""
        self.bench.hold(columns)
        if self.by == "gradients":
            try:
                self.measure(number, columns, slopes)
                return moves_from(self.bench.units, columns, slopes)
            except PassError as error:
                self.refining.told(f"{error.reason} Exchanges go by the measured KL of groups instead.")
                self.by = "groups"
        return scaled_moves(self.bench.units, columns, self.factors(number, columns))

    def factors(self, number: int, columns: np.ndarray) -> np.ndarray:
        """Measured over predicted loss of a unit's group, [units]: what all of a group is wrong by (HIGGS, arXiv
        2411.17525, where the losses of layers add up)."""
        bench, rows = self.bench, np.arange(len(columns))
        part = slice(0, min(TRAINING_WINDOWS, 2 * self.refining.windows(self.checkpoint)))
        losses = bench.units.losses[rows, columns]
        factors = np.full(len(columns), np.nan)
        groups = [[], *bench.groups()]
        kls = [
            self.memory.recall(f"group {number} {at}", partial(bench.divergence_without, columns, group, part))
            for at, group in enumerate(self.resources.wrap(groups, len(groups), f"round {number + 1}"))
        ]
        for group, kl in zip(groups[1:], kls[1:], strict=True):
            factors[group] = max(kls[0] - kl, 0.0) / max(float(losses[group].sum()), 1e-300)
        least = LEAST_FACTOR * float(np.nanmedian(factors))
        return np.where(factors < least, least, factors)

    def measure(self, number: int, columns: np.ndarray, slopes: Slopes) -> None:
        """Gradients of a round at plans near one, taken into the slopes."""
        bench, refining = self.bench, self.refining
        near = [
            (own, *others) if others else ()
            for own, others in zip(columns.tolist(), bench.neighbours(columns), strict=True)
        ]
        states = drawn_states(bench.units, columns, refining.samples, (refining.seed, number))
        states = np.where(bench.open, states, columns)
        count = min(refining.windows(self.checkpoint), TRAINING_WINDOWS)
        parts = TRAINING_WINDOWS // count
        for sample in self.resources.wrap(range(refining.samples), refining.samples, f"round {number + 1}"):
            begin = (sample % parts) * count

            def products(state: np.ndarray = states[sample], begin: int = begin) -> list[list[float]]:
                found = bench.products(state, near, slice(begin, begin + count))
                return [[one[column] for column in some] for one, some in zip(found, near, strict=True)]

            for unit, values in enumerate(self.memory.recall(f"gradient {number} {sample}", products)):
                slopes.add(unit, int(states[sample, unit]), dict(zip(near[unit], values, strict=True)))

    def improved(self, columns: np.ndarray, moves: Moves, kl: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best of the solutions by what was measured, and its KL [windows]; the same columns if none is better
        beyond chance."""
        units, best = self.bench.units, (columns, kl)
        for caution in CAUTIONS:
            found = self.within_size(columns, partial(best_columns, units, columns, moves, caution))
            other = self.judge(found)
            if other.mean() < best[1].mean():
                best = found, other
        return best if beyond_chance(kl - best[1]) else (columns, kl)

    def within_size(self, columns: np.ndarray, solve: Callable[[int], np.ndarray]) -> np.ndarray:
        """A solution whose files are no larger than the given plan's: their headers may differ by a few bytes."""
        units = self.bench.units
        budget = units.cost(self.first)
        while True:
            try:
                found = solve(budget)
            except BudgetError:  # nothing that may be exchanged is that small
                return columns
            over = size_of(self.checkpoint, self.plan, self.choices(found)) - self.size
            if over <= 0 or np.array_equal(found, columns):
                return found
            budget = min(budget, units.cost(found)) - over

    def choices(self, columns: np.ndarray) -> dict[str, Choice]:
        """Choices of all quantized matrices with units at these columns."""
        return self.plan.every_choice() | self.bench.choices(columns)

    def judge(self, columns: np.ndarray) -> np.ndarray:
        """KL on the tokens that judge, float64 [windows]."""
        digest = hashlib.sha256(json.dumps(columns.tolist()).encode()).hexdigest()[:32]
        return np.array(self.memory.recall(f"judged {digest}", lambda: self.bench.divergence(columns)))


def beyond_chance(gains: np.ndarray) -> bool:
    """Whether gains [windows] are more than one standard error of their mean."""
    return float(gains.mean()) > float(gains.std(ddof=1)) / math.sqrt(len(gains))


def _record(run: _Run, columns: np.ndarray, judged: list[np.ndarray]) -> Refinement:
    return Refinement(
        before=float(f"{judged[0].mean():.4g}"),
        after=float(f"{judged[-1].mean():.4g}"),
        tokens=run.bench.windows.judged,
        rounds=len(judged) - 1,
        moved=exchanged(run.bench.units, run.first.tolist(), columns.tolist()),
        hidden=len(run.bench.hidden),
        seed=run.refining.seed,
        gradients=run.refining.samples,
        gradient_tokens=run.refining.tokens,
        by=run.refining.by,
    )
