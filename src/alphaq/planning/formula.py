"""What a formula says of errors that are not measured, and of weights that are not there."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from alphaq.formats.gaussian import GAUSSIAN_ERROR
from alphaq.nouns.choice import Choice
from alphaq.nouns.spectrum import Spectrum
from alphaq.sensitivity.distortion import analytic_noise


def expected_error(spectrum: Spectrum, choice: Choice, energy: float, parameters: int) -> float:
    """Σ(w − ŵ)² from a formula: a ggml type's error on Gaussian weights, or Var(W)·2^(−2b)."""
    if (relative := GAUSSIAN_ERROR.get(str(choice))) is not None:
        return relative * energy
    return float(analytic_noise(spectrum, (choice,))[0]) * parameters


def alphas_of(spectra: Iterable[Spectrum]) -> np.ndarray:
    """α of each matrix, float64 [n], NaN where it is undefined."""
    return np.array([np.nan if spectrum.alpha is None else spectrum.alpha for spectrum in spectra])
