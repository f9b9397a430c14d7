"""Weight spectra: sub-matrix sampling, eigenvalues, tail exponents."""
