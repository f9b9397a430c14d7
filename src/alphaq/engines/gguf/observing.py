"""What llama.cpp's own run of a GGUF file says of its matrices, where transformers cannot run it.

The signal of a matrix is how far rounding moves the stream behind its layer, squared and relative to it, per unit of
relative weight error. An error of an expert's weights reaches its output as it is, relative to it, so that is the
energy of the routed outputs over that of the stream: one figure for all projections of a layer. How often and how
strongly a router uses each expert is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alphaq.calibration.traffic import Calibration, Expert, ExpertUse, MatrixUse
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.gguf.apart import Wrap, run_apart
from alphaq.engines.gguf.gathering import Runs, Sample, require_numbers, rewritten, watched
from alphaq.engines.gguf.passes import STREAM, Passing, Seen
from alphaq.engines.gguf.watching import Node
from alphaq.engines.gguf.windows import Ids
from alphaq.nouns.matrix import Role
from alphaq.work.workers import available_cores

EVERY = 8  # of so many tokens one has its logits, without which the last layer would see no token
ROUTED = "ffn_moe_weighted-"  # what experts put out, times their routing weights
DOWN = "ffn_down"  # weights whose outputs join the stream

Energies = NDArray[np.float64]


@dataclass
class Flows(Seen):
    """What goes into the stream.

    outputs: Σy² of what each down projection puts out, [experts], by the weight's name. routed: the same times the
    routing weights, [experts], by layer.
    """

    outputs: dict[str, Energies] = field(default_factory=dict)
    routed: dict[str, Energies] = field(default_factory=dict)


class Routing(Passing):
    """Watches down projections and what they put into the stream."""

    seen: Flows

    def __init__(self, layer_done: Callable[[], object]) -> None:
        super().__init__(layer_done)
        self.seen = Flows()
        self._chosen: dict[str, NDArray[np.int32]] = {}

    def wants(self, node: Node) -> bool:
        """Products with down projections, what layers leave, and experts' outputs with their weights."""
        if node.name.startswith(ROUTED):
            return node.op != "VIEW" and node.readable
        weight = node.source(0)
        return super().wants(node) and (not node.is_product or (weight is not None and DOWN in weight.name))

    def sees(self, node: Node) -> None:
        """Add one node up."""
        if node.name.startswith(ROUTED):
            self._see_routed(node)
            return
        super().sees(node)
        weight, chosen = node.source(0), node.source(2)
        if node.is_product and weight is not None and DOWN in weight.name and node.readable:
            self._see_outputs(node, weight, chosen)

    def _see_outputs(self, node: Node, weight: Node, chosen: Node | None) -> None:
        made = node.values()[0]
        experts = np.zeros(made.shape[:2], np.int32) if chosen is None else chosen.values()[0, 0].copy()
        self._chosen[_layer(node)] = experts
        added = _by_expert(made, experts, weight.shape[1])
        self.seen.outputs[weight.name] = self.seen.outputs.get(weight.name, 0.0) + added

    def _see_routed(self, node: Node) -> None:
        values, experts = node.values()[0], self._chosen.get(_layer(node))
        if experts is None or values.shape[:2] != experts.shape:
            return
        known = self.seen.routed.get(_layer(node), np.zeros(0))
        added = _by_expert(values, experts, max(len(known), int(experts.max(initial=-1)) + 1))
        self.seen.routed[_layer(node)] = np.pad(known, (0, len(added) - len(known))) + added


def _layer(node: Node) -> str:
    return node.name.rpartition("-")[2]


def _by_expert(values: NDArray[Any], experts: NDArray[np.int32], count: int) -> Energies:
    """Σy² [experts] of values [tokens, chosen, rows] by experts [tokens, chosen]."""
    energies = np.square(values, dtype=np.float32).sum(axis=-1, dtype=np.float64)
    return np.bincount(experts.ravel(), energies.ravel(), minlength=count).astype(np.float64)


def observed(checkpoint: Checkpoint, windows: int, length: int, shown: Wrap) -> Calibration:
    """Uses of the experts and signals, on random tokens that the model has rewritten once, in a process of its own.

    Raises LlamaError if llama.cpp cannot run the file, CheckpointError if it computes no numbers with it.
    """
    assert checkpoint.gguf is not None  # only such a file is run so
    path, sample = checkpoint.folder / checkpoint.gguf.files[0], Sample(tokens=windows * length, window=length)
    ids, seen = run_apart(path, _observed, path, sample, available_cores(), shown=shown)
    layers = sorted({matrix.layer for matrix in checkpoint.planned if matrix.layer is not None})
    uses = {expert: use for layer in layers for expert, use in _uses(seen, layer).items()}
    signals = _signals(seen, layers, checkpoint.planned_role)
    matrices = {
        matrix.name: MatrixUse(0.0, 0.0, 0.0, {}, signals.get(matrix.layer or 0, 0.0)) for matrix in checkpoint.planned
    }
    return Calibration(uses, matrices, tokens=tuple(tuple(map(int, window)) for window in ids))


def _observed(path: Path, sample: Sample, threads: int, shown: Wrap) -> tuple[Ids, Flows]:
    runs = Runs.of(path, threads, shown)
    ids = rewritten(runs, sample)
    seen = watched(runs, ids, Routing, most=ids.size // EVERY).seen
    require_numbers(path, seen)
    return ids, seen


def _uses(seen: Flows, layer: int) -> dict[Expert, ExpertUse]:
    """Of a layer's experts; nothing if llama.cpp did not run it."""
    moments = seen.moments.get(f"blk.{layer}.ffn_down_exps.weight")
    if moments is None or not moments.tokens.any():
        return {}
    tokens = moments.tokens
    routed = seen.routed.get(str(layer), np.zeros(0))
    routed = np.pad(routed, (0, len(tokens) - len(routed)))
    # Where no weighted outputs are seen, weights count alike.
    outputs = seen.outputs.get(f"blk.{layer}.ffn_down_exps.weight", np.zeros(len(tokens)))
    squares = routed / np.where(outputs > 0, outputs, 1.0) if routed.any() else np.ones(len(tokens))
    share = tokens / tokens.sum()
    return {
        (layer, expert): ExpertUse(
            float(share[expert]),
            math.sqrt(squares[expert]),
            float(share[expert] * squares[expert]),
            int(tokens[expert]),
        )
        for expert in range(len(tokens))
    }


def _signals(seen: Flows, layers: Sequence[int], role: Role) -> dict[int, float]:
    """Energy of what each layer's MLP adds over that of the stream behind it.

    A layer that llama.cpp did not run, since it predicts further tokens, counts as the mean of the others.
    """
    found: dict[int, float] = {}
    for layer in layers:
        stream, _ = seen.stream.get(f"{STREAM}{layer}", (0.0, 0))
        outputs = seen.outputs.get(f"blk.{layer}.{'ffn_down_exps' if role is Role.EXPERT else 'ffn_down'}.weight")
        if stream > 0 and outputs is not None:
            routed = float(seen.routed.get(str(layer), np.zeros(0)).sum())
            found[layer] = (routed or float(outputs.sum())) / stream
    usual = sum(found.values()) / len(found) if found else 1.0
    return {layer: found.get(layer, usual) for layer in layers}
