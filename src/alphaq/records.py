"""The nouns: frozen records that the stages hand to one another, and nothing else.

A shape is always `(rows, columns)` = `(out_features, in_features)`, whatever the layout on disk.
"""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from alphaq.errors import CheckpointError, ChoiceError, PlanError
from alphaq.ggml import GGML_BLOCKS
from alphaq.untrusted import SHOWN_CHARACTERS, parse_json, read_bounded, shown

if TYPE_CHECKING:
    import numpy as np

Shape = tuple[int, int]

BLOCK_HEADER_BYTES = 16
BLOCK_ALIGNMENT = 16
CHOICE_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
GROUP_SIZES = (32, 64, 128)
MIXES = ("", "slim", "pb2", "pb4", "pb8", "nest")  # a block's flags hold the place in this list
SLIM_BITS = (2, 3, 4, 5, 6, 7)
CODECS = ("none", "zstd")  # a coded tensor's header holds the place in this list
PLAN_FORMAT_VERSION = 1
CERTIFICATE_NAME = "certificate.json"  # what a model's fidelity was, which says nothing of another's
NATIVE_FORMAT_VERSION = 1  # of native checkpoints
CODED_FORMAT_VERSION = 2  # of those with coded tensors

Count = Annotated[int, Field(ge=0, lt=2**63)]


def check_native_format(version: int) -> None:
    """CheckpointError if a native checkpoint has another format than those that are run here."""
    if version not in (NATIVE_FORMAT_VERSION, CODED_FORMAT_VERSION):
        raise CheckpointError(
            f"The checkpoint has native format {version}; this alphaq reads {NATIVE_FORMAT_VERSION} and "
            f"{CODED_FORMAT_VERSION}. Update alphaq."
        )


class Role(str, enum.Enum):
    """What a tensor does in the model; decides whether and how it may be quantized."""

    EXPERT = "expert"
    SHARED_EXPERT = "shared_expert"
    ATTENTION = "attention"
    MIXER = "mixer"
    DENSE_MLP = "dense_mlp"
    ROUTER = "router"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class MatrixRef:
    """One 2-D weight, wherever it lies on disk: alone, or as a slice of a fused tensor."""

    name: str
    shape: Shape
    dtype: str
    layer: int | None
    expert: int | None
    projection: str | None
    role: Role
    tensor: str
    """Name of the stored tensor that holds the matrix (equal to `name` unless fused)."""
    index: int | None = None
    """Position along the first axis of a fused `[experts, …]` tensor."""
    row_start: int = 0
    """First row of this matrix inside its (oriented) slice, e.g. `up` after `gate`."""
    transposed: bool = False
    """True if disk holds `[in, out]`."""
    row_step: int = 1
    """From one row of this matrix to the next, 2 where those of `gate` and `up` alternate."""

    @property
    def place(self) -> tuple[float, float, str, str]:
        """Sorts matrices as the model runs them: by layer, expert, projection."""
        layer, expert = (math.inf if value is None else value for value in (self.layer, self.expert))
        return layer, expert, self.projection or "", self.name

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What was measured of a matrix. `alpha` is None if it is undefined, `reason` then says why."""

    alpha: float | None
    tail_count: int
    eigenvalue_count: int
    variance: float
    mean_square: float
    largest_eigenvalue: float
    reason: str = ""


@dataclass(frozen=True)
class WeightStatistics:
    """Moments of one matrix W, all dimensionless except mean_absolute and root_mean_square (units of W)."""

    mean_absolute: float
    root_mean_square: float
    kurtosis: float
    """E[(w − μ)⁴] / Var²; 3 for a Gaussian."""
    outlier: float
    """max over input columns j of max|W₍:,ⱼ₎| / mean|W₍:,ⱼ₎|; at least 1."""
    stable_rank: float
    """‖W‖²_F / σ₁²; from 1 to the smaller side."""


@dataclass(frozen=True, order=True)
class Choice:
    """One way to store a matrix: `bits` per code, one scale (and offset) per `group_size` columns.

    bits 16 means "kept": two bytes per weight, no group. A symmetric choice stores no offsets; an
    asymmetric one stores a `bits`-wide zero point per group, or a 16-bit mean if bits is 1. A `scheme`
    names a storage type that is not plain integers (llama.cpp's Q4_K, IQ2_S, …); bits are then nominal
    and the group is its block. How many bytes a choice takes is the engine profile's to say.

    A `mix` varies widths within the matrix. "slim": a group has bits − 1, bits or bits + 1, as many groups the one as
    the other. "pb2", "pb4", "pb8": up to so many weights of each group have 8 bits, the others the one of `bits`.

    "nest" varies nothing: levels lie at odd halves of a step, so that the top bits of a code are codes too.

    A `rate` is of codes that will be entropy-coded: bits per weight, less than `bits`, that Gaussian weights will take.
    It decides the step; what is stored is the symmetric choice without it.
    """

    bits: int
    group_size: int = 0
    symmetric: bool = False
    scheme: str = ""
    mix: str = ""
    rate: float = 0.0

    def __post_init__(self) -> None:
        if self.mix:
            self._check_mix()
        if self.rate and (self.mix or self.scheme or not self.symmetric or not 0 < self.rate < self.bits <= 8):
            raise ChoiceError(
                f"A rate of {self.rate:g} bits needs plain symmetric codes that are wider. Write for example @2.75, or "
                "4g128s@2.75 with the bits that it takes in memory."
            )
        if self.scheme:
            if GGML_BLOCKS.get(self.scheme, ())[:2] != (self.bits, self.group_size) or self.symmetric:
                raise ChoiceError(f"{self.scheme!r} is no storage type with {self.bits} bits. Write only its name.")
        elif self.bits == 16:
            if self.group_size or self.symmetric:
                raise ChoiceError("A 16-bit choice has no group size and no symmetry: write it as '16'.")
        elif self.bits not in CHOICE_BITS:
            raise ChoiceError(f"{self.bits} bits cannot be stored. Available: 1 to 8, and 16 (kept).")
        elif self.group_size not in GROUP_SIZES:
            raise ChoiceError(f"Group size {self.group_size} cannot be stored. Available: 32, 64, 128.")

    def _check_mix(self) -> None:
        if self.mix not in MIXES:
            raise ChoiceError(f"{shown(self.mix)} is no mix of widths. Available: {', '.join(MIXES[1:])}.")
        if self.scheme or self.bits == 16:
            raise ChoiceError(f"{self.scheme or 16} has no widths to mix. Write for example 2g128-slim.")
        if self.nested:
            if self.bits == 1 or not self.symmetric:
                raise ChoiceError("Nested codes have 2 to 8 bits and no zero points. Write for example 4g128-nest.")
            return
        if self.salient and self.bits != 1:
            raise ChoiceError(f"-{self.mix} is 8-bit weights over a rest of 1 bit. Write 1-{self.mix}, not {self}.")
        if not self.salient and self.bits not in SLIM_BITS:
            raise ChoiceError(f"{self} needs groups of a bit less and more. Available: 2-slim to 7-slim.")

    @classmethod
    def parse(cls, text: str, default_group_size: int = 128, symmetric: bool = False) -> Choice:
        """Read '3', '3g64', '4g128s', '2g128-slim', '16' or 'Q4_K'. Raises ChoiceError for anything else."""
        name = text.strip().upper()
        if name in GGML_BLOCKS:
            return cls(*GGML_BLOCKS[name][:2], scheme=name)
        if match := re.fullmatch(r"@(\d(?:\.\d{1,3})?)", text.strip()):
            rate = float(match[1])
            if not rate:
                raise ChoiceError("A rate of 0 bits stores nothing. Write for example @1.")
            return cls(min(8, math.ceil(rate) + 1), default_group_size, True, rate=rate)
        match = re.fullmatch(r"(\d{1,2})(?:g(\d{1,4}))?(s)?(?:-([a-z]{1,8}\d?))?(?:@(\d(?:\.\d{1,3})?))?", text.strip())
        if match is None:
            raise ChoiceError(
                f"{shown(text)} is not a storage choice. Write bits, bits and a group size, or a ggml type: "
                "3, 3g64, 4g128s, 2g128-slim, 1g128-pb8, @2.75, 16, Q4_K."
            )
        bits, mix, rate = int(match[1]), match[4] or "", float(match[5] or 0)
        symmetric = symmetric or mix == "nest"
        if bits == 16:
            return cls(16, int(match[2] or 0), match[3] is not None, mix=mix, rate=rate)
        return cls(bits, int(match[2] or default_group_size), match[3] is not None or symmetric, mix=mix, rate=rate)

    def __str__(self) -> str:
        if self.scheme:
            return self.scheme
        mix = f"-{self.mix}" if self.mix else f"@{self.rate:g}" if self.rate else ""
        return (
            "16"
            if self.bits == 16
            else f"{self.bits}g{self.group_size}{'s' * (self.symmetric and not self.nested)}{mix}"
        )

    @property
    def nested(self) -> bool:
        """Whether the top bits of codes are codes."""
        return self.mix == "nest"

    @property
    def slim(self) -> bool:
        """Whether groups differ in their bits."""
        return self.mix == "slim"

    @property
    def stored(self) -> Choice:
        """The choice as a block names it."""
        return replace(self, rate=0.0) if self.rate else self

    @property
    def salient(self) -> int:
        """Weights of a group that may have 8 bits."""
        return int(self.mix[2:]) if self.mix.startswith("pb") else 0

    def groups(self, columns: int) -> int:
        """Groups per row; the last may be ragged."""
        return -(-columns // self.group_size)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row's packed codes: whole 32-bit words."""
        return 4 * -(-columns * self.bits // 32)

    def parts(self, shape: Shape) -> tuple[int, int, int]:
        """Bytes of codes, offsets and scales of a packed matrix (see docs/formats.md)."""
        rows, columns = shape
        groups = self.groups(columns)
        codes = rows * self.row_bytes(columns)
        if self.symmetric:
            offsets = 0
        elif self.bits == 1:
            offsets = 2 * rows * groups
        elif self.slim:
            offsets = 4 * groups * self.bits * -(-rows // 32)  # whole words at every width
        else:
            offsets = 4 * groups * -(-rows * self.bits // 32)
        return codes, offsets, 2 * rows * groups

    def mix_bytes(self, shape: Shape) -> int:
        """Bytes after the scales: the width of each group, or the salient weights. 0 without a mix."""
        groups = self.groups(shape[1])
        if self.salient:
            return shape[0] * groups * (2 + 2 * self.salient)
        return groups if self.slim else 0

    def storage_bytes(self, shape: Shape) -> int:
        """Exact bytes of the stored tensor: header, codes, zero points, scales and padding included."""
        if self.bits == 16:
            return 2 * shape[0] * shape[1]
        size = BLOCK_HEADER_BYTES + sum(self.parts(shape)) + self.mix_bytes(shape)
        return -(-size // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT


@dataclass(frozen=True)
class Solution:
    """What a solver returns: one column per unit, and a certificate.

    objective - lower_bound is the proven optimality gap, in units of loss. price: Lagrange multiplier, the loss per
    unit of cost at which the plan's last upgrades were bought; 0 if the budget does not bind.
    """

    columns: np.ndarray
    objective: float
    lower_bound: float
    cost: int
    price: float = 0.0


@dataclass(frozen=True)
class SalientWeights:
    """Weights of 8 bits in a binary matrix, k to a group: ŵ = scale·(value − 128) at a position within the group.

    scales: float16 [rows, groups]. positions: uint8 [rows, groups, k], ascending, 255 where there is none. values:
    uint8 [rows, groups, k].
    """

    scales: Any
    positions: Any
    values: Any


@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes, offsets and scales of one matrix.

    codes: packed uint8 [rows, choice.row_bytes(columns)]. scales: float16 [rows, groups]. offsets: uint8
    zero points [rows, groups]; float16 means if bits is 1; None if symmetric. Engines that store scales and biases in
    the model's own type have bfloat16 there; of a ggml type there are only codes, whole blocks. squared_error:
    Σ(w − ŵ)² against the weights it was made of; None if it comes from a file. widths: uint8 [groups], bits of each
    group, whose codes follow one another, if they differ; groups of 1 bit have no mean then, and 0 for a zero point.
    salient: what stands in the place of some codes.
    """

    choice: Choice
    shape: Shape
    codes: Any
    scales: Any
    offsets: Any | None
    squared_error: float | None = None
    widths: Any | None = None
    salient: SalientWeights | None = None


class SourceIdentity(BaseModel):
    """Which checkpoint a plan was made for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    fingerprint: str
    """SHA-256 over shard names, sizes and headers."""


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


class Plan(BaseModel):
    """The decision: which choice each matrix gets, for which budget and engine, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: int = PLAN_FORMAT_VERSION
    alphaq_version: str = ""
    engine: str = "native"
    source: SourceIdentity | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    average_bits: float | None = None
    bits_per_weight: float | None = None
    size_bytes: int | None = None
    budget_unit: str | None = None
    budget_slack: float | None = None
    objective: float | None = None
    lower_bound: float | None = None
    """Proven: no plan under these constraints has less loss. None for methods that follow an order."""
    price: float | None = None
    """Loss that one more unit of the budget's cost would save (the Lagrange multiplier). None where an order
    decides, or limits beside the budget do."""
    histogram: dict[int, int] = Field(default_factory=dict)
    assignment: dict[str, int] = Field(default_factory=dict)
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
    rate_distortion: RateDistortion | None = None
    """Against what any quantizer could do; None where losses are not proportional to squared errors."""
    check: PlanCheck | None = None
    """What the default method's plan was held against; None of other methods, and without a check."""
    unchecked: str | None = None
    """Why the default method's plan was not held against uniform bits, though it should have been."""
    table: PlanTable | None = None

    @model_validator(mode="after")
    def _agree(self) -> Plan:
        if self.format_version != PLAN_FORMAT_VERSION:
            raise ValueError(f"format_version {self.format_version} is not {PLAN_FORMAT_VERSION}")
        if not isinstance(self.config.get("imatrix"), (str, type(None))):
            raise ValueError("config: imatrix is not text")
        for name, bits in self.assignment.items():
            if name not in self.choices or self.choice(name).bits != bits:
                raise ValueError(f"assignment and choices disagree on {shown(name)}: edit both, or drop assignment")
        for name in self.choices:
            self.choice(name)
        return self

    @property
    def gap(self) -> float:
        """Proven distance from the best plan, relative to its loss; 0 if it is the best. NaN without a bound."""
        if self.objective is None or self.lower_bound is None:
            return math.nan
        return (self.objective - self.lower_bound) / abs(self.objective) if self.objective else 0.0

    @property
    def cost_unit(self) -> str:
        """What costs and slack are counted in."""
        return "code bits" if self.budget_unit == "bits" and self.counts_codes else "bytes"

    @property
    def counts_codes(self) -> bool:
        """Whether bits were counted without scales: stats alone, or every matrix once."""
        return self.source is None or bool(self.config.get("unweighted"))

    def choice(self, name: str) -> Choice:
        """The choice of one quantized matrix."""
        try:
            return Choice.parse(self.choices[name])
        except ChoiceError as error:
            raise ValueError(f"{shown(name)}: {error}") from error

    def every_choice(self) -> dict[str, Choice]:
        """The choices of all quantized matrices."""
        return {name: self.choice(name) for name in self.choices}

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Plan:
        """Parse and check a plan file. Raises PlanError naming the file and the first fault."""
        try:
            given = text if isinstance(text, str) else text.decode("utf-8-sig")  # some editors mark the byte order
            return cls.model_validate(parse_json(given, strict=True))
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


@dataclass(frozen=True)
class TextFidelity:
    """How a model does on one text. KL, top-1 and EAR are against a reference model, else None.

    kl in nats per token; ear = mean over tokens of Σᵥ min(p, q); interval is 95 % for perplexity.
    """

    perplexity: float
    perplexity_interval: tuple[float, float]
    tokens: int
    kl: float | None = None
    top1: float | None = None
    ear: float | None = None


@dataclass(frozen=True)
class Fidelity:
    """Fidelity over several texts. begins_with: special tokens put before each window, in words."""

    texts: dict[str, TextFidelity] = field(default_factory=dict)
    begins_with: str = ""

    @property
    def geomean_perplexity(self) -> float:
        """Geometric mean of the texts' perplexities."""
        return math.exp(sum(math.log(text.perplexity) for text in self.texts.values()) / len(self.texts))

    @property
    def mean_kl(self) -> float | None:
        """Mean of the texts' KL divergences, None without a reference."""
        values = [text.kl for text in self.texts.values() if text.kl is not None]
        return sum(values) / len(values) if values else None
