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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alphaq.errors import AlphaQError, MissingExtraError
from alphaq.evaluation.certificate import DRAWS, SEED, TaskFigures, Tasks, Verdict, estimate, task_verdict
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
    """lm-eval's manager of tasks, which knows those that are asked for. Raises AlphaQError if one is unknown.

    A task is what its YAML file says, whose `!function` is Python beside it: only give files that you trust.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    if request.include_path is not None and not request.include_path.is_dir():
        raise AlphaQError(f"--include-path {request.include_path} is no folder. Name the folder of your task files.")
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
    return manager


def run_tasks(model: Any, tokenizer: Any, manager: Any, request: TaskRequest) -> dict[str, Any]:
    """What lm-eval says of one model. Raises AlphaQError if a task cannot be run."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _quietly():
        try:
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=request.batch_size)
            found = lm_eval.simple_evaluate(
                wrapped,
                tasks=list(request.names),
                num_fewshot=request.few_shot,
                limit=request.limit,
                bootstrap_iters=RESAMPLES,
                log_samples=True,
                task_manager=manager,
                **SEEDS,
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise AlphaQError(
                f"lm-eval cannot run {', '.join(request.names)} ({reason}). Check that its data is at hand, and run it "
                "with lm-eval itself."
            ) from error
    if found is None:
        raise AlphaQError("lm-eval gave no results, as it does on all but one process. Run a single process.")
    return dict(found)


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
        batch_size=request.batch_size,
        seeds=SEEDS,
        results=results,
        lossless=task_verdict(results),
    )


def compare_results(own: dict[str, Any], reference: dict[str, Any]) -> tuple[TaskFigures, ...]:
    """Every metric of every task that both have. own, reference: as `lm_eval.simple_evaluate` gives them.

    Raises AlphaQError if there is none.
    """
    results = tuple(
        _compared(own, reference, task, metric, filtered)
        for task, metric, filtered in _metrics(own)
        if f"{metric},{filtered}" in reference["results"].get(task, {})
    )
    if not results:
        raise AlphaQError(
            "lm-eval gave no metric that is a number, so there is nothing to compare. Choose other tasks."
        )
    return results


def _metrics(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Task, metric and filter of every figure; of groups only their members."""
    for task, figures in found["results"].items():
        if task not in found["configs"]:
            continue
        for key, value in figures.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr") and _is_number(value):
                yield task, metric, filtered


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _compared(own: dict[str, Any], reference: dict[str, Any], task: str, metric: str, filtered: str) -> TaskFigures:
    value, other = (float(found["results"][task][f"{metric},{filtered}"]) for found in (own, reference))
    higher = bool(own.get("higher_is_better", {}).get(task, {}).get(metric, True))
    differences = _paired(own, reference, task, metric, filtered)
    low = high = None
    if differences is not None:
        picks = np.random.default_rng(SEED).integers(0, len(differences), (DRAWS, len(differences) - 1))
        interval = estimate(value - other, differences[picks].mean(axis=1))
        low, high = interval.low, interval.high
    else:
        errors = [found["results"][task].get(f"{metric}_stderr,{filtered}") for found in (own, reference)]
        if all(map(_is_number, errors)):
            reach = NORMAL_QUANTILE * math.hypot(*errors)
            low, high = value - other - reach, value - other + reach
    return TaskFigures(
        task=task,
        metric=metric,
        filter=filtered,
        higher_is_better=higher,
        documents=int(own.get("n-samples", {}).get(task, {}).get("effective", 0)),
        value=value,
        reference=other,
        difference=value - other,
        low=low,
        high=high,
        paired=differences is not None,
        lossless=_lossless(low, high, higher),
    )


def _lossless(low: float | None, high: float | None, higher_is_better: bool) -> Verdict:
    if low is None or high is None:
        return "undecided"
    worst_is_clear = high < 0 if higher_is_better else low > 0
    return "no" if worst_is_clear else "yes"


def _paired(own: dict[str, Any], reference: dict[str, Any], task: str, metric: str, filtered: str) -> np.ndarray | None:
    """Differences by document, float64 [documents]; None unless both have each document's score, and the metric is
    their mean."""
    scores = []
    for found in (own, reference):
        samples = found.get("samples", {}).get(task, ())
        each = {
            (one["doc_id"], one.get("doc_hash")): one.get(metric) for one in samples if one.get("filter") == filtered
        }
        mean = _mean(each.values())
        if mean is None or abs(mean - found["results"][task][f"{metric},{filtered}"]) > 1e-9:
            return None
        scores.append(each)
    if scores[0].keys() != scores[1].keys() or len(scores[0]) < 2:
        return None
    return np.array([float(scores[0][key]) - float(scores[1][key]) for key in scores[0]])


def _mean(values: Iterable[Any]) -> float | None:
    listed = list(values)
    if not listed or not all(map(_is_number, listed)):
        return None
    return math.fsum(listed) / len(listed)
