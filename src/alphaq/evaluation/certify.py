"""`alphaq certify`: how faithful a model is to its reference, with intervals, on record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import alphaq
from alphaq.work.workers import Wrap, silent

if TYPE_CHECKING:
    from alphaq.evaluation.certificate import Certificate
    from alphaq.evaluation.tasks import TaskRequest


def certify(
    model: str | Path,
    reference: str | Path,
    texts: list[Path],
    window: int = 512,
    max_tokens: int | None = None,
    skip_tokens: int = 0,
    device: str | None = None,
    dtype: str = "float32",
    threshold: float = 0.99,
    tasks: TaskRequest | None = None,
    command: str = "",
    wrap: Wrap = silent,
    bos: bool = True,
) -> Certificate:
    """Measure how faithful a model is to its reference, and put it on record. tasks: of lm-eval, to run on both.

    Raises AlphaQError if they have different tokenizers, or a text is too short for an interval.
    """
    from alphaq.evaluation import certificate as record
    from alphaq.evaluation.fidelity import Remembered, read_texts, score_texts, window_beginning
    from alphaq.evaluation.tasks import certify_tasks, find_tasks
    from alphaq.runtime.loading import load_pair

    contents = read_texts(texts)
    manager = None if tasks is None else find_tasks(tasks)
    identities = [record.identity_of(one) for one in (model, reference)]
    loaded, against, tokenizer = load_pair(model, reference, dtype, device)
    scores = dict(
        score_texts(loaded, tokenizer, contents, Remembered(against), window, max_tokens, skip_tokens, wrap, bos)
    )
    overall, each = record.text_figures(scores, contents)
    done = None if tasks is None else certify_tasks(loaded, against, tokenizer, tasks, manager, wrap)
    return record.Certificate(
        alphaq_version=alphaq.__version__,
        versions=record.versions(*(["lm-eval"] if tasks else [])),
        command=command,
        model=identities[0],
        reference=identities[1],
        settings=record.Settings(
            window=window,
            max_tokens=max_tokens,
            skip_tokens=skip_tokens,
            dtype=dtype,
            computed_in=str(loaded.dtype).removeprefix("torch."),
            device=str(loaded.device),
            begins_with=window_beginning(tokenizer, bos),
        ),
        texts=each,
        overall=overall,
        threshold=threshold,
        distribution_lossless=overall.ear.verdict(threshold),
        tasks=done,
    )
