"""How a model is scored on texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from alphaq.nouns.option import Option

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Scoring(BaseModel):
    """Texts, how they are cut into windows of tokens, and how the model is run on these.

    bos: each window begins with what the tokenizer puts before a text, where it does. device: None for the GPU if there
    is one, else the CPU. stream: whether models are run layer by layer from disk; None where they would not fit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: Annotated[tuple[Path, ...], Option("UTF-8 text file; may be repeated.", name="text", more="FILE")] = ()
    window: Annotated[int, Option("Tokens per window.")] = Field(default=512, ge=2)
    max_tokens: Annotated[int | None, Option("Tokens of each text to use; all by default.")] = Field(default=None, ge=2)
    skip_tokens: Annotated[int, Option("Tokens to leave out at the start of each text.")] = Field(default=0, ge=0)
    bos: Annotated[bool, Option("Begin each window with what the model's tokenizer puts before a text.")] = True
    dtype: Annotated[Dtype, Option("auto, float32, bfloat16 or float16.")] = "float32"
    device: Annotated[str | None, Option("cpu, cuda, cuda:1, mps; the GPU if there is one.")] = None
    stream: Annotated[
        bool | None,
        Option("Run models layer by layer from disk, or not; by default where they would not fit into memory."),
    ] = None
