"""The default: how much of the signal each matrix carries × how often it is used × its relative error.

    loss = √S(layer, projection) · πₑ · Σ(w − ŵ)² / Σw² · parameters

S is measured, not assumed: random tokens, rewritten once by the model itself, are sent through it, and S is how far
rounding moves the stream behind a layer, squared and relative to it, per unit of relative weight error. It finds what
is true of most models, early layers and down projections first, without being told. Such tokens overstate the first
layers, hence the root. πₑ is the routing prior, averaged within the layer. For llama.cpp's types S without a root was
better. Where rounding shrinks all weights, harm grows faster than the squared error; the default quantizer
prevents that (quantizers/debiased.py). Experiments: docs/research/log.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from alphaq.formats.table import format_of
from alphaq.nouns.choice import Choice
from alphaq.sensitivity.base import Evidence
from alphaq.sensitivity.router import relative_use

SIGNAL_EXPONENT = 0.5


def signal_exponent(choices: Sequence[Choice]) -> float:
    """Of S, for integer grids or for ggml types."""
    return 1.0 if any(format_of(choice).foreign for choice in choices) else SIGNAL_EXPONENT


def signal_share(evidence: Evidence) -> np.ndarray:
    """S of each matrix's (layer, projection) over the mean S, float64 [matrices]; 1 where the pass overflowed."""
    synthetic = evidence.synthetic
    assert synthetic is not None  # methods that call this ask for it
    places = [(matrix.layer, matrix.projection) for matrix in evidence.matrices]
    signals: dict[object, list[float]] = defaultdict(list)
    for place, matrix in zip(places, evidence.matrices, strict=True):
        signal = synthetic.matrices[matrix.name].signal
        signals[place] += [signal] if math.isfinite(signal) else []
    means = {place: sum(values) / len(values) if values else math.nan for place, values in signals.items()}
    # Four digits: the last ones differ between processors, and the plan should not.
    values = np.array([float(f"{means[place]:.4g}") for place in places])
    known = np.isfinite(values)
    average = values[known].mean() if known.any() else 0.0
    return np.where(known, values, average) / average if average > 0 else np.ones(len(values))


def losses(evidence: Evidence) -> np.ndarray:
    """Expected loss, float64 [matrices, choices]."""
    score = signal_share(evidence) ** signal_exponent(evidence.choices) * relative_use(evidence) * evidence.weights
    return score[:, None] * evidence.relative_errors
