"""Parts of benchmarks/codes.py and equal_bytes.py that figures in the documents rest on."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import codes
import equal_bytes


def test_shortest_points_are_those_of_the_lattice() -> None:
    points = codes.shortest(241)  # the origin and the 240 roots
    assert sorted(set((points**2).sum(1).tolist())) == [0.0, 2.0]
    assert len({tuple(point) for point in points.tolist()}) == 241


def test_water_filling_leaves_what_theory_says() -> None:
    assert codes.by_water(np.ones(16), 2.0) == pytest.approx(2.0**-4)
    uneven = np.array([16.0, 1.0])  # at one bit a weight both axes are above the water: 4 and ½ … log₂ of means
    assert codes.by_water(uneven, 1.0) == pytest.approx(2 * math.sqrt(16.0) * 2**-2 / 17)
    assert codes.by_water(np.ones(4), 0.0) == 1.0


def test_a_basis_costs_what_it_takes_to_store() -> None:
    stack = torch.randn((64, 32, 32), generator=torch.Generator().manual_seed(0))
    found = codes.shared_basis(stack, 2.0, 0.0)
    assert found is not None and codes.distance(found) == pytest.approx(8 / 64, abs=0.02)
    assert codes.shared_basis(stack[:1], 2.0, 0.0) is None


def test_rows_of_other_texts_stay() -> None:
    row = {"model": "m", "bits": "2", "way": "usual", "tokens": 4, "texts": "a", "kl": 1.0}
    again, other = row | {"kl": 2.0}, row | {"texts": "b"}
    assert equal_bytes.joined([row, other], [again]) == [other, again]
