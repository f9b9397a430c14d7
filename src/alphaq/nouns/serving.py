"""The memory that a model is to run in, and what of it the weights do not get."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from alphaq.nouns.option import Option
from alphaq.nouns.sizes import parse_size, show_size

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
CACHE_TYPES: tuple[str, ...] = get_args(CacheType)
MOST_CELLS = 2**30  # engines count them in 32 bits
CARD_BYTES = 2**29  # what a card's driver and libraries take for a program; an allowance, not measured
MEMORY = "Memory to run in (with --memory)"


class Serving(BaseModel):
    """How a model is to run. context: tokens of each of the `parallel` sequences."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_bytes: Annotated[
        int,
        Option(
            "Memory to run in, e.g. 16GiB: what cache and buffers leave is the budget (llama.cpp).",
            MEMORY,
            name="memory",
            typed=str,
            parse=parse_size,
            show=show_size,
        ),
    ] = Field(gt=0)
    vram_bytes: Annotated[
        int | None,
        Option(
            "Memory of a card beside it, e.g. 8GiB: for what every token reads, and as many layers' experts as fit.",
            MEMORY,
            name="vram",
            typed=str,
            parse=parse_size,
            show=show_size,
        ),
    ] = Field(default=None, gt=0)
    context: Annotated[int, Option("Tokens of context of each sequence.", MEMORY)] = Field(
        default=4096, ge=1, le=MOST_CELLS
    )
    parallel: Annotated[int, Option("Sequences at the same time.", MEMORY)] = Field(default=1, ge=1, le=1024)
    kv_type: Annotated[CacheType, Option("Type of the cache of keys and values: f16, q8_0, q4_0 ….", MEMORY)] = "f16"

    @model_validator(mode="after")
    def _countable(self) -> Serving:
        if self.cells > MOST_CELLS:
            raise ValueError(f"{self.parallel} sequences of {self.context} tokens are more than {MOST_CELLS}")
        return self

    @property
    def cells(self) -> int:
        """Tokens of all sequences together."""
        return self.context * self.parallel


class Kept(BaseModel):
    """Bytes that an engine keeps beside the weights: keys, values and states; what it computes in; its own tables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cache_bytes: NonNegativeInt
    buffer_bytes: NonNegativeInt
    engine_bytes: NonNegativeInt

    @property
    def total(self) -> int:
        """All of it."""
        return self.cache_bytes + self.buffer_bytes + self.engine_bytes


class Placement(BaseModel):
    """Where weights lie that a card shares with the machine. host_layers: of so many layers, from the first, the
    experts stay in the machine's memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    card_bytes: NonNegativeInt
    host_bytes: NonNegativeInt
    host_layers: NonNegativeInt


class Memory(BaseModel):
    """What a budget was made of: the memory asked for, and what is kept in it beside the weights.

    With a card, cache and buffers lie there, and buffers for what the processor computes in the machine's memory too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    serving: Serving
    kept: Kept
    placement: Placement | None = None

    @property
    def host(self) -> int:
        """Bytes of the machine's memory that are left for weights; negative where there are none."""
        kept = self.kept.total - (0 if self.serving.vram_bytes is None else self.kept.cache_bytes)
        return self.serving.memory_bytes - kept

    @property
    def card(self) -> int:
        """Bytes of the card that are left for weights; negative where there are none, 0 without a card."""
        if self.serving.vram_bytes is None:
            return 0
        return self.serving.vram_bytes - self.kept.cache_bytes - self.kept.buffer_bytes - CARD_BYTES

    @property
    def weights(self) -> int:
        """Bytes that are left for weight files; negative where there are none."""
        return self.host + self.card
