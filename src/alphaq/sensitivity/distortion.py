"""Noise of storing a matrix by each choice, from a formula; `alphaq.measuring.measurement` measures the real one."""

from __future__ import annotations

import numpy as np

from alphaq.formats.table import code_bits
from alphaq.nouns.choice import Choice
from alphaq.nouns.spectrum import Spectrum


def analytic_noise(spectrum: Spectrum, choices: tuple[Choice, ...]) -> np.ndarray:
    """Mean squared error c·2^(−2b) per choice with c = Var(W), as the paper has it; float64 [choices]."""
    return spectrum.variance * np.array([2.0 ** (-2 * code_bits(choice)) for choice in choices])
