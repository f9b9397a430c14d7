"""How much the columns of matrices count, as an importance matrix tells an engine's quantizers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SHOWN = 3  # of the tensors without an entry


@dataclass(frozen=True)
class Importance:
    """columns: of each matrix, float32 [columns], mean 1. missing: the engine's tensors that nothing is known of,
    those that a plan is about first."""

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def note(self, name: str) -> str | None:
        """What a user should know of the importance matrix `name`."""
        if not self.missing:
            return None
        more = f" and {len(self.missing) - SHOWN} more" if len(self.missing) > SHOWN else ""
        return (
            f"{name} has no entry for {', '.join(self.missing[:SHOWN])}{more}: all columns count alike there. "
            "llama-imatrix leaves out what its text did not reach; a longer text may reach it"
        )
