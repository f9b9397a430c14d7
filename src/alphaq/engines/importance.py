"""How much the columns of matrices count, as an importance matrix tells an engine's quantizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SHOWN = 3  # of the tensors without an entry


@dataclass(frozen=True)
class Importance:
    """columns: of each matrix, float32 [columns], mean 1. missing: the engine's tensors that nothing is known of,
    those that a plan is about first. by_head: those whose heads have inputs of their own, which quantizers cannot tell
    apart."""

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    by_head: tuple[str, ...] = ()

    def notes(self, name: str) -> list[str]:
        """What a user should know of the importance matrix `name`."""
        said = []
        if self.missing:
            said.append(
                f"{name} has no entry for {_named(self.missing)}: all columns count alike there. "
                "llama-imatrix leaves out what its text did not reach; a longer text may reach it"
            )
        if self.by_head:
            said.append(
                f"each head of {_named(self.by_head)} has inputs of its own, which {name} tells apart and llama.cpp's "
                "quantizers do not: all columns count alike there"
            )
        return said


def _named(tensors: Sequence[str]) -> str:
    return ", ".join(tensors[:SHOWN]) + (f" and {len(tensors) - SHOWN} more" if len(tensors) > SHOWN else "")
