"""How long quantizing by a plan will take on this machine, from how long a few rows of each type take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.profiles import profile
from alphaq.formats.table import format_of
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan
from alphaq.quantizers.base import Rounder, rounder_of
from alphaq.work.workers import Workers

TRIED_WEIGHTS = 1 << 14
TRIES = 3
WORTH_TELLING_S = 20
NAMED = 3  # of the types that take long


@dataclass(frozen=True)
class Pace:
    """seconds: by choice, of finding codes on all cores together. cores: how many these are. avoidable: choices that
    --fast would leave out."""

    seconds: Mapping[Choice, float]
    cores: int
    avoidable: frozenset[Choice]

    @property
    def note(self) -> str | None:
        """What to say before the work; nothing where it is done soon."""
        total = sum(self.seconds.values())
        if total < WORTH_TELLING_S:
            return None
        slow = {choice: taken for choice, taken in self.seconds.items() if choice in self.avoidable}
        told = f"quantizing takes about {in_words(total)} on {self.cores} core{'s' * (self.cores > 1)}"
        if not slow:
            return told
        named = ", ".join(map(str, sorted(slow, key=lambda choice: -slow[choice])[:NAMED]))
        named += f" and {len(slow) - NAMED} more" if len(slow) > NAMED else ""
        return f"{told}, {in_words(sum(slow.values()))} of it for {named}; --fast leaves them out"


def in_words(seconds: float) -> str:
    """A length of time with no more digits than an estimate deserves."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def pace_of(checkpoint: Checkpoint, plan: Plan, workers: Workers) -> Pace | None:
    """How long the plan's types take; None where none takes long: nothing is searched on plain grids."""
    engine, chosen = profile(plan.engine), plan.every_choice()
    if all(choice.kept or format_of(choice).one_grid for choice in chosen.values()):
        return None
    weights: Counter[Choice] = Counter()
    for matrix in checkpoint.matrices:
        choice = chosen.get(matrix.name)
        if choice is not None and not choice.kept and not _copied(checkpoint, matrix.tensor, choice):
            weights[choice] += matrix.parameters
    cores = workers.count if workers.count > 1 else torch.get_num_threads()
    rounder = rounder_of(engine.quantizer)
    seconds = {one: count * seconds_per_weight(one, rounder) / cores for one, count in weights.items()}
    fixed = plan.config is not None and (plan.config.fast or plan.config.choices is not None)
    return Pace(seconds, cores, frozenset(() if fixed or not engine.fast else {*engine.defaults} - {*engine.fast}))


def _copied(checkpoint: Checkpoint, tensor: str, choice: Choice) -> bool:
    """Whether a GGUF file holds a tensor in that type already."""
    return checkpoint.gguf is not None and checkpoint.gguf_tensor(tensor).type == str(choice)


def seconds_per_weight(choice: Choice, rounder: Rounder) -> float:
    """Of finding the codes of Gaussian weights on one core, the least of several tries; some types build tables first,
    which does not count."""
    columns = min(8 * choice.group_size, TRIED_WEIGHTS)
    rows = max(1, TRIED_WEIGHTS // columns)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    rounder(weight[:1], choice)
    taken = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        rounder(weight, choice)
        taken.append(time.perf_counter() - begin)
    return min(taken) / weight.numel()
