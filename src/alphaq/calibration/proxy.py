"""What stands for inputs that are not seen: how strong each column is, guessed from the weights alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alphaq.calibration.prior import norm_before, stretched
from alphaq.calibration.stream import HollowModel
from alphaq.checkpoint.reader import Checkpoint
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.settings import ProxyKind

SAMPLES = 1024


@dataclass(frozen=True)
class Proxy:
    """Second moments without a pass through the model.

    norm: the squares of the norm's weights for matrices that multiply its output in an expert, one for all columns of
    others. identity: one for all.
    """

    kind: ProxyKind

    def __str__(self) -> str:
        return self.kind

    @property
    def name(self) -> str:
        """What to call it."""
        return self.kind

    def diagonals(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Second moments of columns that differ, float32 [columns], by matrix.

        Raises CheckpointError as `HollowModel` does, and if the norm before the experts cannot be found.
        """
        if self.kind == "identity":
            return {}
        hollow = HollowModel(checkpoint)
        found: dict[str, Tensor] = {}
        for layer, experts in hollow.matrices.items():
            squares = _squares(hollow, layer)
            for matrices in experts.values():
                first = [matrices[part] for part in hollow.forms[layer].first]
                found |= {one.name: squares for one in first if one.shape[1] == len(squares)}  # latent experts differ
        return found

    def diagonal(self, known: dict[str, Tensor], matrix: MatrixRef) -> Tensor:
        """Of one matrix, from `diagonals`; float32 [columns]."""
        return known.get(matrix.name, torch.ones(matrix.shape[1]))


@torch.no_grad()
def _squares(hollow: HollowModel, layer: int) -> Tensor:
    """Mean squares of what the norm before a layer's experts puts out, float32 [hidden]."""
    name, norm = norm_before(hollow, layer)
    hollow.fill(name)
    width = hollow.base.config.hidden_size
    signs = torch.randint(2, (SAMPLES, width), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    squares = stretched(norm, signs).square().mean(0)
    hollow.empty(name)
    return squares
