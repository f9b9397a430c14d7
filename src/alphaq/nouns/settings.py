"""What a user asks for, checked once and passed explicitly. Nothing here reads the environment."""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from alphaq.errors import BudgetError
from alphaq.nouns.choice import CODECS
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.registry import unknown

Noise = Literal["analytic", "measured"]
Blocks = Literal["farms", "whole"]
Tail = Literal["hill", "median", "finger", "ks"]

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

    bits: the bytes that a plain mix of so many bits on average takes; from stats alone, or where matrices are
    counted instead of weights, average code bits (the papers' number). bpw: stored bits per planned weight, scales
    and zero points included. size: bytes of all weight files together.
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


def names(pattern: str, name: str) -> bool:
    """Whether a glob names a matrix; it may leave out the name's beginning, at a dot, and its final `.weight`."""
    globs = (pattern, f"*.{pattern}", f"{pattern}.weight", f"*.{pattern}.weight")
    return any(fnmatchcase(name, glob) for glob in globs)


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
            raise BudgetError(f"{option} {self.value!r} is no number of bits. Write for example {option} 2.")
        return bits


_OPTIONS = {"size_bytes": "size", "pins": "pin", "min_sqnr_db": "min_sqnr"}
"""Settings whose option is not called after them."""


def option_of(setting: str) -> str:
    """The command line's option for a setting, for one that is on by default without its `no-`."""
    return f"--{_OPTIONS.get(setting, setting).replace('_', '-')}"


class PlanConfig(BaseModel):
    """Everything that decides a plan, apart from the checkpoint itself.

    A field is repeated by its option (`option_of`) in the command that a report or a card shows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: Budget
    engine: str = "native"
    method: str = "auto"
    noise: Noise | None = None
    """None: measured where the weights are at hand, analytic elsewhere."""
    gamma: float | Literal["auto"] = "auto"
    spectrum: Blocks = "farms"
    tail: Tail = "hill"
    choices: str | None = None
    """None: what the method or the engine's profile offers by default."""
    group_size: int | None = None
    """None: the engine's usual one, 128 for native."""
    symmetric: bool = False
    attention_bits: int | None = None
    shared_bits: int | None = None
    embedding_bits: int | None = None
    head_bits: int | None = None
    """Of each role outside the budget; None: the engine's usual ones."""
    pins: tuple[Rule, ...] = ()
    min_bits: tuple[Rule, ...] = ()
    max_bits: tuple[Rule, ...] = ()
    min_sqnr_db: float | None = Field(default=None, allow_inf_nan=False)
    per_layer: bool = False
    """One budget for each layer, in proportion to its weights, instead of one for the model."""
    unweighted: bool = False
    """Every matrix counts once, and bits are code bits: the reference implementation's accounting."""
    seed: int = Field(default=0, ge=0)
    stats: str | None = None
    """Name of the file that scores came from instead of the weights."""
    calibration: str | None = None
    """Name of the text that calibrated methods used."""
    imatrix: str | None = None
    """Name and digest of the importance matrix that llama.cpp's quantizers are to use."""
    bos: bool = True
    """Whether windows of tokens begin with what the model's tokenizer puts before a text."""
    check: bool = True
    """Whether a plan of the default method is compared with a uniform one before it is handed out."""
    codec: str | None = None
    """What codes the tensors of the files; a budget then counts coded bytes."""

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, codec: str | None) -> str | None:
        if codec is not None and codec not in CODECS:
            raise ValueError(unknown("--codec", codec, CODECS).removesuffix("."))
        return None if codec == CODECS[0] else codec

    @field_validator("gamma")
    @classmethod
    def _finite(cls, gamma: float | str) -> float | str:
        if isinstance(gamma, float) and not math.isfinite(gamma):
            raise ValueError("gamma must be a finite number or auto")
        return gamma

    def roles(self) -> dict[Role, int]:
        """Bit-widths that were asked for, of roles that are quantized outside the budget."""
        given = {
            Role.ATTENTION: self.attention_bits,
            Role.MIXER: self.attention_bits,
            Role.SHARED_EXPERT: self.shared_bits,
            Role.DENSE_MLP: self.shared_bits,
            Role.EMBEDDING: self.embedding_bits,
            Role.HEAD: self.head_bits,
        }
        return {role: bits for role, bits in given.items() if bits is not None}
