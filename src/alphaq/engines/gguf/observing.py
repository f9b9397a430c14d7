"""What llama.cpp's own run of a GGUF file says of its matrices, where transformers cannot run it.

The signal of a matrix is how far rounding moves the stream behind its layer, squared and relative to it, per unit of
relative weight error. An error of an expert's weights reaches its output as it is, relative to it, so that is the
energy of the routed outputs over that of the stream: one figure for all projections of a layer. How often and how
strongly a router uses each expert is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from alphaq.calibration.traffic import Calibration, Expert, ExpertUse, MatrixUse
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.gguf.library import Llama
from alphaq.engines.gguf.passes import STREAM, Passing, rewritten_windows
from alphaq.nouns.matrix import Role

EVERY = 8  # of so many tokens one has its logits, without which the last layer would see no token


def observed(checkpoint: Checkpoint, windows: int, length: int) -> Calibration:
    """Uses of the experts and signals, on random tokens that the model has rewritten once.

    Raises LlamaError if llama.cpp cannot load the file.
    """
    assert checkpoint.gguf is not None  # only such a file is run so
    path, seen = checkpoint.folder / checkpoint.gguf.files[0], Passing()
    with Llama(path, context=length, sequences=windows) as model:
        ids = rewritten_windows(model, windows, length, times=1)
    wanted = np.zeros(ids.shape, np.bool_)
    wanted[:, EVERY - 1 :: EVERY] = True
    with Llama(path, context=length, sequences=windows, watch=seen) as model:
        model.windows(ids, wanted)
    layers = sorted({matrix.layer for matrix in checkpoint.planned if matrix.layer is not None})
    uses = {expert: use for layer in layers for expert, use in _uses(seen, layer).items()}
    signals = _signals(seen, layers, checkpoint.planned_role)
    matrices = {
        matrix.name: MatrixUse(0.0, 0.0, 0.0, {}, signals.get(matrix.layer or 0, 0.0)) for matrix in checkpoint.planned
    }
    return Calibration(uses, matrices, tokens=tuple(tuple(map(int, window)) for window in ids))


def _uses(seen: Passing, layer: int) -> dict[Expert, ExpertUse]:
    """Of a layer's experts; nothing if llama.cpp did not run it."""
    moments = seen.moments.get(f"blk.{layer}.ffn_down_exps.weight")
    if moments is None or not moments.tokens.any():
        return {}
    tokens = moments.tokens
    routed = seen.routed.get(str(layer), np.zeros(0))
    routed = np.pad(routed, (0, len(tokens) - len(routed)))
    # Where no weighted outputs are seen, weights count alike.
    squares = routed / np.where(moments.outputs > 0, moments.outputs, 1.0) if routed.any() else np.ones(len(tokens))
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


def _signals(seen: Passing, layers: Sequence[int], role: Role) -> dict[int, float]:
    """Energy of what each layer's MLP adds over that of the stream behind it.

    A layer that llama.cpp did not run, since it predicts further tokens, counts as the mean of the others.
    """
    found: dict[int, float] = {}
    for layer in layers:
        stream = seen.stream.get(f"{STREAM}{layer}", 0.0)
        moments = seen.moments.get(f"blk.{layer}.{'ffn_down_exps' if role is Role.EXPERT else 'ffn_down'}.weight")
        if stream > 0 and moments is not None:
            routed = float(seen.routed.get(str(layer), np.zeros(0)).sum())
            found[layer] = (routed or float(moments.outputs.sum())) / stream
    usual = sum(found.values()) / len(found) if found else 1.0
    return {layer: found.get(layer, usual) for layer in layers}
