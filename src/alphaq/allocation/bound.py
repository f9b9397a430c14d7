"""How far a plan is from what any quantizer could do with its bytes: the Gaussian rate–distortion bound.

Of Gaussian weights no code of R bits per weight has a relative squared error below D = 2^(−2R). With losses Σ aₘ·Dₘ, aₘ
the loss of a matrix that is left out altogether, and nₘ weights, the least loss in B bits is reverse water-filling:

    Dₘ = min(1, μ·nₘ/aₘ),   Σ nₘ·½·log₂(1/Dₘ) = B

(Cover and Thomas, Elements of Information Theory, 10.3). Heavy-tailed weights have a lower bound than Gaussian ones of
their variance, so for them it is a yardstick. What a plan loses beyond it comes from its quantizers, whose points lie
above the bound at every width, and from widths that come in steps: the best mix on curves through the same points,
where every width between them exists, parts the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import RateDistortion

FINE = 32  # widths between two whole ones
BISECTIONS = 80


def rate_distortion(
    choices: Sequence[Choice],
    losses: np.ndarray,
    errors: np.ndarray,
    energies: np.ndarray,
    nbytes: np.ndarray,
    weights: np.ndarray,
    columns: np.ndarray,
) -> RateDistortion | None:
    """A plan against the bound; None where losses are not proportional to squared errors, or nothing is lost.

    losses, Σ(w − ŵ)², nbytes: float and int [matrices, choices]; of choices that a matrix cannot take, NaN losses.
    energies, weights: Σw² and parameters [matrices]. columns: each matrix' choice [matrices].
    """
    relative = errors / np.where(energies > 0, energies, 1.0)[:, None]
    whole = _whole_losses(losses, relative)
    picked = np.arange(len(columns)), columns
    lost = float(losses[picked].sum())
    bits = float(8 * nbytes[picked].sum())
    if whole is None or not lost > 0:
        return None
    bound = water_filling(whole, weights, bits)
    continuous = _continuous(losses, 8 * nbytes / weights[:, None], weights, bits)
    points = {}
    for column, choice in enumerate(choices):
        able = np.isfinite(losses[:, column])
        if able.any() and not choice.kept:
            rate = float(8 * nbytes[able, column].sum() / weights[able].sum())
            error = float(errors[able, column].sum() / max(energies[able].sum(), 1e-300))
            points[str(choice)] = _short(rate), _short(error), _short(error * 4.0**rate)
    return RateDistortion(
        bound=bound,
        times_bound=lost / bound if bound > 0 else None,
        whole_widths=max(1.0, lost / continuous) if continuous > 0 else 1.0,
        points=points,
    )


def _short(number: float) -> float:
    return float(f"{number:.4g}")


def _whole_losses(losses: np.ndarray, relative: np.ndarray) -> np.ndarray | None:
    """Loss of each matrix at a relative error of 1; None if a matrix' losses are not proportional to its errors."""
    known = np.isfinite(losses) & (relative > 1e-12)
    ratio = np.where(known, losses / np.where(known, relative, 1.0), np.nan)
    with np.errstate(invalid="ignore"):
        low, high = np.nanmin(ratio, axis=1, initial=np.inf), np.nanmax(ratio, axis=1, initial=-np.inf)
    known_rows = known.any(axis=1)
    if not (high[known_rows] - low[known_rows] <= 1e-4 * np.abs(high[known_rows])).all():
        return None
    return np.where(known_rows, high, 0.0)


def water_filling(whole: np.ndarray, weights: np.ndarray, bits: float) -> float:
    """The least Σ aₘ·Dₘ that so many bits allow. whole: aₘ, losses [matrices]; weights: nₘ [matrices]."""
    used = whole > 0
    if not used.any():
        return 0.0
    height = np.log2(whole[used] / weights[used])  # of −log₂ μ, at which a matrix begins to get bits
    low, high = float(height.min()) - 2 * bits / weights[used].min() - 1, float(height.max())
    for _ in range(BISECTIONS):
        level = (low + high) / 2
        spent = float(weights[used] @ np.maximum(0.0, height - level)) / 2
        low, high = (level, high) if spent > bits else (low, level)
    return float(whole[used] @ np.exp2(-np.maximum(0.0, height - high)))


def _continuous(losses: np.ndarray, rates: np.ndarray, weights: np.ndarray, bits: float) -> float:
    """The least loss on curves through the points of each matrix, log-linear between neighbours on their hull."""
    fine_rates, fine_losses = zip(*map(_curve, losses, rates), strict=True)
    longest = max(map(len, fine_rates))
    spent = np.stack([np.pad(one, (0, longest - len(one)), mode="edge") for one in fine_rates]) * weights[:, None]
    lost = np.stack([np.pad(one, (0, longest - len(one)), mode="edge") for one in fine_losses])
    rows = np.arange(len(lost))

    def at(log_price: float) -> tuple[float, float]:
        best = (lost + 2.0**log_price * spent).argmin(axis=1)
        return float(spent[rows, best].sum()), float(lost[rows, best].sum())

    scale = float(np.log2(max(lost.max() / max(spent.max(), 1.0), 1e-300)))
    low, high = scale - 100, scale + 100
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[0] > bits else (low, middle)
    return at(high)[1]


def _curve(losses: np.ndarray, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rates and losses in steps of 1/FINE bit along the lower hull of (rate, log loss)."""
    able = np.flatnonzero(np.isfinite(losses) & (losses > 0))
    if not len(able):
        return np.zeros(1), np.zeros(1)
    order = able[np.argsort(rates[able], kind="stable")]
    points = [(float(rates[n]), float(np.log(losses[n]))) for n in order]
    hull: list[tuple[float, float]] = []
    for x, y in points:
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        if hull and x == hull[-1][0]:
            hull.pop()
        hull.append((x, y))
    xs, ys = zip(*hull, strict=True)
    fine = np.unique(np.concatenate([np.arange(xs[0], xs[-1], 1 / FINE), xs]))
    return fine, np.exp(np.interp(fine, xs, ys))
