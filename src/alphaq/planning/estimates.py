"""From errors of some of a unit's matrices to those of all, with what is uncertain about their sum.

What is known of all matrices of a unit is their energy Σw². Errors at one choice follow it, and they follow errors at
other choices closer still: from matrix to matrix the ratio to the energy differs by 2 to 20 %, the ratio of two types'
errors by 1 to 5 % (docs/research/log.md). So a choice that was measured on few matrices is put in relation to one that
was measured on more, whichever leaves the least uncertain. One that was measured on none follows from what both types
leave of Gaussian weights; matrices of random heavy-tailed weights and of trained models came within 6 % of that.
Fractions of a bit follow from the whole rates on both sides of them: within 1.5 % on matrices of three trained models,
up to 5 % too little where a few columns stand out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from alphaq.formats.table import following
from alphaq.nouns.choice import Choice

UNSEEN = 0.1
"""Standard error of a relation that was not measured at all, relative; it makes the choices measured that matter."""
BETWEEN = 0.04
"""Standard error of what lies between the errors of two choices, relative."""
FEWEST = 4  # matrices on which a relation to another choice's errors can be told from chance


@dataclass(frozen=True, eq=False)
class Estimate:
    """errors: Σ(w − ŵ)² [matrices, choices]. deviations: relative standard errors of their sums [choices]."""

    errors: np.ndarray
    deviations: np.ndarray


@dataclass(frozen=True)
class Between:
    """Columns of a choice whose errors are not measured, and of the two that they lie between."""

    column: int
    low: int
    high: int


def between(choices: Sequence[Choice], measured: Collection[Choice]) -> tuple[Between, ...]:
    """Those of choices that follow from two that are measured. measured: choices that would be, these included."""
    places = {choice: column for column, choice in enumerate(choices)}
    return tuple(Between(places[one], *(places[other] for other in pair)) for one, pair in following(measured).items())


def of_unit(
    errors: np.ndarray,
    deviations: np.ndarray,
    energies: np.ndarray,
    usual: np.ndarray,
    follow: Collection[Between] = (),
) -> Estimate:
    """Errors [matrices, choices] where some are missing (NaN), completed. deviations: standard errors [matrices,
    choices] of those that are there. energies: Σw² [matrices]. usual: relative errors on Gaussian weights [choices],
    NaN where unknown; a choice that was measured on no matrix needs its own and another's. follow: columns that are
    not measured, since others tell them."""
    if follow:
        others = np.setdiff1d(np.arange(errors.shape[1]), [one.column for one in follow])
        found = of_unit(errors[:, others], deviations[:, others], energies, usual[others])
        completed, relative = np.empty(errors.shape), np.empty(errors.shape[1])
        completed[:, others], relative[others] = found.errors, found.deviations
        for one in follow:
            completed[:, one.column] = _interpolated(completed, usual, one)
            relative[one.column] = np.hypot(max(relative[one.low], relative[one.high]), BETWEEN)
        return Estimate(completed, relative)
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


def _interpolated(errors: np.ndarray, usual: np.ndarray, one: Between) -> np.ndarray:
    """Errors [matrices] of a choice between two others: their logarithms lie as those of Gaussian weights do."""
    low, own, high = np.log(usual[[one.low, one.column, one.high]])
    share = (own - low) / (high - low)
    return np.power(errors[:, one.low], 1 - share) * np.power(errors[:, one.high], share)


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
