"""Noise of storing a matrix by each choice: from a formula, or from a round trip through the quantizer."""

from __future__ import annotations

import numpy as np
import torch

from alphaq.quantizers.base import squared_error
from alphaq.records import Choice, Spectrum


def analytic_noise(spectrum: Spectrum, choices: tuple[Choice, ...]) -> np.ndarray:
    """Mean squared error c·2^(−2b) per choice with c = Var(W), as the paper has it; float64 [choices]."""
    return spectrum.variance * np.array([2.0 ** (-2 * choice.bits) for choice in choices])


def measured_noise(weight: torch.Tensor, choices: tuple[Choice, ...], name: str) -> np.ndarray:
    """Mean squared error per choice of a [rows, columns] matrix after the real round trip."""
    return np.array([squared_error(weight, choice, name) / weight.numel() for choice in choices])
