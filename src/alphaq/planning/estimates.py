"""From errors of some of a unit's matrices to those of all, with what is uncertain about their sum.

What is known of all matrices of a unit is their energy Σw². Errors at one choice follow it, and they follow errors at
other choices closer still: from matrix to matrix the ratio to the energy differs by 2 to 20 %, the ratio of two types'
errors by 1 to 5 % (docs/research/log.md). So a choice that was measured on few matrices is put in relation to one that
was measured on more, whichever leaves the least uncertain. One that was measured on none follows from what both types
leave of Gaussian weights; matrices of random heavy-tailed weights and of trained models came within 6 % of that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNSEEN = 0.1
"""Standard error of a relation that was not measured at all, relative; it makes the choices measured that matter."""
FEWEST = 4  # matrices on which a relation to another choice's errors can be told from chance


@dataclass(frozen=True, eq=False)
class Estimate:
    """errors: Σ(w − ŵ)² [matrices, choices]. deviations: relative standard errors of their sums [choices]."""

    errors: np.ndarray
    deviations: np.ndarray


def of_unit(errors: np.ndarray, deviations: np.ndarray, energies: np.ndarray, usual: np.ndarray) -> Estimate:
    """Errors [matrices, choices] where some are missing (NaN), completed. deviations: standard errors [matrices,
    choices] of those that are there. energies: Σw² [matrices]. usual: relative errors on Gaussian weights [choices],
    NaN where unknown; a choice that was measured on no matrix needs its own and another's."""
    seen = np.isfinite(errors)
    counts = seen.sum(axis=0)
    if counts.min(initial=len(errors)) == len(errors):
        return Estimate(errors, _ratio(np.sqrt(np.square(deviations).sum(axis=0)), errors.sum(axis=0)))
    completed, relative = errors.copy(), np.zeros(errors.shape[1])
    for column in np.argsort(-counts, kind="stable"):
        if not counts[column]:
            completed[:, column], relative[column] = _unseen(column, completed, relative, counts, usual)
            continue
        leaders = np.flatnonzero(counts > counts[column]) if counts[column] >= FEWEST else np.array([], np.int64)
        options = [_led(errors[:, column], deviations[:, column], energies, 0.0)]
        for leader in leaders:
            # Of what the leader was not measured on itself, it is an estimate: its own uncertainty comes on top.
            known = np.where(seen[:, leader], completed[:, leader], np.nan)
            if (known[seen[:, leader]] > 0).all() and not (seen[:, column] & ~seen[:, leader]).any():
                options.append(
                    _led(errors[:, column], deviations[:, column], completed[:, leader], relative[leader], known)
                )
        completed[:, column], relative[column] = min(options, key=lambda option: option[1])
    return Estimate(completed, relative)


def _unseen(
    column: int, completed: np.ndarray, relative: np.ndarray, counts: np.ndarray, usual: np.ndarray
) -> tuple[np.ndarray, float]:
    """One choice's errors [matrices] from those of the seen one that is nearest on Gaussian weights, and the relative
    standard error of their sum."""
    seen = np.flatnonzero((counts > 0) & (usual > 0))
    nearest = seen[np.abs(np.log(usual[seen] / usual[column])).argmin()]
    ratio = usual[column] / usual[nearest]
    return ratio * completed[:, nearest], float(np.hypot(relative[nearest], UNSEEN))


def _led(
    errors: np.ndarray,
    deviations: np.ndarray,
    leader: np.ndarray,
    uncertain: float,
    known: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """One choice's errors [matrices], missing ones in proportion to a leader's, and the relative standard error of
    their sum. uncertain: that of the leader's. known: the leader where it was measured, else NaN; all by default."""
    seen = np.isfinite(errors)
    total, base = errors[seen].sum(), leader[seen].sum()
    ratio = total / base if base > 0 else 0.0
    within = len(errors) if known is None else int(np.isfinite(known).sum())
    misses = errors[seen] - ratio * leader[seen]
    bessel = seen.sum() / max(1, seen.sum() - 1)
    spread = np.square(deviations[seen]).sum() + np.square(misses).sum() * bessel * max(0.0, 1 - seen.sum() / within)
    return np.where(seen, errors, ratio * leader), float(np.hypot(_ratio(np.sqrt(spread), total), uncertain))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.asarray(numerator / np.where(denominator > 0, denominator, 1.0))
