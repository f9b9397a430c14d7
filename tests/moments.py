"""Second moments of inputs, and the error of outputs that they weigh."""

from __future__ import annotations

import torch


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(columns: int, tokens: int = 700, seed: int = 1) -> torch.Tensor:
    """Of inputs that are correlated and of very different sizes."""
    mixed = seeded(tokens, columns, seed=seed) @ (seeded(columns, columns, seed=seed + 1) + torch.eye(columns))
    inputs = mixed * torch.linspace(0.1, 2, columns)
    return inputs.T @ inputs / tokens


def objective(weight: torch.Tensor, restored: torch.Tensor, hessian: torch.Tensor) -> float:
    """Summed squared error of outputs."""
    miss = weight.double() - restored.double()
    return float(((miss @ hessian.double()) * miss).sum())
