"""A refined plan put into words: what of the given one still holds, and what its new choices make of the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.profiles import profile
from alphaq.formats.table import code_bits
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan, Prediction, Reads, Refinement
from alphaq.planning.kept import kept_shares
from alphaq.planning.reading import Reading
from alphaq.trials.bench import Bench


def size_of(checkpoint: Checkpoint, plan: Plan, choices: Mapping[str, Choice]) -> int:
    """Bytes of all weight files of a plan, headers included, at other choices."""
    return profile(plan.engine).writer.laid_out(checkpoint, choices, plan.split_bytes).size_bytes


def described(checkpoint: Checkpoint, plan: Plan, bench: Bench, columns: np.ndarray, refinement: Refinement) -> Plan:
    """The given plan with the choices of these columns [units], and what came of it.

    A bound, a price and a check beside uniform bits were of the given plan; losses and predicted KL go by its table.
    """
    if not refinement.moved:
        return plan.model_copy(update={"refined": refinement})
    units, rows = bench.units, np.arange(len(columns))
    first = np.array([units.choices.index(plan.choices[members[0]]) for members in units.members])
    added = float((units.losses[rows, columns] - units.losses[rows, first]).sum())
    choices = plan.every_choice() | bench.choices(columns)
    planned = {matrix.name: matrix for matrix in checkpoint.planned}
    sizes = {name: matrix.parameters for name, matrix in planned.items()}
    moved = {name for unit in np.flatnonzero(columns != first) for name in units.members[unit]}
    stored = {name: profile(plan.engine).storage_bytes(choices[name], planned[name].shape) for name in sizes}
    total = sum(sizes.values())
    bits = {name: code_bits(choice) for name, choice in choices.items()}
    reads = _reads(checkpoint, plan, choices)
    return plan.model_copy(
        update={
            "choices": {name: str(choice) for name, choice in choices.items()},
            "assignment": {name: bits[name] for name in plan.assignment},
            "histogram": dict(sorted(Counter(bits[name] for name in plan.assignment).items())),
            "average_bits": sum(bits[name] * count for name, count in sizes.items()) / total,
            "bits_per_weight": 8 * sum(stored.values()) / total,
            "size_bytes": size_of(checkpoint, plan, choices),
            "read_bytes": None if reads is None else reads.total,
            "reads": reads,
            "budget_slack": None
            if plan.budget_slack is None
            else plan.budget_slack + units.cost(first) - units.cost(columns),
            "objective": None if plan.objective is None else plan.objective + added,
            "lower_bound": None,
            "price": None,
            "kept": kept_shares(checkpoint, choices),
            "rate_distortion": None,
            "check": None,
            "prediction": _prediction(plan.prediction, added),
            "expected_error": plan.expected_error
            | {name: bench.relative_error(name, choices[name]) for name in sorted(moved & plan.expected_error.keys())},
            "refined": refinement,
        }
    )


def _reads(checkpoint: Checkpoint, plan: Plan, choices: Mapping[str, Choice]) -> Reads | None:
    """What a token reads at other choices: as the given plan says, and what the change comes to."""
    if plan.reads is None:
        return None
    writer, reading = profile(plan.engine).writer, Reading.of(checkpoint)
    before, after = (
        reading.reads(writer.laid_out(checkpoint, one, plan.split_bytes)).by_choice
        for one in (plan.every_choice(), choices)
    )
    given = plan.reads.by_choice
    changed = {one: given.get(one, 0) + after.get(one, 0) - before.get(one, 0) for one in sorted({*given, *after})}
    return Reads(by_choice={one: nbytes for one, nbytes in changed.items() if nbytes > 0}, layers=plan.reads.layers)


def _prediction(known: Prediction | None, added: float) -> Prediction | None:
    """What losses foretell of the new choices, as uncertain as before."""
    if known is None or not known.kl > 0:
        return known
    factor = (known.kl + added) / known.kl
    kl, low, high = (float(f"{factor * one:.4g}") for one in (known.kl, known.low, known.high))
    return known.model_copy(update={"kl": kl, "low": low, "high": high})
