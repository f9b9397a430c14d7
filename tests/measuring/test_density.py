from pathlib import Path

import numpy as np
import pytest
import torch

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.measuring.density import DensityTask, density, density_one
from alphaq.spectra.measure import spectrum
from alphaq.spectra.variants import SpectrumVariant


def pareto(count: int = 4000, alpha: float = 2.5) -> torch.Tensor:
    return torch.from_numpy(np.sort(1e-3 * (1 + np.random.default_rng(0).pareto(alpha - 1, count))))


def test_every_eigenvalue_is_in_a_bin_or_below_the_first() -> None:
    found = density(pareto())
    assert found.counts.sum() + found.below == found.count == 4000
    assert found.below == pytest.approx(0.02 * 4000, abs=1)
    assert found.counts[-1] >= 1


@pytest.mark.parametrize("tail", ["hill", "median"])
def test_the_fitted_law_lies_on_the_tail_of_pareto_eigenvalues(tail: str) -> None:
    found = density(pareto(40_000), SpectrumVariant("farms", tail), bins=24)  # type: ignore[arg-type]
    edges = 10 ** np.linspace(found.low, found.high, 25)
    heights = found.counts / found.count / np.diff(edges)
    inside = (edges[:-1] > found.start) & (found.counts > 50)
    # The mean of the law over a bin, by its integral: bins are too wide for its value at the middle.
    law = found.fitted(edges) * edges / (1 - (found.alpha or 0))
    assert inside.sum() >= 3
    assert heights[inside] == pytest.approx(np.diff(law)[inside] / np.diff(edges)[inside], rel=0.25)


def test_alpha_is_that_of_the_plan(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    for matrix in checkpoint.planned[:3]:
        found = density_one(checkpoint, DensityTask(matrix))
        assert found.alpha == pytest.approx(spectrum(checkpoint.read(matrix), matrix.name).alpha, rel=1e-4)


def test_a_matrix_without_a_tail_says_why() -> None:
    nothing, alike = density(torch.zeros(64)), density(torch.full((64,), 2.0))
    assert nothing.alpha is None
    assert "rank" in nothing.reason
    assert (nothing.count, nothing.counts.sum()) == (64, 0)
    assert alike.alpha is None
    assert "no spread" in alike.reason
    assert alike.counts.sum() == 64
