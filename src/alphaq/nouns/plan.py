"""The decision: which matrix is stored how, and why."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_validator,
)

from alphaq.errors import ChoiceError, PlanError
from alphaq.formats.table import code_bits, parse_choice
from alphaq.formats.versions import CODECS
from alphaq.nouns.choice import (
    Choice,
)
from alphaq.nouns.serving import Memory
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.work.untrusted import SHOWN_CHARACTERS, parse_json, read_bounded, shown

PLAN_FORMAT_VERSION = 1
MOST_PREDICTABLE = 0.5
"""Nats per token up to which losses are quadratic and add up (docs/research/log.md)."""
Count = Annotated[int, Field(ge=0, lt=2**63)]


class SourceIdentity(BaseModel):
    """Which checkpoint a plan was made for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    fingerprint: str
    """SHA-256 over shard names, sizes and headers."""


class Reads(BaseModel):
    """What a token reads of the weight files: bytes by the choice that they are stored at, in so many layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by_choice: dict[str, Count]
    layers: Count

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.by_choice.values())


class PlanTable(BaseModel):
    """What the decision was made of: the loss and the cost of each unit at each choice.

    losses: unit → loss per choice, None where a pin, a bound or the engine forbids it. costs: the distinct rows of
    costs in the budget's unit; cost_of: which row is each unit's. members: matrices of units that hold several.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    choices: tuple[str, ...]
    losses: dict[str, tuple[float | None, ...]]
    costs: tuple[tuple[Count, ...], ...]
    cost_of: tuple[Count, ...]
    members: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agree(self) -> PlanTable:
        width = len(self.choices)
        if any(len(row) != width for row in (*self.losses.values(), *self.costs)):
            raise ValueError(f"table: a row of losses or costs has not {width} entries, one per choice")
        if len(self.cost_of) != len(self.losses) or not all(0 <= row < len(self.costs) for row in self.cost_of):
            raise ValueError("table: cost_of does not name a row of costs for every unit")
        return self


class RateDistortion(BaseModel):
    """A plan's loss against the Gaussian bound at its bytes (allocation/bound.py).

    bound: in units of the loss. times_bound: the plan's loss over it. whole_widths: the part of this factor that widths
    in steps make; the rest is the quantizers'. points: of each choice, stored bits per weight R, relative squared error
    D of all planned weights together, and D over 2^(−2R).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bound: float
    times_bound: float | None
    whole_widths: float
    points: dict[str, tuple[float, float, float]] = Field(default_factory=dict)


class Prediction(BaseModel):
    """KL divergence of the quantized model to the original, in nats per token, as its losses foretell it.

    low, high: of 95 %, by how much the windows of the pass differ, and by what predictions missed by on the models that
    they were held against. entropy: of the model's own words, in nats per token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kl: float
    low: float
    high: float
    entropy: float

    @property
    def beyond(self) -> bool:
        """Whether so much is lost that the quadratic estimate no longer holds."""
        return self.kl > MOST_PREDICTABLE


class PlanCheck(BaseModel):
    """How a plan and uniform bits of the same bytes were compared before the better was taken.

    by: "kl", KL in nats per token of the planned model to the original, on tokens of the model's own writing; or
    "moves", Σ of the squared relative moves of the stream by each matrix. taken: "plan" or "uniform".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: Literal["kl", "moves"]
    tokens: int | None
    plan: float
    uniform: float
    taken: Literal["plan", "uniform"]


class Refinement(BaseModel):
    """What `alphaq refine` did to a plan.

    before, after: KL in nats per token of the given plan and of this one, on `tokens` of the model's own writing that
    no gradient was taken on. rounds: that gained something. moved: units that have another choice than in the given
    plan. hidden: units that could not be exchanged, nor measured. seed, gradients, gradient_tokens, by: as asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    before: float
    after: float
    tokens: Count
    rounds: Count
    moved: Count
    hidden: Count
    seed: Count
    gradients: Count
    gradient_tokens: Count | None
    by: str

    @property
    def changed(self) -> bool:
        """Whether choices are no longer those that the predicted losses led to."""
        return self.moved > 0


class Dropping(BaseModel):
    """Experts that a plan does without, by the numbers that its source has for them; those that stay are numbered anew.

    experts: by layer; none where none paid. loss, bound: nats per token that they cost by measurement on the model's
    own writing, and what that is below with 95 %. total: what the plan is expected to lose in all, `bound` included;
    None in plans that do not say.
    totals: the same of plans with so many fewer experts in every layer, by their number; without an entry where the
    budget is too small for it. refused: numbers at which `bound` is above the limit. lower_bound: where layers have
    counts of their own, proven: no plan without any of these experts, in each layer's order, has a smaller total; None
    where equal counts were taken.
    source: fingerprint of the checkpoint with all its experts; the plan's own source is what is left of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    experts: dict[int, tuple[Count, ...]] = Field(default_factory=dict)
    loss: float = 0.0
    bound: float = 0.0
    total: float | None = None
    totals: dict[int, float] = Field(default_factory=dict)
    lower_bound: float | None = None
    refused: tuple[Count, ...] = ()
    source: str = ""

    @property
    def count(self) -> int:
        """How many are gone in all."""
        return sum(map(len, self.experts.values()))

    @property
    def gap(self) -> float:
        """Proven distance of the total from the least, relative; 0 where every number was tried."""
        return 0.0 if self.lower_bound is None or not self.total else (self.total - self.lower_bound) / self.total


class Plan(BaseModel):
    """The decision: which choice each matrix gets, for which budget and engine, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: int = PLAN_FORMAT_VERSION
    alphaq_version: str = ""
    engine: str = "native"
    source: SourceIdentity | None = None
    config: PlanConfig | None = None
    """What was asked for; None in a plan made by hand or by another tool."""
    average_bits: float | None = None
    bits_per_weight: float | None = None
    size_bytes: int | None = None
    budget_unit: str | None = None
    budget_slack: float | None = None
    objective: float | None = None
    lower_bound: float | None = None
    """Proven: no plan under these constraints has less loss. None for methods that follow an order, and of a
    refined plan."""
    price: float | None = None
    """Loss that one more unit of the budget's cost would save (the Lagrange multiplier). None where an order
    decides, limits beside the budget do, or measured KL."""
    histogram: dict[int | float, int] = Field(default_factory=dict)
    assignment: dict[str, int | float] = Field(default_factory=dict)
    """Bits of each matrix that the budget decided on."""
    choices: dict[str, str] = Field(min_length=1)
    """Choice of every matrix that is quantized, fixed roles (attention, shared experts) included."""
    alpha: dict[str, float] = Field(default_factory=dict)
    unplanned: dict[str, str] = Field(default_factory=dict)
    """Matrices in the stats that were not planned, and why."""
    neutral: dict[str, str] = Field(default_factory=dict)
    """Planned matrices whose α is undefined, and why; they get the importance of a median matrix."""
    kept: dict[str, float] = Field(default_factory=dict)
    """Share of the model's parameters that stays in 16 bits, by the tensors' names without their numbers; what is not
    named is less than 0.5 % together."""
    expected_error: dict[str, float] = Field(default_factory=dict)
    """Σ(w − ŵ)²/Σw² of each planned matrix, as measured for the plan."""
    sampling_error: float | None = None
    """Standard error of the expected errors, relative, of the unit where it is largest; 0 if none was sampled."""
    prediction: Prediction | None = None
    """KL in nats per token that the plan is expected to have; None where losses are in another unit."""
    unpredicted: str | None = None
    """Why the default method's losses are in no nats, and come from the signal instead."""
    rate_distortion: RateDistortion | None = None
    """Against what any quantizer could do; None where losses are not proportional to squared errors."""
    check: PlanCheck | None = None
    """How the default method's plan was compared with uniform bits; None of other methods, and without a check."""
    unchecked: str | None = None
    """Why the default method's plan was not compared with uniform bits, though it should have been."""
    read_bytes: Count | None = None
    """Bytes of weights that a token reads: all but the experts that its router leaves out, and the embedding."""
    reads: Reads | None = None
    """The same by choice; None of coded files."""
    memory: Memory | None = None
    """What the budget was made of, where the memory to run in was stated."""
    dropped: Dropping | None = None
    """Experts that it does without; None where none were to be dropped."""
    refined: Refinement | None = None
    """How the plan was improved by measured KL; None of a plan as it was made."""
    table: PlanTable | None = None

    @field_validator("config", mode="before")
    @classmethod
    def _of_any_version(cls, config: object) -> object:
        """Settings of other versions and tools are left out; a plan made by hand may state no budget."""
        if not isinstance(config, dict):
            return config
        known = {name: value for name, value in config.items() if name in PlanConfig.model_fields}
        if isinstance(budget := known.get("budget"), dict):
            known["budget"] = {name: value for name, value in budget.items() if name in Budget.model_fields}
        return {"budget": {}, **known} if known else None

    @field_serializer("config", mode="wrap")
    def _none_is_empty(self, config: PlanConfig | None, write: SerializerFunctionWrapHandler) -> object:
        return {} if config is None else write(config)

    @model_validator(mode="after")
    def _agree(self) -> Plan:
        if self.format_version != PLAN_FORMAT_VERSION:
            raise ValueError(f"format_version {self.format_version} is not {PLAN_FORMAT_VERSION}")
        for name, bits in self.assignment.items():
            # A rate with a fraction may be stated in whole bits, as choices are.
            if name not in self.choices or bits not in (code_bits(self.choice(name)), self.choice(name).bits):
                raise ValueError(f"assignment and choices disagree on {shown(name)}: edit both, or drop assignment")
        for name in self.choices:
            self.choice(name)
        return self

    @property
    def original(self) -> str | None:
        """Fingerprint of the checkpoint that it was made for, with all its experts."""
        whole = None if self.dropped is None else self.dropped.source
        return whole or (None if self.source is None else self.source.fingerprint)

    @property
    def settings(self) -> PlanConfig | None:
        """What it was made with; None where that is not known, though a codec or an importance matrix may be."""
        return self.config if self.config is not None and self.config.budget.stated else None

    @property
    def codec(self) -> str | None:
        """What codes the tensors of its files; None if they are not coded."""
        return None if self.config is None else self.config.codec

    @property
    def split_bytes(self) -> int | None:
        """The most that each of its files may take; None if they are not split."""
        return None if self.config is None else self.config.split_bytes

    @property
    def imatrix(self) -> str | None:
        """Name and digest of the importance matrix that it was made with."""
        return None if self.config is None else self.config.imatrix

    @property
    def method(self) -> str | None:
        """How it was made, where that is known."""
        return None if self.settings is None else self.settings.method

    @property
    def gap(self) -> float:
        """Proven distance from the best plan, relative to its loss; 0 if it is the best. NaN without a bound."""
        if self.objective is None or self.lower_bound is None:
            return math.nan
        return (self.objective - self.lower_bound) / abs(self.objective) if self.objective else 0.0

    @property
    def equal_instead(self) -> bool:
        """Whether layers lose as many experts each though they might differ: no other plan was found to fit."""
        dropped, config = self.dropped, self.config
        own = config is not None and config.drop_counts == "own"
        return own and dropped is not None and bool(dropped.experts) and dropped.lower_bound is None

    @property
    def cost_unit(self) -> str:
        """What costs and slack are counted in."""
        return "code bits" if self.budget_unit == "bits" and self.counts_codes else "bytes"

    @property
    def counts_codes(self) -> bool:
        """Whether bits were counted without scales: stats alone, or every matrix once."""
        return self.source is None or (self.config is not None and self.config.unweighted)

    def coded_by(self, codec: str | None) -> Plan:
        """The same plan for files that are coded otherwise; None or `none` for files that are not."""
        codec = None if codec == CODECS[0] else codec
        if codec == self.codec:
            return self
        config = self.config or PlanConfig(budget=Budget())
        reads = {} if codec is None else {"read_bytes": None, "reads": None}
        return self.model_copy(update={"config": config.model_copy(update={"codec": codec}), **reads})

    def choice(self, name: str) -> Choice:
        """The choice of one quantized matrix."""
        try:
            return parse_choice(self.choices[name])
        except ChoiceError as error:
            raise ValueError(f"{shown(name)}: {error}") from error

    def every_choice(self) -> dict[str, Choice]:
        """The choices of all quantized matrices."""
        return {name: self.choice(name) for name in self.choices}

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Plan:
        """Parse and check a plan file. Raises PlanError naming the file and the first fault."""
        try:
            content = text if isinstance(text, str) else text.decode("utf-8-sig")  # some editors mark the byte order
            return cls.model_validate(parse_json(content, strict=True))
        except ValueError as error:
            raise PlanError(f"{where} is not a valid plan: {first_fault(error)}.") from error

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read and check a plan file. Raises PlanError."""
        try:
            return cls.from_json(read_bounded(path), str(path))
        except OSError as error:
            raise PlanError(f"{path} cannot be read: {error.strerror}. Check the path of the plan.") from None

    def to_json(self) -> str:
        """Indented JSON with a final newline; equal plans give equal bytes."""
        return self.model_dump_json(indent=1) + "\n"


def first_fault(error: ValueError) -> str:
    """The first complaint of a pydantic error, as one line: `field: what is wrong`."""
    details = getattr(error, "errors", None)
    if details is None:
        return str(error).splitlines()[0].rstrip(".")
    first = details()[0]
    where = ".".join(str(part)[:SHOWN_CHARACTERS] for part in first["loc"])
    message = re.sub(r"^Value error, ", "", first["msg"]).splitlines()[0].rstrip(".")
    return f"{where}: {message}" if where else message
