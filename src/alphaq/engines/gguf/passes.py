"""What tokens do inside a GGUF model of any architecture, seen while llama.cpp runs it from its memory-mapped file.

Tokens are the model's own writing: each window goes on from what the tokenizer puts before a text, token by token,
drawn from the model's own probabilities. Then one large batch of all of them is watched, so that each expert is read
once, however large the file is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphaq.engines.gguf.library import Llama
from alphaq.engines.gguf.watching import Node

STREAM = "l_out-"  # what a layer leaves in the residual stream, in every architecture of llama.cpp
ROUTED = "ffn_moe_weighted-"  # what experts put out, times their routing weights


@dataclass
class InputMoments:
    """Of one weight: Σx² by column of its inputs, float64 [experts, columns]; how many inputs each expert had, and the
    energy Σy² of its outputs, float64 [experts]. One row where there are no experts."""

    squares: NDArray[np.float64]
    tokens: NDArray[np.float64]
    outputs: NDArray[np.float64]


@dataclass
class Passing:
    """Watches a pass. moments: by the weight's name; stream: Σ of the squares after each layer, by its name."""

    moments: dict[str, InputMoments] = field(default_factory=dict)
    stream: dict[str, float] = field(default_factory=dict)
    routed: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    _chosen: dict[str, NDArray[np.int32]] = field(default_factory=dict)

    def wants(self, node: Node) -> bool:
        """Products with weights of the file, and what layers leave."""
        if node.is_product:
            weight = node.source(0)
            return weight is not None and weight.name.endswith(".weight")
        return node.name.startswith((STREAM, ROUTED)) and node.op != "VIEW"

    def sees(self, node: Node) -> None:
        """Add one node up."""
        if not node.is_product:
            self._sees_stream(node)
            return
        weight, inputs, chosen = (node.source(number) for number in range(3))
        assert weight is not None and inputs is not None  # of a product
        values, made = inputs.values(), node.values()
        if not values.size:  # llama.cpp leaves out of the last layer what no logits are asked of
            return
        if node.op == "MUL_MAT_ID":
            assert chosen is not None
            experts = chosen.values()[0, 0].copy()
            self._chosen[node.name.rpartition("-")[2]] = experts
            self._add(weight, *_by_expert(values[0], experts, weight.shape[1]), _energy_by(made[0], experts, weight))
            return
        columns = weight.shape[-1]
        squares = np.square(values.reshape(-1, columns)).sum(axis=0, dtype=np.float64)[None]
        count = np.array([values.size / columns])
        self._add(weight, squares, count, np.array([np.square(made).sum(dtype=np.float64)]))

    def _sees_stream(self, node: Node) -> None:
        if node.name.startswith(STREAM):
            energy = float(np.square(node.values()).sum(dtype=np.float64))
            self.stream[node.name] = self.stream.get(node.name, 0.0) + energy
            return
        layer = node.name.rpartition("-")[2]
        values = node.values()[0]
        if layer in self._chosen and values.shape[:2] == self._chosen[layer].shape:
            energies = np.square(values).sum(axis=-1, dtype=np.float64)
            count = int(self._chosen[layer].max()) + 1
            found = np.bincount(self._chosen[layer].ravel(), energies.ravel(), minlength=count)
            known = self.routed.get(layer, np.zeros(0))
            size = max(len(known), len(found))
            self.routed[layer] = np.pad(known, (0, size - len(known))) + np.pad(found, (0, size - len(found)))

    def _add(self, weight: Node, squares: Any, tokens: Any, outputs: Any) -> None:
        known = self.moments.get(weight.name)
        if known is None:
            self.moments[weight.name] = InputMoments(squares, tokens, outputs)
        else:
            known.squares += squares
            known.tokens += tokens
            known.outputs += outputs


def _by_expert(
    values: NDArray[Any], experts: NDArray[np.int32], count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Σx² [experts, columns] and inputs [experts], of values [tokens, 1 or chosen, columns] and experts
    [tokens, chosen]."""
    squares, seen = np.zeros((count, values.shape[-1])), np.zeros(count)
    for expert in np.unique(experts):
        rows, places = np.nonzero(experts == expert)
        own = values[rows, places % values.shape[1]]
        squares[expert], seen[expert] = np.square(own).sum(axis=0, dtype=np.float64), len(rows)
    return squares, seen


def _energy_by(made: NDArray[Any], experts: NDArray[np.int32], weight: Node) -> NDArray[np.float64]:
    energies = np.square(made).sum(axis=-1, dtype=np.float64)
    return np.bincount(experts.ravel(), energies.ravel(), minlength=weight.shape[1])


def own_windows(model: Llama, count: int, length: int, seed: int = 0) -> NDArray[np.int32]:
    """Windows that the model writes, int32 [count, length], all at once, one token after the other.

    Each begins with what the tokenizer puts before a text and, so that they differ, with a token drawn at random.
    """
    chance = np.random.Generator(np.random.PCG64(seed))
    first = np.tile(np.array(model.prefix, np.int32), (count, 1))
    ids = np.concatenate([first, chance.integers(model.vocab_size, size=(count, 1), dtype=np.int32)], axis=1)
    wanted = np.zeros(ids.shape, np.bool_)
    wanted[:, -1] = True
    logits = model.windows(ids, wanted)
    for place in range(ids.shape[1], length):
        drawn = _drawn(logits, chance)[:, None]
        ids = np.concatenate([ids, drawn], axis=1)
        if place + 1 < length:
            logits = model.step(drawn, place, np.ones(drawn.shape, np.bool_))
    return ids


def rewritten_windows(model: Llama, count: int, length: int, times: int, seed: int = 0) -> NDArray[np.int32]:
    """The same at the price of `times` passes over all tokens: each is drawn anew after those before it.

    For files larger than memory, of which each pass reads every weight once.
    """
    chance = np.random.Generator(np.random.PCG64(seed))
    keep = len(model.prefix) + 1
    ids = chance.integers(model.vocab_size, size=(count, length), dtype=np.int32)
    ids[:, : keep - 1] = model.prefix
    wanted = np.ones(ids.shape, np.bool_)
    wanted[:, : keep - 1] = wanted[:, -1] = False
    for _ in range(times):
        logits = model.windows(ids, wanted)
        ids[:, keep:] = _drawn(logits, chance).reshape(count, -1)
    return ids


def _drawn(logits: NDArray[np.float32], chance: np.random.Generator) -> NDArray[np.int32]:
    """A token for each row of logits, by its probability."""
    noise = chance.gumbel(size=logits.shape)
    return np.asarray((logits + noise).argmax(axis=-1), np.int32)
