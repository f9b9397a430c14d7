from pathlib import Path

import pytest

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.evaluation.evaluate import evaluate
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import make_plan, measure_for_plan, resolve
from alphaq.trials.refine import Refining, refine
from alphaq.writing.quantizing import quantize
from conftest import DATA


@pytest.mark.slow
def test_refining_lowers_the_divergence_on_texts_that_it_never_saw(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    request = resolve(PlanConfig(budget=Budget(bits=2)))
    plan = make_plan(checkpoint, request, measure_for_plan(checkpoint, request))
    refined = refine(checkpoint, plan, Refining(), tmp_path / "state")
    scoring = Scoring(texts=tuple(sorted((DATA / "texts").glob("*.txt"))), max_tokens=2048)
    kl = []
    for number, one in enumerate((plan, refined)):
        quantize(checkpoint, one, tmp_path / str(number))
        kl.append(evaluate(tmp_path / str(number), scoring, tiny).mean_kl)
    assert kl[0] is not None and kl[1] is not None and kl[1] < 0.97 * kl[0]
