"""Load any model that transformers can, native checkpoints included, and run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from alphaq.errors import CheckpointError


def load_model(model: str | Path, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Model in eval mode and tokenizer, from a folder or hub id. Never runs code from the checkpoint.

    Raises CheckpointError in one line if transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if str(model).startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise CheckpointError(f"No folder {model}. Check the path, or give a hub id.")
    logging.disable_progress_bar()
    source = str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else str(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"transformers cannot load {model} ({reason}). Check it with `alphaq verify` or `alphaq inspect`."
        ) from error
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return loaded.to(target).eval(), tokenizer  # type: ignore[arg-type]


def generate_text(model: str | Path, prompt: str, max_new_tokens: int, device: str | None = None) -> str:
    """Greedy continuation of a prompt, without the prompt."""
    loaded, tokenizer = load_model(model, device=device)
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    if inputs["input_ids"].shape[1] == 0:
        raise CheckpointError("The prompt has no tokens. Give at least one word.")
    with torch.inference_mode():
        output = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
