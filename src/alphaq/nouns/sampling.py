"""How the next token is chosen when a model writes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from alphaq.errors import AlphaQError
from alphaq.nouns.option import Option


def _temperature(value: float) -> float:
    if not 0 <= value <= 100:
        raise AlphaQError(f"--temperature {value:g} is not between 0 and 100. Try --temperature 0.7.")
    return value


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise AlphaQError(f"--top-p {value:g} is not between 0 and 1. Try --top-p 0.95.")
    return value


class Sampling(BaseModel):
    """temperature: 0 takes the most likely token. top_p, top_k: tokens that may be drawn, by their probabilities
    together and by number. seed: the same gives the same text on the same machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: Annotated[
        float, Option("Draw tokens; higher is more varied. 0 takes the most likely one each time.", parse=_temperature)
    ] = 0.0
    top_p: Annotated[
        float | None, Option("Draw from the likeliest tokens that have this probability together.", parse=_share)
    ] = None
    top_k: Annotated[int | None, Option("Draw from so many of the likeliest tokens.")] = Field(default=None, ge=1)
    seed: Annotated[int, Option("Seed of the draws.")] = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _agree(self) -> Sampling:
        if not self.temperature and (self.top_p is not None or self.top_k is not None):
            raise AlphaQError(
                "--top-p and --top-k apply only where tokens are drawn. Add --temperature 0.7, or drop them."
            )
        return self


GREEDY = Sampling()
"""The likeliest token each time."""
