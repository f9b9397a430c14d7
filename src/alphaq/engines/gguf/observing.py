"""What llama.cpp's own run of a GGUF file says of its matrices, where transformers cannot run it.

The signal of a matrix is how far rounding moves the stream behind its layer, squared and relative to it, per unit of
relative weight error: one figure for all projections of a layer, since an error of any of them, relative to it, is as
large in the layer's output. How often and how strongly a router uses each expert is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from alphaq.calibration.traffic import Calibration, Expert, ExpertUse, MatrixUse
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.gguf.apart import Wrap, run_apart
from alphaq.engines.gguf.gathering import Runs, Sample, tokens_for, watched
from alphaq.engines.gguf.routing import LayerFlow, Routing
from alphaq.engines.gguf.windows import Ids
from alphaq.nouns.matrix import Role
from alphaq.work.cores import available_cores

EVERY = 8  # of so many tokens one has its logits, without which the last layer would see no token


def observed(checkpoint: Checkpoint, windows: int, length: int, bos: bool, shown: Wrap) -> Calibration:
    """Uses of the experts and signals, on random tokens that the model has rewritten once, in a process of its own.

    bos: whether each window begins with BOS, where the file asks for one. Raises LlamaError if llama.cpp cannot run
    the file.
    """
    assert checkpoint.gguf is not None  # only such a file is run so
    path = checkpoint.folder / checkpoint.gguf.files[0]
    sample = Sample(tokens=windows * length, window=length, bos=bos)
    kind = "ffn_down_exps" if checkpoint.planned_role is Role.EXPERT else "ffn_down"
    ids, flows = run_apart(path, _observed, path, sample, kind, available_cores(), shown=shown)
    layers = sorted({matrix.layer for matrix in checkpoint.planned if matrix.layer is not None})
    uses = {expert: use for layer in layers for expert, use in _uses(layer, flows.get(layer)).items()}
    signals = _signals(flows, layers)
    matrices = {
        matrix.name: MatrixUse(0.0, 0.0, 0.0, {}, signals.get(matrix.layer or 0, 0.0)) for matrix in checkpoint.planned
    }
    tokens = tuple(tuple(map(int, window)) for window in ids)
    return Calibration(uses, matrices, tokens=tokens, notes=_notes(flows, layers))


def _observed(path: Path, sample: Sample, kind: str, threads: int, shown: Wrap) -> tuple[Ids, dict[int, LayerFlow]]:
    runs = Runs.of(path, threads, shown, sample.bos)
    ids = tokens_for(runs, sample, "rewritten")
    return ids, watched(runs, ids, partial(Routing, kind), most=ids.size // EVERY).layers


def _uses(layer: int, flow: LayerFlow | None) -> dict[Expert, ExpertUse]:
    """Of a layer's experts; nothing if llama.cpp did not run it."""
    if flow is None or flow.uses is None or not flow.uses.tokens.any():
        return {}
    uses = flow.uses
    pairs = uses.tokens.sum()
    return {
        (layer, expert): ExpertUse(
            frequency=float(tokens / pairs),
            mean_weight=float(uses.weights[expert] / max(tokens, 1)),
            mean_square_weight=float(uses.squares[expert] * uses.slots / pairs),
            tokens=int(tokens),
        )
        for expert, tokens in enumerate(uses.tokens)
    }


def _signal(flow: LayerFlow | None) -> float | None:
    """Of a layer, by the matrix; None if nothing is known of it."""
    if flow is None or not flow.stream:
        return None
    # Where nothing leads to the stream that is understood, the outputs are taken to join it as they are.
    whole = flow.moved / flow.tokens if flow.tokens else flow.outputs / flow.stream
    return float(whole / (1 if flow.uses is None else len(flow.uses.tokens)))


def _signals(flows: Mapping[int, LayerFlow], layers: Sequence[int]) -> dict[int, float]:
    """Of each layer. One that llama.cpp did not run, since it predicts further tokens, counts as the mean of others."""
    found = {layer: signal for layer in layers if (signal := _signal(flows.get(layer))) is not None}
    usual = float(np.mean(list(found.values()))) if found else 1.0
    return {layer: found.get(layer, usual) for layer in layers}


def _notes(flows: Mapping[int, LayerFlow], layers: Sequence[int]) -> tuple[str, ...]:
    """What was not seen, and what is taken in its place."""
    raw = [layer for layer in layers if layer in flows and flows[layer].stream and not flows[layer].tokens]
    unseen = [layer for layer in layers if _signal(flows.get(layer)) is None]
    said = []
    if raw:
        said.append(
            f"how the MLP of {_named(raw)} joins the stream is not understood: its output is taken to be added as it is"
        )
    if unseen:
        instead = "all layers count alike" if len(unseen) == len(layers) else "they count as the mean of the others"
        said.append(f"llama.cpp shows nothing of the MLP of {_named(unseen)}: {instead}")
    return tuple(said)


def _named(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers, {layers[0]} among them"
