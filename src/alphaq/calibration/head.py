"""From final hidden states to logits, by the model's own class: its head, scales, caps and all.

Streaming ends before the head (see stream.py). Here the class's forward runs from there on: the part below the head is
replaced by one that gives the states, so that whatever a family does to its logits is done.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from alphaq.calibration.products import Room, product
from alphaq.calibration.stream import HollowModel
from alphaq.errors import PassError


class _Given:
    """What stands for the outputs of the part below the head: the states, and nothing else."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class Head:
    """A context in which hidden states become logits. Memory: the head's weights in float32.

    by_rows: read them a few rows at a time, whenever the head runs, where the files hold them as they are; for many
    positions at once. Raises PassError if the class has no head for words, or cannot run it by itself.
    """

    def __init__(self, hollow: HollowModel, by_rows: bool = False) -> None:
        self.hollow = hollow
        self.module: Any = hollow.model.get_output_embeddings()
        if self.module is None:
            raise PassError(f"{type(hollow.model).__name__} of {hollow.checkpoint.name} has no head for words.")
        names = {module: name for name, module in hollow.model.named_modules()}
        self.name = names[self.module]
        self.tied = None if hollow.stores(self.name) else hollow.base.get_input_embeddings()
        self.filled = self.name if self.tied is None else names[self.tied]
        plain = by_rows and type(self.module) is nn.Linear and self.module.bias is None
        self.matrix = hollow.whole_matrix(self.filled) if plain else None

    def __enter__(self) -> Head:
        if (matrix := self.matrix) is not None:
            room = Room(self.hollow.checkpoint)
            self.module.forward = lambda inputs: product(inputs, matrix.shape[0], lambda: room.blocks(matrix))
            return self
        self.hollow.fill(self.filled)
        if self.tied is not None:
            self.module.weight = self.tied.weight
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.matrix is not None:
            del self.module.forward
            return
        self.hollow.empty(self.name)
        self.hollow.empty(self.filled)

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        """Logits, float32 [windows, length, words], of final hidden states [windows, length, hidden]."""
        return self.with_graph(states)

    def with_graph(self, states: Tensor) -> Tensor:
        """The same, differentiable where that is switched on."""
        model = self.hollow.model
        below = model.base_model
        forward = below.forward
        below.forward = lambda *args, **kwargs: _Given(states)
        try:
            # Classes with parts for images look the ids up before they hand them on: none of those stand here.
            output = model(input_ids=torch.zeros(states.shape[:2], dtype=torch.int64), use_cache=False)
        except (RuntimeError, TypeError, AttributeError, NotImplementedError, ValueError) as error:
            raise PassError(
                f"The head of {type(model).__name__} ({self.hollow.checkpoint.name}) cannot be run by itself "
                f"({str(error)[:200]})."
            ) from error
        finally:
            below.forward = forward
        logits: Tensor = output.logits
        return logits.float()
