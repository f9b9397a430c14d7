"""The report of a model of Kimi-K2's size: 61 layers × 384 experts × 3 projections, 70 272 matrices with 24 choices.

    python benchmarks/report.py [--quick]

The plan is synthetic: α by layer and projection with a spread, losses (α₀/α)²·w·4^(−bits) with noise by choice, exact
bytes of 7168 × 2048 matrices, solved by the exact solver at 2.5 bits. Spectra of 2000 matrices are drawn from Pareto
tails. Measured are the time to write the page, its size, the time until Chromium has drawn it, and one move of the
slider. Needs the packages `playwright` and Debian's `chromium`.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import parser, save

from alphaq.allocation.exact import solve_exact
from alphaq.engines.native import PROFILE
from alphaq.measuring.density import density
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan, PlanTable, SourceIdentity
from alphaq.report.content import Sources, sampled
from alphaq.report.html import write_report
from alphaq.report.places import Place, place_by_name
from alphaq.report.runs import Run

CHROMIUM = Path("/usr/bin/chromium")
SHAPES = {"gate": (2048, 7168), "up": (2048, 7168), "down": (7168, 2048)}
BITS = 2.5
LOADS = 5


def synthetic_plan(layers: int, experts: int) -> Plan:
    """A plan as `alphaq plan` would write it for such a model."""
    generator = np.random.default_rng(0)
    choices = [choice for choice in PROFILE.defaults if not choice.name and choice.bits <= 8]
    keys = [(layer, expert, part) for layer in range(layers) for expert in range(experts) for part in SHAPES]
    names = [f"model.layers.{layer + 1}.mlp.experts.{expert}.{part}_proj.weight" for layer, expert, part in keys]
    depth = np.array([layer / layers for layer, _, _ in keys])
    down = np.array([part == "down" for _, _, part in keys])
    alphas = 2.6 + 1.4 * depth + 0.6 * down + generator.normal(0, 0.25, len(keys))
    rates = np.array([4.0**-choice.bits * (1 + choice.group_size / 256) for choice in choices])
    losses = (3.0 / alphas)[:, None] ** 2 * 1e6 * rates * generator.lognormal(0, 0.03, (len(keys), len(choices)))
    rows = {part: [PROFILE.storage_bytes(choice, shape) for choice in choices] for part, shape in SHAPES.items()}
    kinds = [list(row) for row in sorted({tuple(row) for row in rows.values()})]
    of_part = {part: kinds.index(row) for part, row in rows.items()}
    cost_of = [of_part[part] for _, _, part in keys]
    costs = np.array(kinds, np.int64)[cost_of]
    weights = SHAPES["gate"][0] * SHAPES["gate"][1]
    plain = {choice.bits: column for column, choice in enumerate(choices) if choice.group_size == 128}
    budget = int((costs[:, plain[2]].sum() + costs[:, plain[3]].sum()) // 2)
    solution = solve_exact(losses, costs, budget)
    picked = [choices[column] for column in solution.columns]
    return Plan(
        source=SourceIdentity(name="synthetic-kimi-k2", fingerprint="0" * 64),
        config={"method": "auto", "budget": {"bits": BITS, "bpw": None, "size_bytes": None}, "noise": "measured"},
        average_bits=float(np.mean([choice.bits for choice in picked])),
        bits_per_weight=8 * solution.cost / (weights * len(keys)),
        size_bytes=solution.cost + 21_000_000_000,
        budget_unit="bits",
        budget_slack=float(budget - solution.cost),
        objective=solution.objective,
        lower_bound=solution.lower_bound,
        price=solution.price,
        assignment={name: choice.bits for name, choice in zip(names, picked, strict=True)},
        choices={name: str(choice) for name, choice in zip(names, picked, strict=True)},
        alpha=dict(zip(names, alphas.tolist(), strict=True)),
        expected_error={
            name: float(f"{0.9 * 4.0**-choice.bits:.4g}") for name, choice in zip(names, picked, strict=True)
        },
        table=PlanTable(
            choices=tuple(map(str, choices)),
            losses={
                name: tuple(float(f"{loss:.6g}") for loss in row)
                for name, row in zip(names, losses.tolist(), strict=True)
            },
            costs=tuple(map(tuple, kinds)),
            cost_of=tuple(cost_of),
        ),
    )


def synthetic_sources(plan: Plan, layers: int, experts: int) -> Sources:
    """Places of all matrices, and spectra of those that a report keeps."""
    generator = np.random.default_rng(1)
    places = {}
    for name in plan.choices:
        place = place_by_name(name)
        places[name] = Place(place.layer, place.expert, place.projection, Role.EXPERT, 2048 * 7168)
    densities = {
        name: density(torch.from_numpy(np.sort(1e-3 * generator.pareto(plan.alpha[name] - 1, 4096) + 1e-4)))
        for name in sampled(plan)
    }
    return Sources(places, "the benchmark", {}, densities)


def in_browser(path: Path) -> dict[str, float]:
    """Seconds from opening the file to the last thing drawn, and of one move of the slider; medians of several."""
    from playwright.sync_api import sync_playwright

    loads, moves, requests = [], [], []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        for _ in range(LOADS):
            page = browser.new_page(viewport={"width": 1360, "height": 900})
            page.on("request", lambda request: requests.append(request.url))
            start = time.perf_counter()
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-ready=yes]")
            page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            loads.append(time.perf_counter() - start)
            moves.append(
                page.evaluate(
                    """async () => {
                      const slider = document.getElementById("slider"), start = performance.now();
                      slider.value = 1500;
                      slider.dispatchEvent(new Event("input"));
                      await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
                      return (performance.now() - start) / 1000;
                    }"""
                )
            )
            page.close()
        browser.close()
    others = [url for url in requests if url != path.as_uri()]
    if others:
        raise SystemExit(f"the page asked for {others[0]}")
    return {
        "load_s": statistics.median(loads),
        "load_worst_s": max(loads),
        "slider_s": statistics.median(moves),
    }


def main() -> None:
    """Write the page, open it, and keep the figures."""
    arguments = parser(__doc__)
    arguments.add_argument("--keep", type=Path, help="also write the page here")
    given = arguments.parse_args()
    layers, experts = (6, 64) if given.quick else (61, 384)
    plan = synthetic_plan(layers, experts)
    sources = synthetic_sources(plan, layers, experts)
    with TemporaryDirectory() as folder:
        path = (given.keep or Path(folder) / "report.html").resolve()
        start = time.perf_counter()
        summary = write_report(path, Run("synthetic", plan), sources)
        seconds = time.perf_counter() - start
        found: dict[str, Any] = {
            "matrices": summary.matrices,
            "steps": summary.steps,
            "spectra": summary.spectra,
            "bytes": summary.bytes,
            "write_s": seconds,
            "plan_loss": summary.plan_loss,
            "path_loss": summary.path_loss,
            **in_browser(path),
        }
    markdown = (
        f"The report of a synthetic plan of {found['matrices']:,} matrices with 24 choices each and "
        f"{found['spectra']:,} spectra: {found['bytes'] / 1e6:.1f} MB, written in {found['write_s']:.1f} s, drawn "
        f"{found['load_s']:.2f} s after Chromium was told to open it (median of {LOADS}, worst "
        f"{found['load_worst_s']:.2f} s); a move of the slider takes {1e3 * found['slider_s']:.0f} ms."
    )
    save("report", "The report of a large model", [found], markdown, given.quick)


if __name__ == "__main__":
    main()
