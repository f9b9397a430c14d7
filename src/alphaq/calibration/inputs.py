"""Show every matrix of the layers what it is multiplied with, and let the model go on with another in its place.

Tokens pass through the model layer by layer, straight from disk (see stream.py). Whoever looks on is shown the inputs
of some matrices just before they are used, and returns what stands in for them from then on, so later inputs are
those of a model whose earlier matrices are rounded already: what rounding them can still make up for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alphaq.calibration.stream import HollowModel, LayerTraffic, stream_forward
from alphaq.checkpoint.reader import Checkpoint
from alphaq.nouns.matrix import MatrixRef


@dataclass(frozen=True, eq=False)
class Inputs:
    """What some matrices are multiplied with.

    values: float32 [tokens, columns]. weights: float32 [tokens], what routing multiplies outputs with; None for one.
    """

    matrices: tuple[MatrixRef, ...]
    values: Tensor
    weights: Tensor | None = None

    def second_moments(self) -> Tensor:
        """Σ weight²·x·xᵀ / tokens, float32 [columns, columns]."""
        values = self.values if self.weights is None else self.values * self.weights[:, None]
        return (values.T @ values) / max(1, len(values))


Visit = Callable[[Inputs], Sequence[Tensor]]
"""Returns a float32 [rows, columns] for each of the inputs' matrices."""


def stream_inputs(checkpoint: Checkpoint, ids: Tensor, visit: Visit) -> None:
    """Run int64 token ids [windows, length] through the model and show each layer's matrices their inputs, in order.

    An expert that no token reached is shown none. Linear layers of parts that the class computes in a way of its own
    are not shown. Memory and errors as `stream_forward`, and a copy of one matrix's inputs.
    """
    hollow = HollowModel(checkpoint)
    for name, matrices in linears(hollow).items():
        hook = partial(_replace, visit=visit, matrices=matrices, checkpoint=checkpoint)
        hollow.model.get_submodule(name).register_forward_pre_hook(hook)
    stream_forward(checkpoint, ids, lambda traffic: None, hollow, partial(_experts, visit=visit))


def linears(hollow: HollowModel) -> dict[str, tuple[MatrixRef, ...]]:
    """Matrices that make up each linear layer of the decoder's layers outside the planned experts, by its name."""
    by_tensor: dict[str, list[MatrixRef]] = {}
    for matrix in hollow.checkpoint.matrices:
        if matrix.role is not hollow.planned_role:
            by_tensor.setdefault(matrix.tensor, []).append(matrix)
    of_modules = {}
    for name, module in hollow.model.named_modules():
        matrices = tuple(one for source in hollow.sources(f"{name}.weight") for one in by_tensor.get(source, ()))
        inside = any(name.startswith(f"{layer}.") for layer in hollow.layers)
        if inside and matrices and isinstance(module, nn.Linear):
            of_modules[name] = tuple(one for one in matrices if one.shape[1] == module.in_features)
    return of_modules


def stored_matrices(hollow: HollowModel, module: str) -> tuple[MatrixRef, ...]:
    """The matrices that make up the weight of the embedding or the head, by its module's name, if any is stored."""
    sources = hollow.sources(f"{module}.weight")
    return tuple(matrix for matrix in hollow.checkpoint.matrices if matrix.tensor in sources)


def _replace(
    module: Any, arguments: tuple[Any, ...], visit: Visit, matrices: tuple[MatrixRef, ...], checkpoint: Checkpoint
) -> None:
    """Before a linear layer runs: its weight becomes what the visitor returns, unless it is stored in another order."""
    restored = visit(Inputs(matrices, arguments[0].float().flatten(0, -2)))
    if torch.equal(torch.cat([checkpoint.read(matrix).float() for matrix in matrices]), module.weight):
        module.weight = nn.Parameter(torch.cat(tuple(restored)), requires_grad=False)


def _experts(hollow: HollowModel, traffic: LayerTraffic, visit: Visit) -> Tensor:
    """Σ w·expert(x) over each token's experts, float32 [tokens, hidden], of what the visitor makes of each."""
    output, form = torch.zeros_like(traffic.inputs), traffic.form
    for number, matrices in hollow.matrices[traffic.layer].items():
        token, slot = torch.where(traffic.experts == number)
        inputs, weights = traffic.inputs[token], traffic.weights[token, slot]
        first = visit(Inputs(tuple(matrices[part] for part in form.first), inputs, weights))
        hidden = form.hidden([inputs @ matrix.T for matrix in first], number)
        (down,) = visit(Inputs((matrices["down"],), hidden, weights))
        output.index_add_(0, token, form.output(hidden @ down.T, number) * weights[:, None])
    return output
