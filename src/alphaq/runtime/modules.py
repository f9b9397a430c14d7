"""Modules whose weights stay packed, in the place of transformers' own.

Experts keep their class, with its gate, biases and norms; only what multiplies is exchanged. A module that does
something else with its experts gets their matrices restored while it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from alphaq.errors import AlphaQError
from alphaq.runtime.multiply import multiply
from alphaq.runtime.packed import PackedWeights


class RestoredWhenRead(Tensor):
    """Stands for a packed matrix where code asks for a module's `weight`: only what reads its values restores it.

    Many classes ask at every step, but for the type or the device alone.
    """

    packed: PackedWeights

    @staticmethod
    @torch.compiler.disable
    def of(packed: PackedWeights) -> Tensor:
        """The first matrix, [rows, columns]."""
        made: RestoredWhenRead = Tensor._make_wrapper_subclass(
            RestoredWhenRead, packed.shape, dtype=packed.dtype, device=packed.device
        )
        made.packed = packed
        made._is_hf_initialized = True  # type: ignore[attr-defined] # transformers would draw random weights
        return made

    @property
    def data(self) -> Tensor:
        """The values."""
        return self.packed.dequantized(0, 0)

    @data.setter
    def data(self, _: Tensor) -> None:
        raise AlphaQError(
            "A packed matrix cannot be changed or resized. Make an ordinary model with `model.dequantize()` first."
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def restored(value: Any) -> Any:
            return value.packed.dequantized(0, 0) if isinstance(value, cls) else value

        return func(*tree_map(restored, args), **tree_map(restored, kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RestoredWhenRead({self.packed.extra_repr()})"


class PackedLinear(nn.Module):
    """y = x·Wᵀ + b with W packed; stands for `torch.nn.Linear`."""

    def __init__(self, weights: PackedWeights, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.packed = weights
        self.out_features, self.in_features = weights.shape
        self.bias = bias
        self._is_hf_initialized = True

    @property
    def weight(self) -> Tensor:
        """The matrix, restored at each use: for code that does not call the module."""
        return RestoredWhenRead.of(self.packed)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: [..., in_features] → [..., out_features]."""
        rows = inputs.reshape(-1, self.in_features)
        tokens = torch.arange(len(rows), device=rows.device)
        states = multiply(rows, self.packed, torch.zeros_like(tokens), tokens)
        states = states.view(*inputs.shape[:-1], self.out_features)
        return states if self.bias is None else states + self.bias


class PackedEmbedding(nn.Embedding):
    """What an embedding becomes when its table is packed: the rows of the tokens that it is given are restored."""

    packed: PackedWeights

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The table, restored at each use: for code that does not call the module."""
        return RestoredWhenRead.of(self.packed)

    def forward(self, input: Tensor) -> Tensor:
        """input: whole numbers […] → […, embedding_dim]."""
        return self.packed.rows(input.reshape(-1).long()).view(*input.shape, self.embedding_dim)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Classes made here are no module's attributes, which pickles look for."""
        return _unpickled_embedding, (self.original,), self.__getstate__()

    @property
    def original(self) -> type[nn.Embedding]:
        """The class before."""
        return nn.Embedding if type(self) is PackedEmbedding else type(self).__bases__[0]


def _unpickled_embedding(original: type[nn.Embedding]) -> Any:
    made = packed_embedding_class(original)  # type: ignore[arg-type] # types are hashable
    return made.__new__(made)


@cache
def packed_embedding_class(original: Any) -> Any:
    """An embedding class that looks rows up in a packed table, and does with them what it did."""
    if original is nn.Embedding:
        return PackedEmbedding
    return type(f"Packed{original.__name__}", (original, PackedEmbedding), {"__module__": __name__})


class PackedExperts(nn.Module):
    """What an expert class becomes when its fused parameters are packed."""

    packed_first: PackedWeights
    packed_down: PackedWeights

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [tokens, hidden]; top_k_index, top_k_weights: [tokens, k] → [tokens, hidden]."""
        module: Any = self
        count, chosen = top_k_index.shape
        experts = top_k_index.reshape(-1)
        tokens = torch.arange(count, device=experts.device).repeat_interleave(chosen)
        known = experts.clamp(0, len(self.packed_down.names[0]) - 1)  # of experts that lie elsewhere zeros are left
        states = multiply(hidden_states, self.packed_first, experts, tokens)
        biased = getattr(module, "has_bias", False)
        if biased:
            states = states + (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[known]
        states = _gated(module, states)
        states = multiply(states, self.packed_down, experts, torch.arange(len(experts), device=experts.device))
        if biased:
            states = states + module.down_proj_bias[known]
        if getattr(module, "has_post_expert_norm", False):
            states = module.post_expert_norm(states)
        weights = top_k_weights.reshape(-1, 1)
        if getattr(module, "zero_expert_num", 0):  # those after the last give their input
            states = torch.where((experts > known)[:, None], hidden_states[tokens], states)
        else:
            weights = weights.masked_fill((experts != known)[:, None], 0)
        return (states * weights).view(count, chosen, states.shape[-1]).sum(1).to(hidden_states.dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Classes made here are no module's attributes, which pickles look for."""
        return _unpickled, (type(self).__bases__[1],), self.__getstate__()


def _unpickled(original: type[nn.Module]) -> Any:
    made = packed_class(original)  # type: ignore[arg-type] # types are hashable
    return made.__new__(made)


def _gated(module: Any, projected: Tensor) -> Tensor:
    """Input of `down` from the outputs of what comes before."""
    if not getattr(module, "has_gate", True):
        return module.act_fn(projected)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(projected)
    gate, up = projected.chunk(2, dim=-1)
    return module.act_fn(gate) * up


@cache
def packed_class(original: Any) -> Any:
    """An expert class that multiplies with packed matrices and is otherwise as it was."""
    return type(f"Packed{original.__name__}", (PackedExperts, original), {"__module__": __name__})


class RestoredParameter:
    """Hooks that give a module a parameter while it or the module around it runs, made of its packed matrices.

    place: the module's attribute that holds those; make: forms the parameter of them.
    """

    def __init__(
        self, around: nn.Module, owner: nn.Module, name: str, place: str, make: Callable[[PackedWeights], Tensor]
    ) -> None:
        self.owner, self.name, self.place, self.make = owner, name, place, make
        self.running = 0
        self._start()
        self.handles = [
            handle
            for module in (around, owner)
            for handle in (
                module.register_forward_pre_hook(self._give),
                module.register_forward_hook(self._take, always_call=True),
            )
        ]

    def _start(self) -> None:
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Copies have a lock of their own."""
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start()

    @torch.compiler.disable
    def _give(self, *_: Any) -> None:
        with self.lock:
            if self.running == 0:
                self.owner.__dict__[self.name] = self.make(getattr(self.owner, self.place))
            self.running += 1

    @torch.compiler.disable
    def _take(self, *_: Any) -> None:
        with self.lock:
            self.running -= 1
            if self.running == 0:
                del self.owner.__dict__[self.name]

    def remove(self) -> None:
        """Undo the hooks."""
        for handle in self.handles:
            handle.remove()
