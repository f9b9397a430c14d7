"""How far errors of one kind of weights move the stream, and how routers use experts, seen while llama.cpp runs.

An error of a down projection's weights, relative to them, is as large in its output y, relative to that: per token
E‖y‖² for each unit of it, of routed experts Σₑ ‖yₑ‖², as their errors are independent. From there it is followed
through the graph up to what the layer leaves. What is added to the output (a shared expert, a bias, the stream itself)
leaves the error as it is; everything else (routing weights, norms, scales, gates) changes it as it changes the output.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphaq.engines.gguf.passes import STREAM
from alphaq.engines.gguf.watching import Node, NoNumber

ROUTED = "ffn_moe_weighted-"  # what experts put out, times their routing weights
SAME_VALUES = ("VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE")
SUMS = ("ADD", "ADD_ID", "SUB", "CONT", "CPY", "DUP")
SOURCES = 3  # of a node, that are looked at

Energies = NDArray[np.float64]


@dataclass
class Uses:
    """Of a layer's experts: chosen tokens, and Σ of their routing weights and of the squares, [experts]. slots: experts
    that a token chooses."""

    slots: int
    tokens: Energies
    weights: Energies
    squares: Energies

    def add(self, experts: NDArray[np.int32], weights: NDArray[np.float64]) -> None:
        """Take in chosen experts and their weights, [tokens, slots] each."""
        chosen, count = experts.ravel(), len(self.tokens)
        self.tokens += np.bincount(chosen, minlength=count)
        self.weights += np.bincount(chosen, weights.ravel(), count)
        self.squares += np.bincount(chosen, np.square(weights).ravel(), count)


@dataclass
class LayerFlow:
    """Of one layer. outputs, stream: Σy² of the watched weights, and of what the layer leaves. moved: Σ over `tokens`
    of how far the stream moves, squared and relative to it, per unit of relative error; they are 0 where nothing leads
    from the outputs to the stream."""

    outputs: float = 0.0
    stream: float = 0.0
    moved: float = 0.0
    tokens: int = 0
    uses: Uses | None = None


@dataclass(frozen=True)
class _Carried:
    """Of a node: energy of the errors in it, per unit of relative error of the weights, and its own; [tokens]."""

    errors: Energies
    energies: Energies


@dataclass
class Routing:
    """Watches the products with `blk.N.{kind}.weight`, and what becomes of them."""

    kind: str
    layer_done: Callable[[], object]
    layers: dict[int, LayerFlow] = field(default_factory=dict)
    _carried: dict[int, _Carried] = field(default_factory=dict)  # by the node's address
    _layer: int = -1
    _chosen: NDArray[np.int32] | None = None

    def wants(self, node: Node) -> bool:
        """Products with the weights, what they lead to in their layer, and what layers leave."""
        if node.name.startswith(STREAM) or self._layer_of(node) is not None:
            return node.readable
        given = self._given(node)
        if given and node.op in SAME_VALUES:
            self._carried[node.address] = given[0]
            return False
        return bool(given) and node.readable

    def sees(self, node: Node) -> None:
        """Follow one node. Raises NoNumber for values that are none."""
        layer = self._layer_of(node)
        if layer is not None:
            self._begin(node, layer)
        else:
            self._follow(node)
        if node.name.startswith(STREAM):
            self._end(node)

    def _layer_of(self, node: Node) -> int | None:
        """Of a product with a watched weight."""
        weight = node.source(0) if node.is_product else None
        found = None if weight is None else re.fullmatch(rf"blk\.(\d+)\.{self.kind}\.weight", weight.name)
        return None if found is None else int(found[1])

    def _given(self, node: Node) -> list[_Carried]:
        sources = (node.source(number) for number in range(SOURCES))
        return [self._carried[one.address] for one in sources if one is not None and one.address in self._carried]

    def _begin(self, node: Node, layer: int) -> None:
        """Errors arise in the product's output."""
        self._carried.clear()
        values, chosen, weight = node.values(), node.source(2), node.source(0)
        if not values.size or weight is None:  # llama.cpp leaves out of the last layer what no logits are asked of
            return
        self._chosen = None if node.op != "MUL_MAT_ID" or chosen is None else chosen.values()[0, 0].copy()
        tokens = values.size // values.shape[-1] if self._chosen is None else len(self._chosen)
        energies = _energies(values, tokens)
        if not np.isfinite(energies).all():
            raise NoNumber(f"in the outputs of {weight.name}")
        self._layer, flow = layer, self.layers.setdefault(layer, LayerFlow())
        flow.outputs += float(energies.sum())
        self._carried[node.address] = _Carried(energies, energies)
        if self._chosen is not None and flow.uses is None:
            nothing = np.zeros((3, weight.shape[1]))
            flow.uses = Uses(self._chosen.shape[1], *nothing)

    def _follow(self, node: Node) -> None:
        """What becomes of the errors in a node."""
        if node.name.startswith(ROUTED):
            self._count(node.source(1))
        given = self._given(node)
        if not given:
            return
        tokens, values = len(given[0].errors), node.values()
        if values.size % tokens or not values.size:
            return
        energies = _energies(values, tokens)
        if node.op in SUMS:
            errors = np.max([one.errors for one in given if len(one.errors) == tokens], axis=0)
        else:
            errors = given[0].errors * _ratio(energies, given[0].energies)
        self._carried[node.address] = _Carried(errors, energies)

    def _count(self, weights: Node | None) -> None:
        """Add up how the layer's experts are used; they count alike where their weights are not seen."""
        flow, experts = self.layers.get(self._layer), self._chosen
        if flow is None or flow.uses is None or experts is None:
            return
        self._chosen = None
        shown = weights is not None and weights.readable and np.prod(weights.shape) == experts.size
        values = weights.values().reshape(experts.shape) if shown and weights is not None else np.ones(experts.shape)
        flow.uses.add(experts, values.astype(np.float64))

    def _end(self, node: Node) -> None:
        """The layer is done."""
        self._count(None)
        flow, carried = self.layers.get(self._layer), self._carried.get(node.address)
        if flow is not None and node.name == f"{STREAM}{self._layer}":
            energy = float(_energies(node.values(), 1).sum())
            if not np.isfinite(energy):
                raise NoNumber(f"in the outputs of layer {self._layer}")
            flow.stream += energy
            if carried is not None:
                flow.moved += float(_ratio(carried.errors, carried.energies).sum())
                flow.tokens += len(carried.errors)
        self._carried.clear()
        self.layer_done()


def _energies(values: NDArray[Any], tokens: int) -> Energies:
    """Σ over each token's values of their squares, [tokens]."""
    rows = values.reshape(tokens, -1)
    energies: Energies = np.square(rows, dtype=np.float32).sum(axis=1, dtype=np.float64)
    return energies


def _ratio(part: Energies, whole: Energies) -> Energies:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)
