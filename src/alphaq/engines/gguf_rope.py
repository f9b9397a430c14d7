"""Rotary frequencies that a GGUF file holds as a tensor, because no metadata say them: those of Llama 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from alphaq.checkpoint.gguf_rope import llama3_factors
from alphaq.errors import ArchitectureError


def scales_frequencies(config: Mapping[str, Any]) -> bool:
    """Whether rotary frequencies are stretched one by one."""
    rope = config.get("rope_parameters")
    return isinstance(rope, dict) and rope.get("rope_type") == "llama3"


def frequency_factors(config: Mapping[str, Any]) -> torch.Tensor:
    """What each frequency is divided by, float32 [head_dim / 2]. Raises ArchitectureError for no usable numbers."""
    rope = config["rope_parameters"]
    try:
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return llama3_factors(rope, size)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError, RuntimeError) as error:
        raise ArchitectureError(
            f"config.json: rope_parameters say {rope!s:.200}, which describes no rotary embedding of Llama 3 "
            f"({error}). Restore the original file."
        ) from error
