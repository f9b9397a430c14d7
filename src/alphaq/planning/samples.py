"""Which errors are measured on how many weights: few at first, more where they could change the plan.

Where matrices share a choice, their errors are only needed in sum: some matrices of a unit are measured, of each some
rows, and they stand for the rest. That is done in stages:

0. nothing is measured, and errors follow from those of other choices (`estimates`): so begin choices that take long to
   find codes for (`Format.slow`), wherever others are measured
1. a first sample: few matrices of a unit at slow choices; of a matrix that shares its choice with none, if it is large,
   an eighth of the rows
2. the full sample: so begins everything else
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from alphaq.formats.table import format_of
from alphaq.measuring.measurement import Sampling
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.quantizers.rounded import SAMPLE_VALUES, SquaredErrors

SAMPLE_MEMBERS = 32  # matrices of a unit whose errors are measured at most
FIRST_MEMBERS = 8  # of these, how many belong to the first sample at slow choices
FIRST_SHARE = 8  # of a matrix of its own, one in so many of the rows that may be measured
NOTHING, FIRST, FULL = range(3)
Wanted = Mapping[str, Collection[Choice]]
"""Choices by unit."""


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are sampled alike.

    members: matrices by unit. measurable: choices at which each is measured, by name. sampling: all but the matrices
    and the number of weights. staged: whether few come first; else all is measured in full at once.
    """

    members: Mapping[str, Sequence[MatrixRef]]
    measurable: Mapping[str, frozenset[Choice]]
    sampling: Sampling
    staged: bool

    @cached_property
    def drawn(self) -> dict[str, list[MatrixRef]]:
        """Those of each unit that may be measured, in the order in which they are."""
        return {
            unit: random.Random(unit).sample(members, min(len(members), SAMPLE_MEMBERS))
            for unit, members in self.members.items()
        }

    @cached_property
    def values(self) -> int:
        """Weights of a matrix that the full sample has: fewer, the more matrices share a choice."""
        return SAMPLE_VALUES // min(max(map(len, self.members.values()), default=1), SAMPLE_MEMBERS)

    @cached_property
    def by_rows(self) -> bool:
        """Whether the first sample is one of fewer rows: where all are of their own, and none is measured whole."""
        sizes = [member.parameters for members in self.members.values() for member in members]
        return self.staged and len(sizes) == len(self.members) and min(sizes, default=0) > SAMPLE_VALUES

    def begin(self, unit: str) -> dict[Choice, int]:
        """The stage that each choice of a unit begins with."""
        choices = self.measurable[self.drawn[unit][0].name]
        if not self.staged:
            return dict.fromkeys(choices, FULL)
        slow = {choice for choice in choices if format_of(choice).slow(choice)}
        usual = FIRST if self.by_rows else FULL
        return {choice: usual if choice not in slow else NOTHING if slow < choices else FIRST for choice in choices}

    def sample(self, unit: str, stage: int) -> list[MatrixRef]:
        """The matrices of a unit that a stage measures beyond the stages before it."""
        if self.by_rows:
            return self.drawn[unit]
        return self.drawn[unit][FIRST_MEMBERS:] if stage == FULL else self.drawn[unit][:FIRST_MEMBERS]

    def sampling_of(self, wanted: Wanted, stage: int) -> Sampling:
        """How to measure some choices of some units at a stage."""
        choices = {
            matrix.name: self.measurable[matrix.name].intersection(of_unit)
            for unit, of_unit in wanted.items()
            for matrix in self.sample(unit, stage)
        }
        values = self.values // FIRST_SHARE if self.by_rows and stage == FIRST else self.values
        return replace(self.sampling, values=values, matrices=choices)


class Samples:
    """What was measured so far of a group's matrices: errors by name. Deeper samples take the place of earlier ones."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.errors: dict[str, SquaredErrors] = {}
        self._stages = {unit: group.begin(unit) for unit in group.members}

    def first(self) -> Sampling:
        """What to measure before anything is known."""
        group = self.group
        at = {
            stage: {
                unit: {choice for choice, own in stages.items() if own >= stage}
                for unit, stages in self._stages.items()
            }
            for stage in (FIRST, FULL)
        }
        if group.by_rows:
            return group.sampling_of(at[FIRST], FIRST)
        few, more = group.sampling_of(at[FIRST], FIRST), group.sampling_of(at[FULL], FULL)
        return replace(few, matrices={**(few.matrices or {}), **(more.matrices or {})})

    def learn(self, name: str, found: SquaredErrors) -> None:
        """Take in what was measured of a matrix."""
        known = self.errors.get(name)
        self.errors[name] = found if known is None else known.updated(found)

    def further(self, undecided: Wanted, chosen: Wanted) -> list[Sampling]:
        """What takes undecided choices of units a stage further, and chosen ones to the first; nothing if all are."""
        steps: dict[int, dict[str, set[Choice]]] = {FIRST: {}, FULL: {}}
        for unit, stages in self._stages.items():
            open_, taken = (_measured(wanted.get(unit, ())) for wanted in (undecided, chosen))
            for choice, stage in stages.items():
                due = stage < FULL and choice in open_
                if due or (stage == NOTHING and choice in taken):
                    steps[stage + 1].setdefault(unit, set()).add(choice)
        for stage, wanted in steps.items():
            for unit, choices in wanted.items():
                complete = stage == FIRST and not self.group.by_rows and not self.group.sample(unit, FULL)
                self._stages[unit] |= dict.fromkeys(choices, FULL if complete else stage)
        return [self.group.sampling_of(wanted, stage) for stage, wanted in steps.items() if wanted]


def _measured(choices: Collection[Choice]) -> set[Choice]:
    """Choices, and of those that lie between two others these, whose errors tell theirs."""
    return {*choices}.union(*(format_of(choice).between(choice) or () for choice in choices))
