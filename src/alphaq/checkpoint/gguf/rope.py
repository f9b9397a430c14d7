"""Llama 3's rotary scaling in a GGUF file: a factor to each frequency, in a tensor of its own.

A GGUF file has no key for it. Long waves are slowed down by `factor`, short ones kept, and those between take a mean:
f = 1 / ((1 − s)/factor + s) with s = (context / wave − low) / (high − low). Source: llama.cpp's converter and
transformers' `_compute_llama3_parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alphaq.work.untrusted import JsonObject

FACTORS_TENSOR = "rope_freqs.weight"
KIND = "llama3"
# What every published model has; of the factors alone, only the first is seen.
_USUAL = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """What the wave of each rotary pair is divided by, float32 [head_dim / 2].

    rope: the config's `rope_parameters`. Raises KeyError or TypeError if a number is missing.
    """
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    waves = 2 * math.pi / frequencies
    share = (context / waves - low) / (high - low)
    between = 1 / ((1 - share) / factor + share)
    long = torch.where(waves > context / low, float(factor), between)
    return torch.where(waves < context / high, 1.0, long)


def llama3_settings(factors: Tensor, theta: float) -> JsonObject | None:
    """The `rope_parameters` that give these factors, None if no usual ones do."""
    factor = round(float(factors.max()), 4)  # as a config would say it
    settings = {"rope_type": KIND, "rope_theta": theta, "factor": factor, **_USUAL}
    made = llama3_factors(settings, 2 * len(factors))
    return settings if torch.allclose(made, factors, rtol=1e-5, atol=0) else None
