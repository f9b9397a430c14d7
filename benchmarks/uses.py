"""What stands for the routing prior where it cannot be had: `python benchmarks/uses.py MODEL...`.

Each model is planned with the default method, with its prior and with what could take its place, and compared with the
original. The table in docs/research/log.md is of `tiny` (bundled) and `moe22m`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean

from alphaq import pipeline
from alphaq.calibration.traffic import Expert, ExpertUse
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import resolve
from alphaq.planning.evidence import measure_for_plan
from alphaq.planning.measured import Measurements

TEXTS = sorted((Path(pipeline.__file__).parent / "data" / "texts").glob("*.txt"))
TOKENS = 8192


def powers(uses: dict[Expert, ExpertUse], power: float) -> dict[Expert, ExpertUse]:
    return {expert: replace(use, mean_square_weight=use.mean_square_weight**power) for expert, use in uses.items()}


def divergence(source: Checkpoint, bits: float, measured: Measurements) -> float:
    """Mean KL over the texts of a plan made from these measurements."""
    plan = pipeline.make_plan(source, resolve(PlanConfig(budget=Budget(bits=bits))), measured)
    with tempfile.TemporaryDirectory() as scratch:
        pipeline.quantize(source, plan, Path(scratch) / "out")
        found = pipeline.evaluate(
            Path(scratch) / "out", Scoring(texts=tuple(TEXTS), max_tokens=TOKENS, dtype="auto"), source.folder
        )
    return mean(text.kl for text in found.texts.values() if text.kl is not None)


def main() -> None:
    rows = {}
    for folder in sys.argv[1:]:
        source = open_checkpoint(folder)
        for bits in (2.0, 2.5, 3.0):
            measured = measure_for_plan(source, resolve(PlanConfig(budget=Budget(bits=bits))))
            evidence = measured.evidence
            assert evidence.synthetic is not None
            seen = evidence.synthetic.experts
            priors = {"prior": evidence.prior, "none": {}} | {f"tokens^{p}": powers(seen, p) for p in (1, 0.5, 0.25)}
            rows[f"{source.name} {bits}"] = {
                name: round(divergence(source, bits, replace(measured, evidence=replace(evidence, prior=prior))), 5)
                for name, prior in priors.items()
            }
            sys.stdout.write(f"{source.name} {bits} {rows[f'{source.name} {bits}']}\n")
    out = Path(__file__).parent / "results" / "uses.json"
    out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
