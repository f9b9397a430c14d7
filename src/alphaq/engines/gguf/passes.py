"""What tokens do inside a GGUF model of any architecture, seen while llama.cpp runs it from its memory-mapped file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphaq.engines.gguf.watching import Node, NoNumber

STREAM = "l_out-"  # what a layer leaves in the residual stream, in every architecture of llama.cpp
WEIGHT = ".weight"

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class InputMoments:
    """Of one weight: Σx² by column of its inputs, [matrices, columns], and how many inputs each had, [matrices].

    One matrix, or one for each expert or head where the tensor has three dimensions.
    """

    squares: Sums
    tokens: Sums

    def __add__(self, other: InputMoments) -> InputMoments:
        return InputMoments(self.squares + other.squares, self.tokens + other.tokens)


@dataclass
class Seen:
    """What passes have added up.

    moments: by the weight's name in the file. stream: Σx² of what each layer leaves and how many tokens that was, by
    the node's name. skipped: weights of which nothing is known, and why.
    """

    moments: dict[str, InputMoments] = field(default_factory=dict)
    stream: dict[str, tuple[float, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


class Passing:
    """Watches passes and adds up."""

    def __init__(self, layer_done: Callable[[], object] = lambda: None) -> None:
        self.seen = Seen()
        self._layer_done = layer_done

    def wants(self, node: Node) -> bool:
        """Products with weights of the file, and what layers leave."""
        if not node.is_product:
            return node.name.startswith(STREAM) and node.readable
        weight, inputs = node.source(0), node.source(1)
        if weight is None or inputs is None or not weight.name.endswith(WEIGHT):
            return False
        if not inputs.readable:
            self.seen.skipped[weight.name] = "its inputs are of a type that cannot be read"
        return inputs.readable

    def sees(self, node: Node) -> None:
        """Add one node up. Raises NoNumber for inputs that are none."""
        if not node.is_product:
            self._see_stream(node)
            return
        weight, inputs, chosen = (node.source(number) for number in range(3))
        assert weight is not None and inputs is not None  # or it would not have been wanted
        values, matrices = inputs.values(), weight.shape[1]
        if not values.size:  # llama.cpp leaves out of the last layer what no logits are asked of
            return
        if node.op == "MUL_MAT_ID":
            assert chosen is not None
            found = _by_expert(values[0], chosen.values()[0, 0], matrices)
        else:
            found = _by_matrix(values, matrices)
        if not np.isfinite(found.squares).all():
            raise NoNumber(f"first in the inputs of {weight.name}")
        known = self.seen.moments.get(weight.name)
        self.seen.moments[weight.name] = found if known is None else known + found

    def _see_stream(self, node: Node) -> None:
        values = node.values()
        energy, tokens = self.seen.stream.get(node.name, (0.0, 0))
        added = float(np.square(values, dtype=np.float32).sum(dtype=np.float64))
        self.seen.stream[node.name] = energy + added, tokens + values.size // values.shape[-1]
        self._layer_done()


@dataclass(frozen=True)
class Layers:
    """Watches only how far a pass is: `done` is called after each layer."""

    done: Callable[[], object]

    def wants(self, node: Node) -> bool:
        """What layers leave."""
        return node.name.startswith(STREAM)

    def sees(self, node: Node) -> None:
        """A layer is done."""
        self.done()


def _by_matrix(values: NDArray[Any], matrices: int) -> InputMoments:
    """Of a plain product: values [d3, d2, tokens, columns], where d2 are the matrices if there are several."""
    several = matrices > 1 and values.shape[1] == matrices
    rows = values.swapaxes(0, 1).reshape(matrices if several else 1, -1, values.shape[-1])
    squares = np.square(rows, dtype=np.float32).sum(axis=1, dtype=np.float64)
    return InputMoments(squares, np.full(len(rows), float(rows.shape[1])))


def _by_expert(values: NDArray[Any], experts: NDArray[np.int32], count: int) -> InputMoments:
    """Of a product with chosen experts: values [tokens, 1 or chosen, columns], experts [tokens, chosen]."""
    squares, tokens = np.zeros((count, values.shape[-1])), np.zeros(count)
    for expert in np.unique(experts):
        rows, places = np.nonzero(experts == expert)
        own = values[rows, places % values.shape[1]]
        squares[expert], tokens[expert] = np.square(own, dtype=np.float32).sum(axis=0, dtype=np.float64), len(rows)
    return InputMoments(squares, tokens)
