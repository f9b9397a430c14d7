"""The gradient through a layer's experts, of which each is read once: what they put out is known from before.

A graph through them would read every matrix for their output and again for the gradient at its input. But that output
was found when the tokens went forward, and the gradient at a router's weight needs it as a product with the gradient at
the output alone, which is that of an expert's hidden values with the gradient there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alphaq.calibration.products import Room
from alphaq.calibration.stream import HollowModel, LayerTraffic
from alphaq.nouns.matrix import MatrixRef


@dataclass(frozen=True, eq=False)
class Seen:
    """What went through one matrix, and what the score makes of it.

    inputs: float32 [n, columns], or of the embedding int64 [n], the numbers of its rows. gradients: float32 [n, rows],
    of the summed log chances of the drawn tokens, by the matrix's outputs. positions: int64 [n], ascending, each
    row's place among the tokens of all windows in row-major order.
    independent: whether each drawn token's chance depends on its own row alone, as at the head.
    """

    matrix: MatrixRef
    inputs: Tensor
    gradients: Tensor
    positions: Tensor
    independent: bool = False


See = Callable[[Seen], None]


class _Known(torch.autograd.Function):
    """An output that was found before, whose gradient is taken by the inputs and weights that it came of."""

    @staticmethod
    def forward(ctx: Any, pull: Callable[[Tensor], tuple[Tensor, Tensor]], output: Tensor, *of: Tensor) -> Tensor:
        ctx.pull = pull
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.pull(gradient)


@dataclass(frozen=True, eq=False)
class Kept:
    """What experts put out, kept in 16 bits until gradients come by: to 0.02 % of each token's largest value.

    values: float16 [tokens, hidden]. sizes: float32 [tokens, 1].
    """

    values: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, output: Tensor) -> Kept:
        """Of float32 [tokens, hidden]."""
        sizes = output.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return cls((output / sizes).half(), sizes)

    def output(self) -> Tensor:
        """The same, float32 [tokens, hidden]."""
        return self.values * self.sizes


def known_output(hollow: HollowModel, traffic: LayerTraffic, kept: Kept, see: See) -> Tensor:
    """Σ w·expert(x) of each token, float32 [tokens, hidden], as it was found, with a graph that reads the experts."""

    def pull(gradient: Tensor) -> tuple[Tensor, Tensor]:
        return _pulled(hollow, traffic, gradient, see)

    result: Tensor = _Known.apply(pull, kept.output(), traffic.inputs, traffic.weights)
    return result


@torch.no_grad()
def _pulled(hollow: HollowModel, traffic: LayerTraffic, gradient: Tensor, see: See) -> tuple[Tensor, Tensor]:
    """From the gradient at the experts' output [tokens, hidden] that at their inputs and at the router's weights."""
    inputs, weights = traffic.inputs.detach(), traffic.weights.detach()
    of_inputs, of_weights = torch.zeros_like(inputs), torch.zeros_like(weights)
    room = Room(hollow.checkpoint)
    for number, matrices in hollow.matrices[traffic.layer].items():
        token, slot = torch.where(traffic.experts == number)
        if len(token):
            expert = _Expert(traffic, number, matrices, room, see)
            found, at_weights = expert.pulled(token, inputs[token], gradient[token], weights[token, slot, None])
            of_inputs.index_add_(0, token, found)
            of_weights[token, slot] = at_weights
    return of_inputs, of_weights


@dataclass(frozen=True, eq=False)
class _Expert:
    traffic: LayerTraffic
    number: int
    matrices: dict[str, MatrixRef]
    room: Room
    see: See

    def pulled(self, token: Tensor, inputs: Tensor, gradient: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of its tokens: the gradient at their inputs [n, hidden], and at their weights [n], given as [n, 1]."""
        form, down = self.traffic.form, self.matrices["down"]
        # Kept as they are stored, because reading costs more than putting them in float32 once more.
        parts = [self.matrices[part] for part in form.first]
        first = [(matrix, self.room.stored(matrix, place)) for place, matrix in enumerate(parts, start=1)]
        products = [(inputs @ self.room.copied(stored).T).requires_grad_() for _, stored in first]
        with torch.enable_grad():
            hidden = form.hidden(products, self.number)
        values, at_values = hidden.detach(), gradient @ self.room.read(down)
        bias = form.output(torch.zeros_like(gradient), self.number)
        at_weights = (values * at_values).sum(1) + (gradient * bias).sum(1)
        self.see(Seen(down, values, weights * gradient, token))
        found = torch.zeros_like(inputs)
        at_products = torch.autograd.grad(hidden, products, weights * at_values)
        for (matrix, stored), one in zip(first, at_products, strict=True):
            self.see(Seen(matrix, inputs, one, token))
            found += one @ self.room.copied(stored)
        return found, at_weights
