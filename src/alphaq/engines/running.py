"""An output folder run by transformers, which knows what to do from its config.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from alphaq.calibration.stream import model_class
from alphaq.errors import CheckpointError, first_line


def run_in_transformers(folder: Path, ids: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits after each token, computed in a dtype, float32 [tokens, words]."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = model_class(config).from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"transformers cannot load {folder} ({reason:.300}). Quantize the model again."
        ) from error
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(input_ids=torch.tensor([list(ids)])).logits[0].float()
    return logits
