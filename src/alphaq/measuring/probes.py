"""What is measured of each matrix for some methods only, while it is read for its errors. To add one: a line here.

A method asks for a probe by naming it among its needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from alphaq.research.statistics import WeightStatistics, weight_statistics


@dataclass(frozen=True)
class Probe:
    """measure: of [rows, columns] weights and their name. record: the dataclass of floats that it returns."""

    measure: Callable[[torch.Tensor, str], Any]
    record: type[Any]

    def fits(self, values: Mapping[str, float]) -> bool:
        """Whether the fields are those of the record; a cache may hold an earlier version's."""
        return values.keys() == {field.name for field in fields(self.record)}


PROBES: dict[str, Probe] = {"statistics": Probe(weight_statistics, WeightStatistics)}
