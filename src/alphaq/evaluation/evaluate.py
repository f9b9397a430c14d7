"""`alphaq eval`: how well a model predicts texts, and how far it is from a reference."""

from __future__ import annotations

from pathlib import Path

from alphaq.nouns.fidelity import Fidelity
from alphaq.nouns.scoring import Scoring
from alphaq.work.workers import Wrap, silent


def evaluate(model: str | Path, scoring: Scoring, reference: str | Path | None = None, wrap: Wrap = silent) -> Fidelity:
    """Perplexity per text, and distance from a reference model if one is given."""
    from alphaq.evaluation.fidelity import evaluate_texts, read_texts, window_beginning
    from alphaq.runtime.loading import load_pair

    contents = read_texts(scoring.texts)
    loaded, against, tokenizer = load_pair(model, reference, scoring.dtype, scoring.device)
    by_text = dict(evaluate_texts(loaded, tokenizer, contents, scoring, against, wrap))
    return Fidelity(by_text, window_beginning(tokenizer, scoring.bos))


def fidelity_json(fidelity: Fidelity) -> dict[str, object]:
    """What `alphaq eval --json` prints."""
    texts = {
        name: {
            "perplexity": text.perplexity,
            "perplexity_interval": list(text.perplexity_interval),
            "kl": text.kl,
            "top1": text.top1,
            "ear": text.ear,
            "tokens": text.tokens,
        }
        for name, text in fidelity.texts.items()
    }
    begins = {"windows_begin_with": fidelity.begins_with}
    return {"texts": texts, **begins, "geomean_perplexity": fidelity.geomean_perplexity, "mean_kl": fidelity.mean_kl}
