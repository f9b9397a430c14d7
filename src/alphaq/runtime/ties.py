"""Embeddings and linear layers that become packed, and what is tied to them: a head that is the embedding.

transformers ties parameters, of which packed modules have none. Those that are tied share one `PackedWeights` instead,
and the model forgets the tie for as long.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from alphaq.runtime.modules import PackedEmbedding, PackedLinear, packed_embedding_class
from alphaq.runtime.packed import PackedWeights


@dataclass(frozen=True)
class Tied:
    """A parameter that is stored, and those that are the same one; `others` have stored tensors of their own.

    What is stored apart is not tied, whatever config.json says.
    """

    names: tuple[str, ...]
    others: tuple[str, ...] = ()
    forgotten: list[tuple[Any, dict[str, str]]] = field(default_factory=list)
    """Models, and the ties that were taken from each: parameter → the one that it is."""

    @classmethod
    def of(cls, model: Any, name: str, stored: Container[str]) -> Tied | None:
        """By the model's own ties; None where one of the modules has to have a parameter."""
        ties: dict[str, str] = model.all_tied_weights_keys
        source = ties.get(name, name)
        group = [one for one in (source, *(target for target, own in ties.items() if own == source)) if one != name]
        tied = cls((name, *(one for one in group if one not in stored)), tuple(one for one in group if one in stored))
        return tied if all(packable(model.get_submodule(_owner(one))) for one in tied.names) else None

    def pack(self, model: Any, weights: PackedWeights) -> None:
        """Let the modules use packed weights."""
        for name in self.names:
            module = model.get_submodule(_owner(name))
            if isinstance(module, nn.Embedding):  # which keeps its class: it may do more than look up
                del module.weight
                module.__class__ = packed_embedding_class(type(module))  # type: ignore[arg-type] # types are hashable
                module.packed = weights
            else:
                model.set_submodule(_owner(name), PackedLinear(weights, module.bias))
        for prefix, inner in model.named_modules():
            self._forget(inner, f"{prefix}." if prefix else "")

    def _forget(self, inner: Any, prefix: str) -> None:
        ties = getattr(inner, "all_tied_weights_keys", None) or {}
        mine = {*self.names, *self.others}
        gone = {target: source for target, source in ties.items() if {prefix + target, prefix + source} & mine}
        if gone:
            inner.all_tied_weights_keys = {target: source for target, source in ties.items() if target not in gone}
            inner._tied_weights_keys = dict(inner.all_tied_weights_keys)  # its own, else those of its class are asked
            self.forgotten.append((inner, gone))

    def restore(self, model: Any, weight: nn.Parameter) -> None:
        """The inverse of `pack`."""
        for name in self.names:
            module: Any = model.get_submodule(_owner(name))
            if isinstance(module, PackedEmbedding):
                del module.packed
                module.__class__ = module.original  # type: ignore[assignment] # which is not a packed one
                setattr(module, "weight", weight)  # noqa: B010 - of the class that it has now
            else:
                linear = nn.Linear(module.in_features, module.out_features, device="meta")
                linear.weight, linear.bias = weight, module.bias
                model.set_submodule(_owner(name), linear)
        for inner, ties in [] if self.others else self.forgotten:
            inner.__dict__.pop("_tied_weights_keys", None)
            inner.all_tied_weights_keys |= ties


def packable(module: nn.Module) -> bool:
    """Whether a module's one matrix can stay packed."""
    return type(module) is nn.Linear or isinstance(module, nn.Embedding)


def _owner(name: str) -> str:
    """The module that a parameter belongs to."""
    return name.rpartition(".")[0]
