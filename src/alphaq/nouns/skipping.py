"""What leaving out experts costs and gains, by threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from alphaq.nouns.option import Option


class Decoding(BaseModel):
    """How speed is measured: so many tokens of a text, one at a time, after a prompt of its first ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[int, Option("Tokens before those that are timed.")] = Field(default=16, ge=1)
    steps: Annotated[int, Option("Tokens to decode for each threshold and round.")] = Field(default=64, ge=1)
    rounds: Annotated[int, Option("Rounds in which all thresholds take turns; the median counts.")] = Field(
        default=3, ge=1
    )


@dataclass(frozen=True)
class SkipPoint:
    """One threshold.

    share: of a token's largest routing weight, below which an expert is left out. left_out: of all pairs of a token and
    one of its experts. kl in nats and top1 per token; perplexity: geometric mean of the texts. tokens_per_s: of one
    sequence; cpu_ms: of the processor, a token; speedup: over all experts, the median of quotients within a round.
    """

    share: float
    left_out: float
    kl: float
    top1: float
    perplexity: float
    tokens_per_s: float
    cpu_ms: float
    speedup: float


@dataclass(frozen=True)
class SkipCurve:
    """All thresholds. against: what KL and top-1 compare with. tokens: that were scored."""

    points: tuple[SkipPoint, ...]
    against: str
    tokens: int
    decoding: Decoding
