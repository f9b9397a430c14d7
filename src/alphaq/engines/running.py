"""An output folder run by transformers, which knows what to do from its config.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from alphaq.calibration.stream import model_class
from alphaq.errors import CheckpointError, first_line


def run_in_transformers(
    folder: Path, ids: Sequence[int], dtype: torch.dtype = torch.float32, remedy: str = "Quantize the model again."
) -> torch.Tensor:
    """Logits after each token, computed in a dtype, float32 [tokens, words].

    Raises CheckpointError with the remedy where transformers cannot load the folder, or would make up some weights.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model, told = model_class(config).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = first_line(error)
        raise CheckpointError(f"transformers cannot load {folder} ({reason:.300}). {remedy}") from error
    if missing := sorted(told["missing_keys"]):
        raise CheckpointError(
            f"transformers finds nothing in {folder} for {len(missing)} of the model's parameters, such as "
            f"{missing[0]}, and would compute with what it makes up for them. {remedy}"
        )
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(input_ids=torch.tensor([list(ids)])).logits[0].float()
    return logits
