"""How what a layer's experts put out reaches the stream: plainly, scaled, after a norm, through a matrix.

Families differ in that (Gemma and OLMo 2 have norms there, Granite a multiplier), so the layer itself is asked: it is
run again with another output of its experts. What does not depend on that is not computed again, since a module whose
inputs are what they were gives what it gave. Behind the experts everything works token by token.

Where the way only multiplies, a change δ of a token's output moves its stream by c·‖δ‖, and c² is all there is to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alphaq.errors import CheckpointError

SAME = 1e-4
"""How much of a move's energy may point elsewhere where a way is taken to multiply only."""
REPEATABLE = 1e-10
"""How far a layer that is run again may be from where it was, in squares relative to its stream."""
SMALLEST_ENERGY = 1e-30


class Recorder:
    """A decoder layer's modules, watched while it runs so that it can be run again from its experts on.

    experts: the layer's module whose output is to be replaced.
    """

    def __init__(self, layer: nn.Module, experts: nn.Module) -> None:
        self.layer = layer
        names = {module: name for name, module in layer.named_modules()}
        around = [module for module, name in names.items() if not name or names[experts].startswith(f"{name}.")]
        inner = [child for module in around for child in module.children() if child not in (*around, experts)]
        self._calls: dict[nn.Module, list[tuple[Any, Any]]] = {}
        self._replaying = False
        for module in inner:
            module.forward = self._watched(module, module.forward)

    def _watched(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inputs = (args, kwargs)
            if self._replaying:
                for known, output in self._calls.get(module, ()):
                    if _same(known, inputs):
                        return output
            output = forward(*args, **kwargs)
            if not self._replaying:
                self._calls.setdefault(module, []).append((inputs, output))
            return output

        return run

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """While it lasts, modules give what they gave where their inputs are the same."""
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False

    def clear(self) -> None:
        """Forget what was seen."""
        self._calls.clear()


def _same(known: Any, other: Any) -> bool:
    if isinstance(known, Tensor):
        if known is other:
            return True
        return isinstance(other, Tensor) and known.shape == other.shape and torch.equal(known, other)
    if isinstance(known, tuple | list):
        return type(known) is type(other) and len(known) == len(other) and all(map(_same, known, other))
    if isinstance(known, dict):
        return (
            isinstance(other, dict) and known.keys() == other.keys() and all(_same(known[k], other[k]) for k in known)
        )
    return known is other or (isinstance(other, bool | int | float | str) and bool(known == other))


class Passage:
    """From the output of one layer's experts, float32 [tokens, hidden], to the stream, float32 [tokens, anything].

    rerun: gives the stream for an output of the experts. Raises CheckpointError if the layer, run again with the same
    output, gives another stream.
    """

    def __init__(self, rerun: Callable[[Tensor], Tensor], output: Tensor, stream: Tensor, where: str) -> None:
        self.rerun, self.output = rerun, output
        self.stream = stream.reshape(len(output), -1)
        self.energy = self.stream.square().sum(-1, dtype=torch.float64).clamp(min=SMALLEST_ENERGY)
        if float(self._relative(self._change(torch.zeros_like(output))).mean()) > REPEATABLE:
            raise CheckpointError(
                f"{where} gives another result when it is run again with the same inputs, so what reaches its stream "
                "cannot be measured. Use --method alphaq, which needs no forward pass."
            )

    def moved(self, change: Tensor) -> Tensor:
        """‖move‖² / ‖stream‖² of each token's stream by a change of the output [tokens, hidden], float64 [tokens]."""
        return self._relative(self._change(change))

    def gains(self) -> Tensor | None:
        """What ‖δ‖² of a token's change is to be multiplied with for `moved`, float64 [tokens].

        None where the way does more than multiply, so that it depends on where a change points.
        """
        size = self.output.square().mean(-1, keepdim=True).sqrt()
        noise = torch.randn(self.output.shape, generator=torch.Generator().manual_seed(0))
        # Along the output itself, which a norm takes away, and in any other direction.
        change = self.output + size * noise
        move = self._change(change)
        if move.shape != change.shape:
            return None
        factors = (move * change).sum(-1) / change.square().sum(-1).clamp(min=SMALLEST_ENERGY)
        elsewhere = self._relative(move - factors[:, None] * change)
        if float(elsewhere.sum()) > SAME * float(self._relative(move).sum()):
            return None
        return factors.double().square() / self.energy

    def _change(self, change: Tensor) -> Tensor:
        return self.rerun(self.output + change).reshape(self.stream.shape) - self.stream

    def _relative(self, move: Tensor) -> Tensor:
        return move.square().sum(-1, dtype=torch.float64) / self.energy
