"""Tasks of lm-eval on a model and on its reference, and whether the difference is more than chance.

Both answer the same documents, so where lm-eval keeps each document's score the difference is taken document by
document. Where it keeps none, or the metric is no mean over documents, the two standard errors are added in squares, as
of independent samples: an interval that is too wide rather than too narrow.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alphaq.errors import AlphaQError, MissingExtraError, first_line
from alphaq.evaluation.answers import lm_eval_model
from alphaq.evaluation.certificate import DRAWS, SEED, TaskFigures, Tasks, Verdict, estimate, task_verdict
from alphaq.evaluation.fidelity import layers_of
from alphaq.work.untrusted import JsonObject
from alphaq.work.workers import Wrap, silent

SEEDS = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}
"""lm-eval's own defaults, stated so that another version's would not pass unseen."""
RESAMPLES = 1000  # for standard errors that lm-eval itself has no formula for
NORMAL_QUANTILE = 1.959964


@dataclass(frozen=True)
class TaskRequest:
    """What lm-eval is to do. names: its tasks, or YAML files of one's own. limit: documents of each task."""

    names: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    few_shot: int | None = None
    batch_size: int = 1

    @classmethod
    def of(cls, names: str, **settings: Any) -> TaskRequest:
        """From a list between commas. Raises AlphaQError if it is empty."""
        listed = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
        if not listed:
            raise AlphaQError("--tasks is empty. Name a task of lm-eval, or the YAML file of your own.")
        return cls(listed, **settings)


def require_lm_eval() -> None:
    """Raise MissingExtraError unless lm-eval is installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise MissingExtraError("eval", "--tasks needs lm-eval") from None


def find_tasks(request: TaskRequest) -> Any:
    """lm-eval's manager of tasks, which knows those that are asked for; their data was loaded once.

    Raises AlphaQError if one is unknown, or its data cannot be had: before hours of other work, not after.

    A task is what its YAML file says, whose `!function` is Python beside it: only give files that you trust.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    if request.include_path is not None and not request.include_path.is_dir():
        raise AlphaQError(f"--include-path {request.include_path} is not a folder. Name the folder of your task files.")
    files = [name for name in request.names if name.endswith((".yaml", ".yml"))]
    for name in files:
        if not Path(name).is_file():
            raise AlphaQError(f"No task file {name}. Give the YAML file of a task, or its name with --include-path.")
    listed = set(request.names) - set(files)
    include = None if request.include_path is None else str(request.include_path)
    # Reading lm-eval's thousands of task files takes seconds, so that one's own are looked at first.
    manager = TaskManager(include_path=include, include_defaults=False)
    if not listed <= set(manager.all_tasks):
        manager = TaskManager(include_path=include)
    for name in sorted(listed - set(manager.all_tasks)):
        close = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "`lm-eval ls tasks` lists all."
        raise AlphaQError(f"lm-eval knows no task {name!r}. {hint} Your own need --include-path, or their YAML file.")
    with _quietly(), _refused(request):
        manager.load(list(request.names))
    return manager


def run_tasks(model: Any, tokenizer: Any, manager: Any, request: TaskRequest) -> JsonObject:
    """What lm-eval says of one model, in memory or layer by layer. Raises AlphaQError if a task cannot be run."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _quietly(), _refused(request):
        if layers_of(model):
            wrapped = lm_eval_model(model, tokenizer)
        else:
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=request.batch_size)
        results = lm_eval.simple_evaluate(
            wrapped,
            tasks=list(request.names),
            num_fewshot=request.few_shot,
            limit=request.limit,
            bootstrap_iters=RESAMPLES,
            log_samples=True,
            task_manager=manager,
            **SEEDS,
        )
    if results is None:
        raise AlphaQError("lm-eval gave no results, as it does on all but one process. Run a single process.")
    return dict(results)


@contextmanager
def _refused(request: TaskRequest) -> Iterator[None]:
    """Raise AlphaQError for what goes wrong inside lm-eval."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise AlphaQError(
            f"lm-eval cannot run {', '.join(request.names)} ({first_line(error)}). Check that its data is at hand, "
            "and run it with lm-eval itself."
        ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Its progress bars and its advice on how to pass a model are of no use here; its warnings about tasks are."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level, bars = logger.level, os.environ.get("TQDM_DISABLE")
    logger.setLevel(logging.ERROR)
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = bars


def certify_tasks(
    model: Any, reference: Any, tokenizer: Any, request: TaskRequest, manager: Any, wrap: Wrap = silent
) -> Tasks:
    """Run the tasks on both models and compare them. manager: as `find_tasks` gives it."""
    own, other = (run_tasks(one, tokenizer, manager, request) for one in wrap((model, reference), 2, "lm-eval"))
    results = compare_results(own, other)
    return Tasks(
        names=request.names,
        limit=request.limit,
        few_shot=request.few_shot,
        batch_size=None if layers_of(model) else request.batch_size,
        seeds=SEEDS,
        results=results,
        lossless=task_verdict(results),
    )


@dataclass(frozen=True)
class _Metric:
    """A figure of a task; filter: what lm-eval did to the answers before."""

    task: str
    name: str
    filter: str

    @property
    def key(self) -> str:
        """As lm-eval names it in its results."""
        return f"{self.name},{self.filter}"


@dataclass(frozen=True)
class _Results:
    """What lm-eval says of one model, as `lm_eval.simple_evaluate` gives it."""

    said: JsonObject

    def metrics(self) -> Iterator[_Metric]:
        """Every figure that is a number; of groups only their members."""
        for task, figures in self.said["results"].items():
            if task not in self.said["configs"]:
                continue
            for key, value in figures.items():
                name, comma, filtered = key.partition(",")
                if comma and not name.endswith("_stderr") and _is_number(value):
                    yield _Metric(task, name, filtered)

    def has(self, metric: _Metric) -> bool:
        """Whether a figure is there."""
        return metric.key in self.said["results"].get(metric.task, {})

    def value(self, metric: _Metric) -> float:
        """A figure that is there."""
        return float(self.said["results"][metric.task][metric.key])

    def standard_error(self, metric: _Metric) -> float | None:
        """None where lm-eval knows none."""
        error = self.said["results"][metric.task].get(f"{metric.name}_stderr,{metric.filter}")
        return float(error) if _is_number(error) else None

    def higher_is_better(self, metric: _Metric) -> bool:
        """Whether more is better, as it mostly is."""
        return bool(self.said.get("higher_is_better", {}).get(metric.task, {}).get(metric.name, True))

    def documents(self, metric: _Metric) -> int:
        """How many were asked about."""
        return int(self.said.get("n-samples", {}).get(metric.task, {}).get("effective", 0))

    def scores(self, metric: _Metric) -> dict[tuple[Any, Any], float] | None:
        """Of each document; None unless they are there and the figure is their mean."""
        samples = self.said.get("samples", {}).get(metric.task, ())
        scores = {
            (one["doc_id"], one.get("doc_hash")): one.get(metric.name)
            for one in samples
            if one.get("filter") == metric.filter
        }
        if not scores or not all(map(_is_number, scores.values())):
            return None
        mean = math.fsum(scores.values()) / len(scores)
        return scores if abs(mean - self.value(metric)) <= 1e-9 else None


def compare_results(own: JsonObject, reference: JsonObject) -> tuple[TaskFigures, ...]:
    """Every metric of every task that both have. own, reference: as `lm_eval.simple_evaluate` gives them.

    Raises AlphaQError if there is none.
    """
    ours, theirs = _Results(own), _Results(reference)
    results = tuple(_compared(ours, theirs, metric) for metric in ours.metrics() if theirs.has(metric))
    if not results:
        raise AlphaQError(
            "lm-eval gave no metric that is a number, so there is nothing to compare. Choose other tasks."
        )
    return results


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _compared(own: _Results, reference: _Results, metric: _Metric) -> TaskFigures:
    value, other = own.value(metric), reference.value(metric)
    higher = own.higher_is_better(metric)
    differences = _paired(own.scores(metric), reference.scores(metric))
    low: float | None
    high: float | None
    if differences is not None:
        picks = np.random.default_rng(SEED).integers(0, len(differences), (DRAWS, len(differences) - 1))
        interval = estimate(value - other, differences[picks].mean(axis=1))
        low, high = interval.low, interval.high
    else:
        low, high = _apart(value - other, own.standard_error(metric), reference.standard_error(metric))
    return TaskFigures(
        task=metric.task,
        metric=metric.name,
        filter=metric.filter,
        higher_is_better=higher,
        documents=own.documents(metric),
        value=value,
        reference=other,
        difference=value - other,
        low=low,
        high=high,
        paired=differences is not None,
        lossless=_lossless(low, high, higher),
    )


def _apart(difference: float, error: float | None, other_error: float | None) -> tuple[float | None, float | None]:
    """The interval of a difference of independent samples; none where an error is unknown."""
    if error is None or other_error is None:
        return None, None
    reach = NORMAL_QUANTILE * math.hypot(error, other_error)
    return difference - reach, difference + reach


def _lossless(low: float | None, high: float | None, higher_is_better: bool) -> Verdict:
    if low is None or high is None:
        return "undecided"
    worst_is_clear = high < 0 if higher_is_better else low > 0
    return "no" if worst_is_clear else "yes"


def _paired(
    own: dict[tuple[Any, Any], float] | None, reference: dict[tuple[Any, Any], float] | None
) -> np.ndarray | None:
    """Differences by document, float64 [documents]; None unless both have the same ones."""
    if own is None or reference is None or own.keys() != reference.keys() or len(own) < 2:
        return None
    return np.array([float(own[key]) - float(reference[key]) for key in own])
