"""`alphaq analyze`: the spectrum of every matrix, as a table that plans can be made from."""

from __future__ import annotations

from pathlib import Path

from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.writer import atomic_file
from alphaq.measuring.measurement import Wanted, measure
from alphaq.measuring.resources import USUAL, Resources
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.spectrum import Spectrum
from alphaq.spectra.measure import write_stats
from alphaq.spectra.variants import FAST_VARIANT, SpectrumVariant


def analyze(
    checkpoint: Checkpoint,
    out: Path,
    variant: SpectrumVariant = FAST_VARIANT,
    resources: Resources = USUAL,
) -> list[tuple[MatrixRef, Spectrum]]:
    """Measure every matrix and write the stats CSV."""
    matrices = checkpoint.matrices
    measured = measure(checkpoint, matrices, Wanted(variant), resources=resources)
    rows = [
        (matrix, one.spectrum)
        for matrix, one in zip(matrices, resources.wrap(measured, len(matrices), "analyze"), strict=True)
        if one.spectrum is not None
    ]
    with atomic_file(out) as unfinished:
        write_stats(unfinished, rows)
    return rows
