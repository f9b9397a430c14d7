"""What a user asks for, checked once and passed explicitly. Nothing here reads the environment."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from alphaq.errors import BudgetError
from alphaq.records import Choice, Role

Noise = Literal["analytic", "measured"]

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024), ("", 1024))
}


def parse_size(text: str) -> int:
    """Bytes in '9.5MiB', '12GiB', '800MB', '123456'. KiB/MiB/GiB are 1024-based, KB/MB/GB 1000-based."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise BudgetError(f"{text!r} is not a size. Write a number and a unit: 9.5MiB, 12GiB, 800MB.")
    return int(float(match[1]) * units[match[2].lower()])


class Budget(BaseModel):
    """How much may be spent: exactly one of three units.

    bits: average code bits of the planned experts (the papers' number). bpw: stored bits per
    planned weight, scales and zero points included. size: bytes of all weight files together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: float | None = None
    bpw: float | None = None
    size_bytes: int | None = None

    @classmethod
    def of(cls, bits: float | None = None, bpw: float | None = None, size: str | None = None) -> Budget:
        """Build from what a user gave. Raises BudgetError unless exactly one is given and positive."""
        given = [name for name, value in (("--bits", bits), ("--bpw", bpw), ("--size", size)) if value is not None]
        if len(given) != 1:
            got = " and ".join(given) if given else "none"
            raise BudgetError(f"State the budget exactly once, as --bits, --bpw or --size; got {got}.")
        for name, value in (("--bits", bits), ("--bpw", bpw)):
            if value is not None and not 0 < value <= 32:
                raise BudgetError(f"{name} {value:g} is not between 0 and 32 bits. Try {name} 2.5.")
        return cls(bits=bits, bpw=bpw, size_bytes=None if size is None else parse_size(size))

    def __str__(self) -> str:
        if self.bits is not None:
            return f"{self.bits:g} bits"
        if self.bpw is not None:
            return f"{self.bpw:g} bits per weight"
        return f"{self.size_bytes} bytes"


class PlanConfig(BaseModel):
    """Everything that decides a plan, apart from the checkpoint itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: Budget
    method: str = "alphaq"
    noise: Noise | None = None
    """None: measured where the weights are at hand, analytic where only stats are."""
    gamma: float = Field(default=1.0, allow_inf_nan=False)
    choices: str = "1,2,3,4"
    group_size: int = 128
    symmetric: bool = False
    attention_bits: int = 4
    shared_bits: int = 4

    def candidates(self) -> tuple[Choice, ...]:
        """The parsed `choices`, narrowest first, duplicates removed. Raises ChoiceError."""
        parsed = {
            Choice.parse(text, self.group_size, self.symmetric) for text in self.choices.split(",") if text.strip()
        }
        if not parsed:
            raise BudgetError("--choices is empty. Give at least one, for example 1,2,3,4.")
        return tuple(sorted(parsed))

    def fixed_choices(self) -> dict[Role, Choice]:
        """Roles outside the budget that are quantized at a fixed width; every other role is kept."""
        widths = {
            Role.ATTENTION: self.attention_bits,
            Role.SHARED_EXPERT: self.shared_bits,
            Role.DENSE_MLP: self.shared_bits,
        }
        return {role: Choice.parse(str(bits), self.group_size, self.symmetric) for role, bits in widths.items()}
