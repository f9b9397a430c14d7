"""The memory that a model is to run in, and what of it the weights do not get."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from alphaq.nouns.option import Option
from alphaq.nouns.settings import parse_size

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
CACHE_TYPES: tuple[str, ...] = get_args(CacheType)
MOST_CELLS = 2**30  # engines count them in 32 bits
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
        ),
    ] = Field(gt=0)
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


class Memory(BaseModel):
    """What a budget was made of: the memory asked for, and what is kept in it beside the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    serving: Serving
    kept: Kept

    @property
    def weights(self) -> int:
        """Bytes that are left for weight files; negative where there are none."""
        return self.serving.memory_bytes - self.kept.total
