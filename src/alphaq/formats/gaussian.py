"""What ggml types and trellis codes make of Gaussian weights: the error to expect of a matrix that is not measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alphaq.nouns.choice import Choice

# Σ(w − ŵ)²/Σw² by `str(choice)`, of 512×1024 standard normal weights (NumPy's default_rng(0), float32) quantized
# by llama.cpp's own ggml_quantize_chunk (xllamacpp 2026.10) with an importance matrix of ones. The scale of the
# weights does not matter. Without an importance matrix the error of some types is larger: 0.339 for IQ1_M.
GAUSSIAN_ERROR: dict[str, float] = {
    "IQ1_S": 0.236,
    "IQ1_M": 0.204,
    "Q1_0": 0.360,
    "TQ1_0": 0.651,
    "IQ2_XXS": 0.118,
    "IQ2_XS": 0.0897,
    "IQ2_S": 0.0619,
    "Q2_K": 0.0718,
    "Q2_0": 0.514,
    "TQ2_0": 0.651,
    "IQ3_XXS": 0.0330,
    "IQ3_S": 0.0188,
    "Q3_K": 0.0209,
    "IQ4_XS": 0.00571,
    "IQ4_NL": 0.00561,
    "MXFP4": 0.0132,
    "NVFP4": 0.00905,
    "Q4_0": 0.00665,
    "Q4_1": 0.00488,
    "Q4_K": 0.00500,
    "Q5_0": 0.00164,
    "Q5_1": 0.00114,
    "Q5_K": 0.00125,
    "Q6_K": 0.000299,
    "Q8_0": 0.0000287,
    "16": 0.0,
}

# The same of 64×2048 standard normal weights and our default quantizer.
TRELLIS_ERROR: dict[str, float] = {
    "t1": 0.328,
    "t1.25": 0.226,
    "t1.5": 0.158,
    "t1.75": 0.111,
    "t2": 0.0778,
    "t2.25": 0.0554,
    "t2.5": 0.0396,
    "t2.75": 0.0283,
    "t3": 0.0201,
    "t3.25": 0.0146,
    "t3.5": 0.0106,
    "t3.75": 0.0077,
    "t4": 0.0055,
}


def gaussian_errors(choices: Sequence[Choice]) -> np.ndarray:
    """Relative errors on Gaussian weights, float64 [choices]: of matrices that are not measured."""
    known = GAUSSIAN_ERROR | TRELLIS_ERROR
    return np.array([known.get(str(choice), 4.0**-choice.bits) for choice in choices])
