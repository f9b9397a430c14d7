"""Checkpoints that differ from a saved one in a known way."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def changed(source: Path, out: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy in one file, after `change` has worked on its tensors."""
    out.mkdir()
    shutil.copy(source / "config.json", out)
    tensors = {name: value for file in source.glob("*.safetensors") for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def biased_to_first_two(tensors: Tensors) -> None:
    """Make DeepSeek-V3's selection bias so large that experts 0 and 1 are always chosen."""
    for name, bias in tensors.items():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
