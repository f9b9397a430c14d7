"""Choosing one width per matrix under a budget: AlphaQ's exact solver against HiGHS and PuLP with CBC.

The problem is a multiple-choice knapsack: min Σ loss[i, xᵢ] subject to Σ cost[i, xᵢ] ≤ budget. PuLP
with CBC is what the method's reference code uses; HiGHS is the strongest open solver at hand.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pulp
from common import alternate, markdown_table, parser, save
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, kron, vstack

from alphaq.allocation.exact import solve_exact

TITLE = "Allocating bits"
RELATIVE_GAP = 1e-6
LIMIT_S = 120
SIZES = (4320, 70_000, 400_000)
QUICK_SIZES = (60,)
CHOICE_COUNTS = (4, 15)
LARGEST = {"highs": {4: 70_000, 15: 4320}, "pulp": {4: 4320, 15: 4320}}
LABELS = {"alphaq": "AlphaQ", "highs": "HiGHS", "pulp": "PuLP + CBC"}
ABOUT = f"""\
Synthetic cost tables with lognormal sensitivities. Four choices are 1 to 4 bits; fifteen are five widths times three
group sizes, with noise, so that some are dominated. Seconds are medians; building a model counts as its solver's
time, as it is part of using it (build and solve are of the last round). HiGHS and CBC may stop at a proven relative
gap of {RELATIVE_GAP:g} or after {LIMIT_S} seconds. The proven gap is (objective − lower bound) ÷ objective, as far as
the solver says (CBC prints few digits); the excess is how much worse than AlphaQ's the objective is. A problem larger
than a solver could hope to finish is skipped."""


@dataclass(frozen=True)
class Problem:
    """Losses float64 and costs int64, both [matrices, choices], and what may be spent."""

    losses: np.ndarray
    costs: np.ndarray
    budget: int


@dataclass(frozen=True)
class Answer:
    """A solver's plan: its loss, the bound it proves, what it spends; all None if it found none."""

    objective: float | None
    lower_bound: float | None
    cost: int | None
    build_s: float
    solve_s: float


def synthetic(matrices: int, choices: int) -> Problem:
    """A cost table that looks like a model's, seeded by its size."""
    random = np.random.default_rng((matrices, choices))
    sensitivity = random.lognormal(0, 1, (matrices, 1))
    parameters = random.choice([3, 7], (matrices, 1)) * 1024
    if choices == 4:
        bits = np.arange(1, 5)
        return Problem(sensitivity * 4.0**-bits, bits * parameters, int(2.5 * parameters.sum()))
    bits, groups = (axis.ravel() for axis in np.meshgrid([2, 3, 4, 5, 8], [32, 64, 128], indexing="ij"))
    stored_bytes = parameters * bits // 8 + 2 * parameters // groups
    finer = (groups / 128) ** 0.15 * random.lognormal(0, 0.1, (matrices, len(bits)))
    return Problem(sensitivity * 4.0**-bits * finer, stored_bytes, int(parameters.sum() * 3.2 / 8))


def alphaq(problem: Problem) -> Answer:
    """Ours."""
    start = time.perf_counter()
    found = solve_exact(problem.losses, problem.costs, problem.budget)
    return Answer(found.objective, found.lower_bound, found.cost, 0.0, time.perf_counter() - start)


def highs(problem: Problem) -> Answer:
    """HiGHS through scipy, on sparse constraints."""
    start = time.perf_counter()
    matrices, choices = problem.losses.shape
    one_each = kron(eye_array(matrices), np.ones((1, choices)))
    constraints = LinearConstraint(
        vstack([one_each, csr_array(problem.costs.reshape(1, -1))]),
        np.append(np.ones(matrices), 0),
        np.append(np.ones(matrices), problem.budget),
    )
    built = time.perf_counter()
    found = milp(
        problem.losses.ravel(),
        constraints=constraints,
        integrality=np.ones(problem.losses.size),
        bounds=Bounds(0, 1),
        options={"time_limit": LIMIT_S, "mip_rel_gap": RELATIVE_GAP},
    )
    solved = time.perf_counter()
    return _answer(problem, found.x, found.mip_dual_bound, built - start, solved - built)


def pulp_cbc(problem: Problem) -> Answer:
    """CBC through PuLP, one Python object per variable; it writes the model to a file and starts a program."""
    start = time.perf_counter()
    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    taken = [
        [pulp.LpVariable(f"x_{i}_{j}", cat=pulp.LpBinary) for j in range(problem.losses.shape[1])]
        for i in range(len(problem.losses))
    ]
    variables = [variable for row in taken for variable in row]
    model += pulp.lpSum(loss * x for loss, x in zip(problem.losses.ravel().tolist(), variables, strict=True))
    for row in taken:
        model += pulp.lpSum(row) == 1
    costs = problem.costs.ravel().tolist()
    model += pulp.lpSum(cost * x for cost, x in zip(costs, variables, strict=True)) <= problem.budget
    built = time.perf_counter()
    with TemporaryDirectory() as folder:
        log = Path(folder) / "cbc.log"
        model.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=RELATIVE_GAP, timeLimit=LIMIT_S, logPath=str(log)))
        solved = time.perf_counter()
        stated = re.findall(r"^(?:Lower bound|Objective value):\s+(\S+)", log.read_text(), re.MULTILINE)
    found = np.array([variable.varValue or 0.0 for variable in variables])
    bound = float(stated[-1]) if stated else None  # the bound comes last, and is left out where it is the objective
    return _answer(problem, found if found.any() else None, bound, built - start, solved - built)


def _answer(problem: Problem, taken: np.ndarray | None, bound: float | None, build_s: float, solve_s: float) -> Answer:
    if taken is None:
        return Answer(None, bound, None, build_s, solve_s)
    units = np.arange(len(problem.losses))
    columns = taken.reshape(problem.losses.shape).argmax(axis=1)
    objective = float(problem.losses[units, columns].sum())
    return Answer(objective, bound, int(problem.costs[units, columns].sum()), build_s, solve_s)


SOLVERS: dict[str, Callable[[Problem], Answer]] = {"alphaq": alphaq, "highs": highs, "pulp": pulp_cbc}


def rows_of(matrices: int, choices: int, rounds: int) -> list[dict[str, Any]]:
    """One problem: a row per solver, those skipped included."""
    problem = synthetic(matrices, choices)
    entered = {
        name: lambda solver=solver: solver(problem)
        for name, solver in SOLVERS.items()
        if name == "alphaq" or matrices <= LARGEST[name][choices]
    }
    timings, answers = alternate(entered, rounds, warm_up=False)
    best = answers["alphaq"].objective
    rows = []
    for name in SOLVERS:
        row: dict[str, Any] = {"matrices": matrices, "choices": choices, "solver": name, "skipped": name not in entered}
        if name in entered:
            answer: Answer = answers[name]
            found, bound = answer.objective, answer.lower_bound
            row |= asdict(answer) | {
                "within_budget": answer.cost is not None and answer.cost <= problem.budget,
                "relative_gap": None if found is None or bound is None else max(0.0, (found - bound) / found),
                "excess": None if found is None else found / best - 1,
                "timing": asdict(timings[name]),
            }
        rows.append(row)
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    header = ["problem", "solver", "seconds", "build", "solve", "÷ AlphaQ", "objective", "proven gap", "excess"]

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else "0" if value == 0 else format(value, form)

    lines = []
    for row in rows:
        start = [f"{row['matrices']:,} × {row['choices']}", LABELS[row["solver"]]]
        if row["skipped"]:
            lines.append([*start, "skipped", *["–"] * 6])
            continue
        timing = row["timing"]
        lines.append(
            [
                *start,
                f"{timing['median_s']:.3g}",
                number(row["build_s"] or None, ".3g"),
                f"{row['solve_s']:.3g}",
                f"{timing['ratio']:,.1f}",
                number(row["objective"], ".9g") if row["within_budget"] else "no plan within the budget",
                number(row["relative_gap"], ".1e"),
                number(row["excess"], ".1e"),
            ]
        )
    return f"{ABOUT}\n\n{markdown_table(header, lines)}"


def main() -> None:
    """Run, show and keep."""
    quick = parser(__doc__).parse_args().quick
    sizes, rounds = (QUICK_SIZES, 2) if quick else (SIZES, 5)
    for solver in SOLVERS.values():
        solver(synthetic(20, 4))  # first calls load libraries and compile
    rows = [row for size in sizes for choices in CHOICE_COUNTS for row in rows_of(size, choices, rounds)]
    save("allocation", TITLE, rows, render(rows), quick)


if __name__ == "__main__":
    main()
