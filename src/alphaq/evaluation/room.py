"""Whether models are run in memory or layer by layer from disk: what they need against what is free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from alphaq.checkpoint.config import read_config
from alphaq.checkpoint.files import free_bytes
from alphaq.checkpoint.gguf.source import find_gguf
from alphaq.checkpoint.hub import expanded, resolve_folder
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.weights import weight_files
from alphaq.errors import AlphaQError, CheckpointError
from alphaq.nouns.scoring import Scoring

USABLE = 0.8
"""Share of what is free that weights may take; the rest is for activations and logits."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
COMPUTES_IN = "float32"
"""What layers from disk compute in, on the processor."""


def with_stream(
    scoring: Scoring, models: Sequence[str | Path], more_bytes: int = 0, whole_for: str | None = None
) -> tuple[Scoring, str | None]:
    """The scoring with `stream` decided, and a sentence for the user where nobody asked for what is done.

    models: those that transformers would hold at the same time. more_bytes: what others will take beside them.
    whole_for: an option that needs them in memory. Raises AlphaQError for options that exclude each other, and where
    models that an option needs in memory do not fit there.
    """
    if scoring.stream is not None:
        if scoring.stream:
            _check(scoring, whole_for)
        return scoring, None
    own_device = scoring.device not in (None, "cpu")
    if not models or own_device or scoring.dtype not in ("auto", COMPUTES_IN):
        return scoring.model_copy(update={"stream": False}), None
    needed, free = sum(bytes_in_memory(one, scoring.dtype) for one in models) + more_bytes, _free(scoring)
    if not free or needed <= USABLE * free:
        return scoring.model_copy(update={"stream": False}), None
    sizes = f"{' and '.join(map(str, models))} would take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    if whole_for is not None:
        raise AlphaQError(
            f"{sizes}: {whole_for} needs models in memory. Leave it out, and they are run layer by layer; or add "
            "--no-stream to try."
        )
    return (
        scoring.model_copy(update={"stream": True}),
        f"{sizes}, so they are run layer by layer from disk, in {COMPUTES_IN} (--no-stream: in memory)",
    )


def _check(scoring: Scoring, whole_for: str | None) -> None:
    """Raise AlphaQError for what models that stay on disk cannot do."""
    if scoring.dtype not in ("auto", COMPUTES_IN):
        raise AlphaQError(f"--stream computes in {COMPUTES_IN}, not in {scoring.dtype}. Drop --dtype or --stream.")
    if scoring.device not in (None, "cpu"):
        raise AlphaQError(f"--stream computes on the processor, not on {scoring.device}. Drop --device or --stream.")
    if whole_for is not None:
        raise AlphaQError(f"{whole_for} needs models in memory, and --stream leaves them on disk. Drop one of them.")


def bytes_in_memory(model: str | Path, dtype: str) -> int:
    """What a model takes when transformers has loaded it: quantized ones about their files; 0 of what is no model."""
    with suppress(CheckpointError, OSError):  # who loads it says what is wrong
        if find_gguf(expanded(model)) is not None:
            shards = open_checkpoint(model, quantized=True).shards.values()
            weights = sum(math.prod(one.shape) for tensors in shards for one in tensors.values())
            return weights * ITEM_BYTES[COMPUTES_IN if dtype == "auto" else dtype]
        folder = resolve_folder(str(model))
        stored = sum((folder / name).stat().st_size for name in weight_files(folder).names)
        config = read_config(folder)
        own = config.get("dtype") or config.get("torch_dtype") or COMPUTES_IN
        if dtype == "auto" or config.get("quantization_config") or own not in ITEM_BYTES:
            return stored
        return stored * ITEM_BYTES[dtype] // ITEM_BYTES[str(own)]
    return 0


def _free(scoring: Scoring) -> int:
    """Bytes where the models would lie; 0 where the system does not tell."""
    free = free_bytes()
    if scoring.device is None and torch.cuda.is_available():
        free = min(free, torch.cuda.mem_get_info()[0]) if free else torch.cuda.mem_get_info()[0]
    return free
