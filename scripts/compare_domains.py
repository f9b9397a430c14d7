"""Do calibrated allocations depend on the text they were calibrated on, and how do data-free ones fare?

Calibrates each method that needs text on every domain in turn, and evaluates all of them, with data-free
methods beside, on unseen text of every domain:

    python scripts/compare_domains.py MODEL --domain tech=tech.txt --domain code=code.txt -o domains
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import date
from itertools import combinations
from pathlib import Path

import alphaq
from alphaq.calibration.text import Text
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.measuring.cache import Cache
from alphaq.measuring.resources import Resources
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import PlanInputs, make_plan, measure_for_plan, plain_size, resolve
from alphaq.trials.compare import Comparison, compare
from alphaq.trials.results import Row

DATA_FREE = ("uniform", "random", "first-layers", "distortion", "alphaq", "alphaq:gamma=-1", "auto")
CALIBRATED = ("pmq", "hessian", "mse-output")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--domain", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--bits", default="2,2.5,3,3.5")
    parser.add_argument("--max-tokens", type=int, default=6144)
    parser.add_argument("--output", "-o", type=Path, required=True)
    given = parser.parse_args()
    domains = {name: Path(path) for name, _, path in (text.partition("=") for text in given.domain)}
    bits = [float(width) for width in given.bits.split(",")]
    checkpoint = open_checkpoint(given.model)
    scoring = Scoring(texts=tuple(domains.values()), max_tokens=given.max_tokens, skip_tokens=Text.tokens)
    rows: dict[str, list[Row]] = {}
    for name, path in {"": None, **domains}.items():
        methods = CALIBRATED if name else DATA_FREE
        with Cache(given.output / "cache", {"model": checkpoint.fingerprint}) as cache:
            comparison = Comparison(
                methods if not name else ("uniform", *methods),
                bits,
                PlanConfig(budget=Budget(bits=bits[0]), roles="fixed"),
                None if path is None else Text(path),
            )
            out = given.output / (name or "data-free")
            rows[name] = compare(checkpoint, comparison, scoring, out, Resources(cache=cache))
    report = summarize(rows, domains, bits)
    report["agreement"] = agreement(checkpoint, domains, bits, given.output / "cache")
    (given.output / "domains.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(markdown(report, list(domains)))
    told = " ".join(f"--domain {text}" for text in given.domain)
    print(f"\nVersion {alphaq.__version__}, {date.today()}, `python scripts/compare_domains.py {given.model} {told}`.")


def summarize(rows: dict[str, list[Row]], domains: dict[str, Path], bits: list[float]) -> dict[str, list[dict]]:
    """One line per method, calibration text and budget: perplexity by domain."""
    lines = []
    for calibrated_on, found in rows.items():
        for row in found:
            if row.perplexity is None or (calibrated_on and row.method in ("uniform", "reference")):
                continue
            by_domain = {name: row.perplexity[path.stem] for name, path in domains.items()}
            lines.append(
                {
                    "method": row.method,
                    "calibrated_on": calibrated_on,
                    "bits": row.bits,
                    "perplexity": by_domain,
                    "mean": row.mean_perplexity,
                    "kl": row.kl,
                }
            )
    own = []
    for method in CALIBRATED:
        for width in bits:
            for name in domains:
                alike = [line for line in lines if line["method"] == method and line["bits"] == width]
                best = min(alike, key=lambda line: line["perplexity"][name], default=None)
                if best is not None:
                    own.append({"method": method, "bits": width, "domain": name, "best": best["calibrated_on"]})
    return {"lines": lines, "own": own}


def agreement(checkpoint, domains: dict[str, Path], bits: list[float], cache_folder: Path) -> list[dict]:
    """Share of matrices to which plans calibrated on two domains give the same choice."""
    found = []
    for method in CALIBRATED:
        for width in bits:
            plans = {}
            for name, path in domains.items():
                config = PlanConfig(budget=Budget(bits=width), roles="fixed", method=method)
                request = resolve(config)
                sized = {"budget": Budget(size_bytes=plain_size(checkpoint, request, width))}
                request = resolve(config.model_copy(update=sized))
                with Cache(cache_folder, {"model": checkpoint.fingerprint}) as cache:
                    measured = measure_for_plan(
                        checkpoint, request, PlanInputs(text=Text(path)), Resources(cache=cache)
                    )
                plans[name] = make_plan(checkpoint, request, measured).choices
            shares = [
                statistics.mean(plans[one][matrix] == plans[other][matrix] for matrix in plans[one])
                for one, other in combinations(plans, 2)
            ]
            found.append({"method": method, "bits": width, "same_choice": statistics.mean(shares)})
    return found


def markdown(report: dict, domains: list[str]) -> str:
    """Tables for a write-up."""
    out = [f"| method | calibrated on | bits | {' | '.join(domains)} | mean | KL |", "|" + "---|" * (len(domains) + 5)]
    for line in sorted(report["lines"], key=lambda line: line["bits"]):
        cells = " | ".join(f"{line['perplexity'][name]:.3f}" for name in domains)
        text = line["calibrated_on"] or "nothing"
        out.append(
            f"| {line['method']} | {text} | {line['bits']:g} | {cells} | {line['mean']:.3f} | {line['kl']:.4f} |"
        )
    wins = sum(entry["domain"] == entry["best"] for entry in report["own"])
    out.append(f"\nBest on its own domain: {wins} of {len(report['own'])}.")
    for entry in report["agreement"]:
        out.append(f"{entry['method']} at {entry['bits']:g}: {100 * entry['same_choice']:.0f} % of choices equal.")
    return "\n".join(out)


if __name__ == "__main__":
    main()
