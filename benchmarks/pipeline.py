"""Time each stage on the bundled model beside a plain counterpart in the same run; results as JSON.

    python benchmarks/pipeline.py [MODEL]

Spectra are compared with a per-block SVD loop (how the method's reference code does it), the solver
with scipy's HiGHS. Ratios matter, not seconds: the machine may be noisy.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix, eye, kron, vstack

from alphaq import __version__, pipeline
from alphaq.allocation.exact import solve_exact
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.config import Budget, PlanConfig
from alphaq.records import Choice
from alphaq.sensitivity.distortion import measured_noise
from alphaq.spectra.farms import blocks
from alphaq.spectra.measure import spectrum

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def best_of(repeats: int, work: Callable[[], Any]) -> float:
    """Shortest wall time of a few runs, seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def svd_loop(weight: torch.Tensor) -> None:
    """Spectrum of every block, one LAPACK call each."""
    for block in blocks(weight, "x"):
        torch.linalg.svdvals(block)


def spectra_rows() -> list[dict[str, Any]]:
    """α of one matrix against the loop."""
    rows = []
    for shape in ((1408, 2048), (768, 2048)):
        weight = torch.randn(shape)
        ours = best_of(3, lambda weight=weight: spectrum(weight, "x"))
        loop = best_of(3, lambda weight=weight: svd_loop(weight))
        rows.append({"shape": shape, "alphaq_s": ours, "svd_loop_s": loop, "ratio": loop / ours})
    return rows


def highs(losses: np.ndarray, costs: np.ndarray, budget: int) -> float:
    """The same problem through scipy's HiGHS; returns the objective."""
    units, choices = losses.shape
    rows = vstack([kron(eye(units), np.ones((1, choices))), csr_matrix(costs.reshape(1, -1))])
    limits = LinearConstraint(rows, np.append(np.ones(units), 0), np.append(np.ones(units), budget))
    found = milp(losses.ravel(), constraints=limits, integrality=np.ones(losses.size), bounds=Bounds(0, 1))
    return float(found.fun)


def solver_rows() -> list[dict[str, Any]]:
    """Allocation of 4 320 matrices × 4 choices."""
    random = np.random.default_rng(0)
    bits = np.arange(1, 5)
    costs = bits * random.choice([3, 7], (4320, 1))
    losses = random.lognormal(0, 1, (4320, 1)) * 4.0**-bits
    budget = int(0.55 * costs.max(axis=1).sum())
    ours = best_of(3, lambda: solve_exact(losses, costs, budget))
    theirs = best_of(1, lambda: highs(losses, costs, budget))
    return [{"matrices": 4320, "choices": 4, "alphaq_s": ours, "highs_s": theirs, "ratio": theirs / ours}]


def quantizer_rows() -> list[dict[str, Any]]:
    """Round trips per second at each width, group 128."""
    weight = torch.randn(1408, 2048)
    rows = []
    for bits in (1, 2, 3, 4, 8):
        choice = Choice(bits, 128)
        seconds = best_of(3, lambda choice=choice: measured_noise(weight, (choice,), "x"))
        error = float(measured_noise(weight, (choice,), "x")[0])
        rows.append(
            {"choice": str(choice), "mean_squared_error": error, "megaweights_per_s": weight.numel() / seconds / 1e6}
        )
    return rows


def end_to_end(model: Path) -> dict[str, float]:
    """Plan, quantize and verify a checkpoint."""
    checkpoint = open_checkpoint(model)
    config = PlanConfig(budget=Budget(bits=2.5))
    start = time.perf_counter()
    plan = pipeline.make_plan(checkpoint, config, pipeline.measure_for_plan(checkpoint, config))
    planned = time.perf_counter()
    with TemporaryDirectory() as scratch:
        pipeline.quantize(checkpoint, plan, Path(scratch) / "out")
    done = time.perf_counter()
    parameters = sum(matrix.parameters for matrix in checkpoint.matrices)
    return {"megaparameters": parameters / 1e6, "plan_s": planned - start, "quantize_and_verify_s": done - planned}


def main() -> None:
    """Run everything, print it and keep it under results/."""
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "src" / "alphaq" / "data" / "tiny"
    result = {
        "alphaq": __version__,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "spectra": spectra_rows(),
        "allocation": solver_rows(),
        "quantizer": quantizer_rows(),
        "end_to_end": {"model": model.name, **end_to_end(model)},
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    (RESULTS / "pipeline.json").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
