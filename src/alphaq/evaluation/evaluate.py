"""`alphaq eval`: how well a model predicts texts, and how far it is from a reference."""

from __future__ import annotations

import math
from pathlib import Path

from alphaq.errors import AlphaQError
from alphaq.nouns.fidelity import Fidelity
from alphaq.nouns.scoring import Scoring
from alphaq.work.workers import Wrap, silent


def evaluate(
    model: str | Path,
    scoring: Scoring,
    reference: str | Path | None = None,
    wrap: Wrap = silent,
    skipped_share: float = 0,
) -> Fidelity:
    """Perplexity per text, and distance from a reference model if one is given.

    A GGUF file is run by llama.cpp if that is installed and `scoring` names neither dtype (`auto`) nor device. Others
    that would not fit into memory are run layer by layer from disk, in float32, unless `scoring.stream` says otherwise.
    skipped_share: see `runtime.skipping.skip_experts`; the reference runs all of its experts. Raises AlphaQError for
    models that put out NaN, or of which no experts can be left out.
    """
    from alphaq.evaluation.fidelity import evaluate_texts, read_texts, window_beginning
    from alphaq.evaluation.loading import STREAMED, opened_models, settled
    from alphaq.runtime.skipping import skip_experts

    contents = read_texts(scoring.texts)
    scoring, _ = settled(scoring, model, reference, "--skip-experts" if skipped_share else None)
    with opened_models(model, reference, scoring, contents) as (own, against):
        if own.by != STREAMED:  # which runs them all
            skip_experts(own.model, skipped_share)
        other = None if against is None else against.model
        by_text = dict(evaluate_texts(own.model, own.tokenizer, contents, scoring, other, wrap))
        for name, text in by_text.items():
            if math.isnan(text.perplexity) or (text.kl is not None and math.isnan(text.kl)):
                raise AlphaQError(f"A model gives NaN on text {name!r}. Check its weights with `alphaq verify`.")
        run_by = tuple(runner.by for runner in (own, against) if runner is not None)
        return Fidelity(by_text, window_beginning(own.tokenizer, scoring.bos), run_by)


def fidelity_json(fidelity: Fidelity) -> dict[str, object]:
    """What `alphaq eval --json` prints."""
    texts = {
        name: {
            "perplexity": text.perplexity,
            "perplexity_interval": list(text.perplexity_interval),
            "kl": text.kl,
            "kl_median": text.kl_median,
            "kl_p99": text.kl_p99,
            "top1": text.top1,
            "ear": text.ear,
            "tokens": text.tokens,
        }
        for name, text in fidelity.texts.items()
    }
    ways = {"windows_begin_with": fidelity.begins_with, "run_by": list(fidelity.run_by)}
    return {"texts": texts, **ways, "geomean_perplexity": fidelity.geomean_perplexity, "mean_kl": fidelity.mean_kl}
