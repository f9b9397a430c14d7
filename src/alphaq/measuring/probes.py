"""What is measured of each matrix for some methods only, while it is read for its errors. To add one: a line here.

A method asks for a probe by naming it among its needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from alphaq.research.statistics import WeightStatistics, weight_statistics


@dataclass(frozen=True)
class Probe:
    """measure: of [rows, columns] weights and their name. record: the dataclass of floats that it returns."""

    measure: Callable[[torch.Tensor, str], Any]
    record: type[Any]


PROBES: dict[str, Probe] = {"statistics": Probe(weight_statistics, WeightStatistics)}
