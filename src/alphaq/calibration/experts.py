"""What a family's own class computes in its experts, so far as they can be run one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alphaq.errors import CheckpointError, PassError
from alphaq.nouns.matrix import MatrixRef, Role


@dataclass(frozen=True, eq=False)
class ExpertForm:
    """What an expert of a module computes: down(gate(first(x))), with biases where the module has them.

    first: projections whose outputs, one after the other, are what the module's gate takes.
    """

    module: Any
    first: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """Projections in the order in which they run."""
        return (*self.first, "down")

    def hidden(self, products: Sequence[Tensor], expert: int) -> Tensor:
        """Input of `down` from the outputs of the first projections, [tokens, width]."""
        module, whole = self.module, torch.cat(tuple(products), dim=-1)
        bias = self._bias("gate_up_proj_bias" if hasattr(module, "gate_up_proj_bias") else "up_proj_bias", expert)
        whole = whole if bias is None else whole + bias
        if hasattr(module, "_apply_gate") and getattr(module, "has_gate", True):
            return module._apply_gate(whole)
        if self.first == ("up",):
            return module.act_fn(whole)
        gate, up = whole.chunk(2, dim=-1)
        return (getattr(module, "act_fn", None) or module.activation_fn)(gate) * up

    def output(self, product: Tensor, expert: int) -> Tensor:
        """What the expert gives from the output of `down`."""
        bias = self._bias("down_proj_bias", expert)
        return product if bias is None else product + bias

    def _bias(self, name: str, expert: int) -> Tensor | None:
        bias = getattr(self.module, name, None)
        return None if bias is None else bias[expert]


def _folded(module: Any) -> Any:
    """The part of a DBRX-like module that holds all its experts' weights, [experts · width, hidden] each."""
    inner = getattr(module, "mlp", None)
    return inner if all(isinstance(getattr(inner, name, None), Tensor) for name in ("w1", "v1", "w2")) else None


def is_expert_module(module: nn.Module, count: int, role: Role) -> bool:
    """Whether it holds a layer's routed experts, that many, or is the MLP of a dense model."""
    if role is Role.EXPERT and _folded(module) is not None:
        return getattr(module, "num_experts", None) == count
    down: Any = getattr(module, "down_proj", None)
    first = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
    if role is not Role.EXPERT:
        return isinstance(down, nn.Linear) and isinstance(first, nn.Linear)
    stacked = isinstance(down, Tensor) and isinstance(first, Tensor) and down.ndim == 3 == first.ndim
    return stacked and down.shape[0] == count


def form_of(module: Any, experts: dict[int, dict[str, MatrixRef]], where: str) -> ExpertForm:
    """The form of a module's experts. Raises CheckpointError if they have another, or matrices of other shapes."""
    folded = _folded(module)
    parts = experts[0].keys()
    first = next((names for names in (("gate", "up"), ("gate_up",), ("up",)) if {*names, "down"} == parts), None)
    dense = folded is None and isinstance(module.down_proj, nn.Linear)
    biased = dense and any(child.bias is not None for child in module.children() if isinstance(child, nn.Linear))
    more = not dense and folded is None and len(list(module.parameters())) > len(list(module.parameters(recurse=False)))
    runs = folded or module
    act = getattr(runs, "act_fn", None) or getattr(runs, "activation_fn", None)
    turned = not getattr(module, "is_concatenated", True) and first == ("gate", "up")
    refused = PassError(
        f"{where} ({type(module).__name__}) computes something of its own in its experts, so they cannot be run "
        "one at a time."
    )
    if first is None or biased or more or turned or not (act or hasattr(module, "_apply_gate")):
        raise refused
    if getattr(module, "zero_expert_num", 0):
        raise PassError(f"{where} ({type(module).__name__}) has experts without weights, which are not run here.")
    if folded is not None:
        hidden, width = folded.hidden_size, folded.ffn_hidden_size
    else:
        down = module.down_proj.weight.shape if dense else module.down_proj.shape[1:]
        hidden, width = reversed(down) if getattr(module, "is_transposed", False) else down
    for matrices in experts.values():
        for part, matrix in matrices.items():
            rows = 2 * width if part == "gate_up" else width
            expected = (hidden, width) if part == "down" else (rows, hidden)
            if matrix.shape == expected[::-1] != expected:
                raise refused
            if matrix.shape != expected:
                raise CheckpointError(
                    f"{where}: {matrix.name} has shape {list(matrix.shape)}, the model's class expects "
                    f"{list(expected)}. Download the checkpoint again or correct config.json."
                )
    return ExpertForm(runs, first)
