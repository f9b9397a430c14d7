"""Rotary frequencies that a GGUF file holds as a tensor, because no metadata say them: those of Llama 3.

Wavelengths λ = 2π·θ^(2i/d) beyond `original / low_freq_factor` are stretched by `factor`, those below
`original / high_freq_factor` stay, and between the two the inverse of the stretch goes linearly with 1/λ. llama.cpp
divides an angle by its number in `rope_freqs.weight`. Source: Llama 3.1's model card; transformers'
`_compute_llama3_parameters`, which a test compares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

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
        factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        base, original = float(rope["rope_theta"]), float(rope["original_max_position_embeddings"])
        wavelengths = 2 * math.pi * base ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        share = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
        stretched = 1 / ((1 - share) / factor + share)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError, RuntimeError) as error:
        raise ArchitectureError(
            f"config.json: rope_parameters say {rope!s:.200}, which describes no rotary embedding of Llama 3 "
            f"({error}). Restore the original file."
        ) from error
    return stretched.float()
