"""The default: how much of the signal each matrix carries × how often it is used × its relative error.

    loss = √S(layer, projection) · πₑ · (Σ(w − ŵ)² / Σw²)^κ · parameters,   κ = 1.4

S is measured, not assumed: random tokens, rewritten once by the model itself, are sent through it, and S is the
squared error that rounding puts on a layer's output, per unit of relative weight error, over the squared norm of
the residual stream at that layer. It finds what is true of most models, early layers and down projections first,
without being told. Such tokens overstate the first layers, hence the root. πₑ is the routing prior, averaged within
the layer. κ > 1 because the harm of coarse rounding grows faster than its squared error: with one matrix
rounded at a time, the divergence of the model's output grew 4.5 times from 2 bits to 1 where the squared error
grew 2.6 times, and 5.5 times from 3 bits to 2 where it grew 3.9 times. llama.cpp's types are another matter: there
divergence grew as the squared error did (4.1 times from Q3_K to Q2_K, 3.8 from Q4_K to Q3_K, where the error grew 3.4
and 4.2 times), so for them the loss is S · πₑ · error · parameters, without a root. Experiments: docs/LOG.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from alphaq.records import Choice
from alphaq.sensitivity.router import relative_use

if TYPE_CHECKING:
    from alphaq.sensitivity.methods import Evidence

HARM_EXPONENT = 1.4
SIGNAL_EXPONENT = 0.5


def exponents(choices: Sequence[Choice]) -> tuple[float, float]:
    """Of S and of the relative error, for integer grids or for ggml types."""
    return (1.0, 1.0) if any(choice.scheme for choice in choices) else (SIGNAL_EXPONENT, HARM_EXPONENT)


def signal_share(evidence: Evidence) -> np.ndarray:
    """S of each matrix's (layer, projection) over the mean S, float64 [matrices]; 1 where the pass overflowed."""
    synthetic = evidence.synthetic
    assert synthetic is not None  # methods that call this ask for it
    places = [(matrix.layer, matrix.projection) for matrix in evidence.matrices]
    found: dict[object, list[float]] = defaultdict(list)
    for place, matrix in zip(places, evidence.matrices, strict=True):
        signal = synthetic.matrices[matrix.name].signal
        found[place] += [signal] if math.isfinite(signal) else []
    means = {place: sum(values) / len(values) if values else math.nan for place, values in found.items()}
    # Four digits: the last ones differ between processors, and the plan should not.
    values = np.array([float(f"{means[place]:.4g}") for place in places])
    known = np.isfinite(values)
    average = values[known].mean() if known.any() else 0.0
    return np.where(known, values, average) / average if average > 0 else np.ones(len(values))


def losses(evidence: Evidence) -> np.ndarray:
    """Expected loss, float64 [matrices, choices]."""
    of_signal, of_error = exponents(evidence.choices)
    score = signal_share(evidence) ** of_signal * relative_use(evidence) * evidence.weights
    return score[:, None] * evidence.relative_errors**of_error
