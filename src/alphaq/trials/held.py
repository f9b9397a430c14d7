"""A model held in memory in float32 whose matrices can be exchanged, and the gradient of its KL by each of them.

Routed experts are run one at a time by the functions that stream them from disk (calibration/stream.py), the rest by
the model's own class. Each matrix has a place: a tensor, or some rows of a fused one, which is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alphaq.calibration.inputs import linears, stored_matrices
from alphaq.calibration.stream import HollowModel, run_experts, traffic_of
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import PassError
from alphaq.evaluation.fidelity import batches
from alphaq.nouns.matrix import MatrixRef

LOGITS_AT_ONCE = 1 << 24  # of one pass with a graph


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a matrix lies in what the model computes with: rows `first` to `last` of a weight."""

    weight: Tensor
    first: int
    last: int


class HeldModel:
    """A checkpoint's own class with all weights in memory, in float32; calling it gives what transformers gives.

    Raises as `HollowModel` does. Memory: 4 bytes a weight, and as much for gradients of those that are asked for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._hollow = hollow = HollowModel(checkpoint)
        self.model: Any = hollow.model
        self.config, self.device = self.model.config, torch.device("cpu")
        names = [name for name, _ in self.model.named_children()]
        for name in sorted(names, key=hollow.stores, reverse=True):
            if not hollow.stores(name):  # tied: the head is the embedding
                self.model.tie_weights()
            hollow.fill(name, without=(hollow.planned_role,))
        self.model.requires_grad_(False)
        self._places: dict[str, _Place] = {}
        for matrix in checkpoint.planned:
            weight = checkpoint.read(matrix).float()
            self._places[matrix.name] = _Place(weight, 0, len(weight))
        for layer, name in hollow.experts.items():
            hollow.model.get_submodule(name).forward = self._expert_forward(layer)
        for name, matrices in linears(hollow).items():
            self._place(self.model.get_submodule(name), matrices)
        for module in (hollow.base.get_input_embeddings(), self.model.get_output_embeddings()):
            name = next((name for name, one in self.model.named_modules() if one is module), None)
            if name is not None:
                self._place(module, stored_matrices(hollow, name))

    def __call__(self, ids: Tensor) -> Any:
        """Outputs of the class, with `logits` [windows, length, words], for ids int64 [windows, length]."""
        return self.model(input_ids=ids, use_cache=False)

    @property
    def exchangeable(self) -> frozenset[str]:
        """Names of the matrices that have a place; a class that stores one in another order hides it."""
        return frozenset(self._places)

    def put(self, name: str, values: Tensor) -> None:
        """Have the model compute with other values [rows, columns] in a matrix's place."""
        place = self._places[name]
        with torch.no_grad():
            place.weight[place.first : place.last].copy_(values)

    def gradients(
        self, ids: Tensor, reference: Callable[[Tensor], Any], context: int, names: Collection[str]
    ) -> Mapping[str, Tensor]:
        """Gradient of the mean KL per token to the reference by each named matrix, float32 [rows, columns].

        ids: int64 [windows, length], whose first `context` tokens are given. Raises PassError if the class computes
        without a gradient.
        """
        weights = [self._places[name].weight for name in names]
        scored = ids[:, context:].numel()
        for weight in weights:
            weight.requires_grad_(True)
        try:
            for part in self.groups(ids):
                with torch.no_grad():
                    log_p = reference(part).logits[:, context - 1 : -1].float().log_softmax(-1)
                with torch.enable_grad():
                    log_q = self(part).logits[:, context - 1 : -1].float().log_softmax(-1)
                    ((log_p.exp() * (log_p - log_q)).sum() / scored).backward()
            return {name: self._gradient(name) for name in names}
        except (RuntimeError, NotImplementedError) as error:
            raise PassError(
                f"{type(self.model).__name__} of {self.checkpoint.name} gives no gradient ({str(error)[:200]})."
            ) from error
        finally:
            for weight in weights:
                weight.requires_grad_(False)
                weight.grad = None

    def groups(self, ids: Tensor) -> list[Tensor]:
        """Windows that go through the model together; always the same ones, so that a reference can remember them."""
        words = int(self.config.get_text_config().vocab_size)
        room = max(1, LOGITS_AT_ONCE // (ids.shape[1] * words))
        return [part for some in batches([*ids.split(1)], words) for part in some.split(room)]

    def _gradient(self, name: str) -> Tensor:
        place = self._places[name]
        if place.weight.grad is None:  # no token reached the expert
            return torch.zeros_like(place.weight[place.first : place.last])
        return place.weight.grad[place.first : place.last]

    def _expert_forward(self, layer: int) -> Callable[..., Tensor]:
        def run(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            traffic = traffic_of(self._hollow, layer, (states, *args), kwargs)
            output = run_experts(self._hollow, traffic, lambda matrix: self._places[matrix.name].weight)
            return output.view_as(states)

        return run

    def _place(self, module: Any, matrices: Collection[MatrixRef]) -> None:
        """Note where the matrices of a module's weight lie, unless it holds them in another order."""
        if not matrices or any(one.name in self._places for one in matrices):
            return
        whole = torch.cat([self.checkpoint.read(matrix).float() for matrix in matrices])
        if not isinstance(module.weight, nn.Parameter) or not torch.equal(whole, module.weight):
            return
        first = 0
        for matrix in matrices:
            self._places[matrix.name] = _Place(module.weight, first, first + matrix.shape[0])
            first += matrix.shape[0]
