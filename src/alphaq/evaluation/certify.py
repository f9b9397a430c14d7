"""`alphaq certify`: how faithful a model is to its reference, with intervals, on record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import alphaq
from alphaq.nouns.scoring import Scoring
from alphaq.work.workers import Wrap, silent

if TYPE_CHECKING:
    from alphaq.evaluation.certificate import Certificate
    from alphaq.evaluation.tasks import TaskRequest


def certify(
    model: str | Path,
    reference: str | Path,
    scoring: Scoring,
    threshold: float = 0.99,
    tasks: TaskRequest | None = None,
    command: str = "",
    wrap: Wrap = silent,
) -> Certificate:
    """Measure how faithful a model is to its reference, and put it on record. tasks: of lm-eval, to run on both.

    Raises AlphaQError if they have different tokenizers, or a text is too short for an interval.
    """
    from alphaq.evaluation import certificate as record
    from alphaq.evaluation.fidelity import Remembered, read_texts, score_texts, window_beginning
    from alphaq.evaluation.loading import pair_of
    from alphaq.evaluation.room import with_stream
    from alphaq.evaluation.tasks import certify_tasks, find_tasks

    scoring, _ = with_stream(scoring, [model, reference])
    contents = read_texts(scoring.texts)
    manager = None if tasks is None else find_tasks(tasks)
    identities = [record.identity_of(one) for one in (model, reference)]
    loaded, against, tokenizer = pair_of(model, reference, scoring)
    scores = dict(score_texts(loaded, tokenizer, contents, scoring, Remembered(against), wrap))
    overall, each = record.text_figures(scores, contents)
    done = None if tasks is None else certify_tasks(loaded, against, tokenizer, tasks, manager, wrap)
    return record.Certificate(
        alphaq_version=alphaq.__version__,
        versions=record.versions(*(["lm-eval"] if tasks else [])),
        command=command,
        model=identities[0],
        reference=identities[1],
        settings=record.Settings(
            window=scoring.window,
            max_tokens=scoring.max_tokens,
            skip_tokens=scoring.skip_tokens,
            dtype=scoring.dtype,
            computed_in=str(loaded.dtype).removeprefix("torch."),
            device=str(loaded.device),
            begins_with=window_beginning(tokenizer, scoring.bos),
            layer_by_layer=bool(scoring.stream),
        ),
        texts=each,
        overall=overall,
        threshold=threshold,
        distribution_lossless=overall.ear.verdict(threshold),
        tasks=done,
    )
