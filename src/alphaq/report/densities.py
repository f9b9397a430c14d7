"""The eigenvalues that a report draws, measured anew: a plan keeps only what was fitted to them."""

from __future__ import annotations

from collections.abc import Iterable

from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import PlanError
from alphaq.measuring.density import Density, DensityTask, density_one
from alphaq.measuring.resources import USUAL, Resources
from alphaq.nouns.plan import Plan
from alphaq.report.content import MAX_DENSITIES, sampled
from alphaq.spectra.variants import FAST_VARIANT, SpectrumVariant


def densities(
    checkpoint: Checkpoint,
    plan: Plan,
    limit: int = MAX_DENSITIES,
    resources: Resources = USUAL,
) -> Iterable[tuple[str, Density]]:
    """Densities of eigenvalues of planned matrices, of at most `limit`, by the plan's own way to measure α.

    Raises PlanError if the checkpoint is not the one that was planned for.
    """
    if plan.source is None or plan.source.fingerprint != checkpoint.fingerprint:
        whose = f"{plan.source.name} with other tensors" if plan.source else "a stats file"
        raise PlanError(f"The plan was made of {whose}, not of {checkpoint.name}. Give the checkpoint it was made of.")
    variant = FAST_VARIANT if plan.config is None else SpectrumVariant(plan.config.spectrum, plan.config.tail)
    known = {matrix.name: matrix for matrix in checkpoint.matrices}
    tasks = [DensityTask(known[name], variant) for name in sampled(plan, limit)]
    results = resources.pool(checkpoint).map(density_one, tasks, lambda task: 10 * task.matrix.parameters)
    yield from zip((task.matrix.name for task in tasks), resources.wrap(results, len(tasks), "spectra"), strict=True)
