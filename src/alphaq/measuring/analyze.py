"""`alphaq analyze`: the spectrum of every matrix, as a table that plans can be made from."""

from __future__ import annotations

from pathlib import Path

from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.writer import atomic_file
from alphaq.measuring.measurement import measure
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.spectrum import Spectrum
from alphaq.spectra.measure import write_stats
from alphaq.spectra.variants import FAST_VARIANT, SpectrumVariant
from alphaq.work.resources import USUAL, Resources


def analyze(
    checkpoint: Checkpoint,
    out: Path,
    variant: SpectrumVariant = FAST_VARIANT,
    resources: Resources = USUAL,
) -> list[tuple[MatrixRef, Spectrum]]:
    """Measure every matrix and write the stats CSV."""
    matrices = checkpoint.matrices
    measured = measure(
        matrices, resources.workers_on(checkpoint), resources.cache, device=resources.device, variant=variant
    )
    rows = [
        (matrix, one.spectrum)
        for matrix, one in zip(matrices, resources.wrap(measured, len(matrices), "analyze"), strict=True)
        if one.spectrum is not None
    ]
    with atomic_file(out) as unfinished:
        write_stats(unfinished, rows)
    return rows
