"""What a user asks for, checked once and passed explicitly. Nothing here reads the environment."""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from alphaq.errors import BudgetError
from alphaq.formats.versions import CODECS
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.option import Option
from alphaq.nouns.rates import Rates
from alphaq.nouns.sizes import parse_size
from alphaq.registry import unknown

Noise = Literal["analytic", "measured"]
Blocks = Literal["farms", "whole"]
Tail = Literal["hill", "median", "finger", "ks"]
BUDGET, CHOICES, SCORES, LIMITS = "Budget (one of)", "Choices", "Scores", "Limits"  # headings of options


class Budget(BaseModel):
    """How much may be spent: exactly one of three units.

    bits: the bytes that a plain mix of so many bits on average takes; from stats alone, or where matrices are
    counted instead of weights, average code bits (the papers' number). bpw: stored bits per planned weight, scales
    and zero points included. size: bytes of all weight files together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Annotated[
        float | None,
        Option(
            "Average bits per expert weight: the bytes of a plain mix of that width.",
            BUDGET,
        ),
    ] = None
    bpw: Annotated[float | None, Option("Stored bits per expert weight, scales and zeros included.", BUDGET)] = None
    size_bytes: Annotated[
        int | None,
        Option("Total size of the weight files, e.g. 9.5MiB, 12GiB.", BUDGET, name="size", typed=str, parse=parse_size),
    ] = None

    @property
    def stated(self) -> bool:
        """Whether there is any; plans made by hand have none."""
        return self != Budget()

    @classmethod
    def of(cls, bits: float | None = None, bpw: float | None = None, size: str | None = None) -> Budget:
        """Build from what a user gave. Raises BudgetError unless exactly one is given and positive."""
        stated = [name for name, value in (("--bits", bits), ("--bpw", bpw), ("--size", size)) if value is not None]
        if len(stated) != 1:
            got = " and ".join(stated) if stated else "none"
            raise BudgetError(f"State the budget exactly once, as --bits, --bpw, --size or --memory; got {got}.")
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


def names(pattern: str, name: str) -> bool:
    """Whether a glob names a matrix; it may leave out the name's beginning, at a dot, and its final `.weight`."""
    globs = (pattern, f"*.{pattern}", f"{pattern}.weight", f"*.{pattern}.weight")
    return any(fnmatchcase(name, glob) for glob in globs)


def _gamma(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise BudgetError(f"--gamma {text!r} is neither a number nor auto. Try --gamma auto.") from None


def _split_size(text: str) -> int:
    size = parse_size(text)
    if size < 1:
        raise BudgetError(f"--split-size {text!r} is no size of a file. Write for example --split-size 2GiB.")
    return size


def _share(text: str) -> float:
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = math.nan
    if rest or not 0 < share <= 1:
        raise BudgetError(f"--share {text!r} is no share of a model's bytes. Write for example --share 1%.")
    return share


def _show_share(share: float) -> str:
    """What to type for a share: as few digits as give exactly this one."""
    percents = (f"{100 * share:.{digits}g}%" for digits in range(1, 18))
    return next((text for text in percents if _share(text) == share), repr(share))


def _decibels(text: str) -> float:
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,6})?)\s*(?:dB)?\s*", text, re.IGNORECASE)
    if match is None:
        raise BudgetError(f"--min-sqnr {text!r} is not a ratio in decibels. Write for example 9dB.")
    return float(match[1])


class Rule(BaseModel):
    """A choice or a number for the matrices that a pattern names. Of two pins the later wins; bounds all hold.

    pattern: a role ("attention"), a projection ("down") or a glob on the matrix name, which may leave out the
    name's beginning and its final `.weight`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str
    value: str

    @classmethod
    def parse(cls, text: str, option: str, default_pattern: str | None = None) -> Rule:
        """Read 'PATTERN=VALUE', or only a value where a default pattern is given. Raises BudgetError."""
        pattern, separator, value = text.rpartition("=")
        if not separator and default_pattern is not None:
            pattern = default_pattern
        if not pattern.strip() or not value.strip():
            raise BudgetError(f"{option} {text!r} is not PATTERN=VALUE, for example {option} 'layers.0.*=8'.")
        return cls(pattern=pattern.strip(), value=value.strip())

    def __str__(self) -> str:
        return f"{self.pattern}={self.value}"

    def matches(self, matrix: MatrixRef) -> bool:
        """Whether the pattern names this matrix."""
        return self.pattern in (matrix.role.value, matrix.projection) or names(self.pattern, matrix.name)

    def number(self, option: str) -> float:
        """The value as bits. Raises BudgetError."""
        try:
            bits = float(self.value)
        except ValueError:
            bits = math.nan
        if not 0 < bits <= 32:
            raise BudgetError(f"{option} {self.value!r} is not a number of bits. Write for example {option} 2.")
        return bits


def _rules(flag: str, help: str, default_pattern: str | None = None) -> Option:
    """An option for rules, each for the matrices that a pattern names."""
    parse = partial(Rule.parse, option=flag, default_pattern=default_pattern)
    return Option(help, LIMITS, name=flag.removeprefix("--").replace("-", "_"), typed=str, parse=parse)


class PlanConfig(BaseModel):
    """Everything that decides a plan, apart from the checkpoint itself.

    A field is an option of every command that plans (`nouns.option`), is kept in the plan, and is repeated in the
    command that a report or a card shows. Of a file only the name is kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: Budget
    engine: Annotated[str, Option("Engine to plan for; see `alphaq engines`.", CHOICES)] = "native"
    method: Annotated[str, Option("Allocator; see `alphaq methods`.", SCORES)] = "auto"
    noise: Annotated[
        Noise | None,
        Option(
            "analytic (Var·2^-2b) or measured (round trip; the default where weights are given).", SCORES, varies=True
        ),
    ] = None
    share: Annotated[
        float | None,
        Option(
            "Go by rows that take this share of the matrices' bytes, e.g. 1%, and by routers; read no more.",
            SCORES,
            typed=str,
            parse=_share,
            show=_show_share,
        ),
    ] = Field(default=None, gt=0, le=1)
    gamma: Annotated[
        float | Literal["auto"],
        Option(
            "Exponent of (α₀/α)^γ in method alphaq: a number, or auto.", SCORES, typed=str, parse=_gamma, varies=True
        ),
    ] = "auto"
    spectrum: Annotated[
        Blocks, Option("Eigenvalues of farms (blocks) or of the whole matrix.", SCORES, varies=True)
    ] = "farms"
    tail: Annotated[Tail, Option("Where the tail starts: hill, median, finger or ks.", SCORES, varies=True)] = "hill"
    choices: Annotated[
        str | None,
        Option(
            "Candidates: bits, bits and group size, mixes within a matrix, ggml types "
            "(2,3g64,4g128s,2g128-slim,1g128-pb4,Q4_K), trellis codes (t2.25), trellis for all of these; all the "
            "engine's usual ones by default.",
            CHOICES,
        ),
    ] = None
    """None: what the method or the engine's profile offers by default."""
    fast: Annotated[
        bool,
        Option(
            "Leave out choices that take long to quantize to (llama.cpp's IQ types, native's trellis codes).",
            CHOICES,
        ),
    ] = False
    group_size: Annotated[
        int | None, Option("Columns per scale, for choices that name none: 32, 64 or 128.", CHOICES)
    ] = None
    """None: the engine's usual one, 128 for native."""
    symmetric: Annotated[bool, Option("Store no zero points.", CHOICES, varies=True)] = False
    attention_bits: Annotated[
        int | None, Option("Bits of attention and other mixers of tokens (4; 16 keeps them).", CHOICES)
    ] = None
    shared_bits: Annotated[int | None, Option("Bits of shared experts and dense MLPs (4; 16 keeps them).", CHOICES)] = (
        None
    )
    embedding_bits: Annotated[
        int | None,
        Option(
            "Bits of the token embedding (llama.cpp: 4; native and mlx keep it unless asked; others keep it).", CHOICES
        ),
    ] = None
    head_bits: Annotated[
        int | None,
        Option("Bits of the output matrix (llama.cpp: 6; vllm keeps it; others keep it unless asked).", CHOICES),
    ] = None
    """Of each role outside the budget; None: the engine's usual ones."""
    roles: Annotated[
        Literal["shared", "fixed"],
        Option(
            "With --size: shared, attention, shared experts, embedding and head compete for the same bytes; or fixed, "
            "at their usual widths.",
            CHOICES,
            varies=True,
        ),
    ] = "shared"
    pins: Annotated[
        tuple[Rule, ...], _rules("--pin", "PATTERN=CHOICE, e.g. 'layers.0.*=8', attention=16. Repeat.")
    ] = ()
    min_bits: Annotated[
        tuple[Rule, ...], _rules("--min-bits", "Least bits, of all or of PATTERN=BITS, e.g. 2, down=3. Repeat.", "*")
    ] = ()
    max_bits: Annotated[
        tuple[Rule, ...], _rules("--max-bits", "Most bits, of all or of PATTERN=BITS. Repeat.", "*")
    ] = ()
    min_sqnr_db: Annotated[
        float | None,
        Option(
            "Least signal-to-noise ratio of a matrix, e.g. 9dB.",
            LIMITS,
            name="min_sqnr",
            typed=str,
            parse=_decibels,
            show="{}dB".format,
            varies=True,
        ),
    ] = Field(default=None, allow_inf_nan=False)
    drop: Annotated[
        bool,
        Option("Drop whole experts where measured losses say that it pays.", LIMITS),
    ] = False
    drop_counts: Annotated[
        Literal["equal", "own"],
        Option(
            "With --drop: as many experts in every layer, or in each as many as pay (native, not in vLLM).",
            LIMITS,
        ),
    ] = "equal"
    max_drop: Annotated[
        float, Option("With --drop: most of a layer's experts that may go, e.g. 0.25, at most 0.5.", LIMITS)
    ] = Field(default=0.25, gt=0, le=0.5)
    max_drop_loss: Annotated[
        float, Option("With --drop: most that dropped experts may cost, in nats per token, with 95 %.", LIMITS)
    ] = Field(default=0.01, gt=0, allow_inf_nan=False)
    min_speed: Annotated[
        float | None,
        Option("Tokens per second to reach at least, by --bandwidth and what a token reads of each format.", LIMITS),
    ] = Field(default=None, gt=0, allow_inf_nan=False)
    bandwidth: Annotated[
        Rates | None,
        Option(
            "Bytes per second that all formats are read at, e.g. 80GB/s, or each (80GB/s,Q4_K=60GB/s); measured by "
            "default (`alphaq bench`).",
            LIMITS,
            typed=str,
            parse=Rates.parse,
        ),
    ] = None
    per_layer: Annotated[bool, Option("One budget for each layer.", LIMITS, varies=True)] = False
    """In proportion to its weights, instead of one for the model."""
    unweighted: Annotated[
        bool, Option("Count matrices, not weights, as the paper's code does.", SCORES, varies=True)
    ] = False
    """Every matrix counts once, and bits are code bits: the reference implementation's accounting."""
    seed: Annotated[int, Option("Seed of method random.", SCORES, varies=True)] = Field(default=0, ge=0)
    stats: Annotated[
        str | None, Option("Scores from a CSV (name, alpha, variance) instead of measuring.", SCORES, typed=Path)
    ] = None
    """Name of the file that scores came from instead of the weights."""
    calibration: Annotated[
        str | None,
        Option(
            "Text for methods and quantizers that look at inputs; self: the model's own writing.",
            SCORES,
            metavar="FILE|self",
        ),
    ] = None
    """Name of the text that calibrated methods used."""
    imatrix: Annotated[
        str | None,
        Option(
            "Importance matrix for llama.cpp's quantizers: a file; self, of the model's own writing; none, ones. By "
            "default self where the method runs the pass for it anyway, as auto does.",
            SCORES,
            metavar="FILE|self|none",
            show=lambda recorded: str(recorded).rpartition(" ")[0],  # a digest follows the name
        ),
    ] = None
    """Name and digest of the importance matrix that llama.cpp's quantizers use; None for ones. Commands fill it in."""
    bos: Annotated[bool, Option("Begin each window with what the model's tokenizer puts before a text.")] = True
    check: Annotated[
        bool,
        Option(
            "Compare the default method's plan with uniform bits on the model's own writing, and take the better.",
            SCORES,
            varies=True,
        ),
    ] = True
    split_bytes: Annotated[
        int | None,
        Option(
            "Split the GGUF file into parts of at most this size, e.g. 2GiB.",
            CHOICES,
            name="split_size",
            typed=str,
            parse=_split_size,
        ),
    ] = Field(default=None, gt=0)
    codec: Annotated[str | None, Option("Entropy-code the files: zstd. Budgets count coded bytes.", CHOICES)] = None

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, codec: str | None) -> str | None:
        if codec is not None and codec not in CODECS:
            raise ValueError(unknown("--codec", codec, CODECS) + " A plan that names another needs a newer alphaq")
        return None if codec == CODECS[0] else codec

    @field_validator("gamma")
    @classmethod
    def _finite(cls, gamma: float | str) -> float | str:
        if isinstance(gamma, float) and not math.isfinite(gamma):
            raise ValueError("gamma must be a finite number or auto")
        return gamma

    @property
    def token_limit_ns(self) -> int | None:
        """Nanoseconds that a token may take. None without a speed, or before it is known what is how fast."""
        if self.min_speed is None or self.bandwidth is None:
            return None
        return math.floor(10**9 / self.min_speed)

    def widths(self) -> dict[Role, int]:
        """Bit-widths that were asked for, of roles that are quantized outside the budget."""
        asked = {
            Role.ATTENTION: self.attention_bits,
            Role.MIXER: self.attention_bits,
            Role.SHARED_EXPERT: self.shared_bits,
            Role.DENSE_MLP: self.shared_bits,
            Role.EMBEDDING: self.embedding_bits,
            Role.HEAD: self.head_bits,
        }
        return {role: bits for role, bits in asked.items() if bits is not None}
