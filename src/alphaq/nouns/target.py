"""What a search for the smallest plan is to reach."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict

from alphaq.errors import BudgetError
from alphaq.nouns.option import Option
from alphaq.nouns.settings import BUDGET

SEARCH = "Search (with --ear)"  # a heading of options
Reaches = Literal["within", "estimate", "above"]


def _share(ear: float) -> float:
    if not 0 < ear <= 1:
        raise BudgetError(f"--ear {ear:g} is not between 0 and 1. Try --ear 0.99.")
    return ear


def _bits(step: float) -> float:
    if not 1e-3 <= step <= 8:
        raise BudgetError(f"--ear-step {step:g} is not between 0.001 and 8 bits. Try --ear-step 0.0625.")
    return step


class Target(BaseModel):
    """An expected acceptance rate, and in which steps of the budget the smallest plan that keeps it is searched.

    reaches: when an EAR counts as reached: `within` the interval, or below it; by its `estimate`; or wholly `above`.
    step: in stored bits per planned weight.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    ear: Annotated[
        float,
        Option(
            "Instead of a budget: the smallest plan whose expected acceptance rate, measured on --text, reaches "
            "this (0.99: distribution-lossless). Engine native.",
            BUDGET,
            parse=_share,
        ),
    ]
    reaches: Annotated[
        Reaches,
        Option(
            "When it is reached: the 95 % interval holds or exceeds it (within), the estimate does (estimate), or "
            "the whole interval (above).",
            SEARCH,
        ),
    ] = "within"
    step: Annotated[
        float,
        Option("Budgets differ by this, in stored bits per expert weight.", SEARCH, name="ear_step", parse=_bits),
    ] = 1 / 16

    def budget(self, steps: int) -> float:
        """Stored bits per planned weight of so many steps."""
        return round(steps * self.step, 9)
