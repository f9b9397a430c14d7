"""Whether models are run in memory or layer by layer from disk: what they need against what is free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from alphaq.checkpoint.files import free_bytes, memory_bytes
from alphaq.checkpoint.gguf.source import find_gguf
from alphaq.checkpoint.hub import expanded
from alphaq.checkpoint.reader import NATIVE_METHOD, Checkpoint
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import AlphaQError
from alphaq.evaluation.streamed import opened_for_scoring
from alphaq.nouns.scoring import Scoring

USABLE = 0.8
"""Share of what is free that weights may take; the rest is for activations and logits."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED_BYTES = {"F64": 8, "F32": 4}
"""Of a weight by its dtype on disk; all others are loaded in 16 bits where nothing says more."""
COMPUTES_IN = "float32"
"""What layers from disk compute in, on the processor."""
ON_CARD = "{} are free on the GPU"


def with_stream(
    scoring: Scoring,
    models: Sequence[str | Path],
    more_bytes: int = 0,
    whole_for: str | None = None,
    loaded_in: str | None = None,
) -> tuple[Scoring, str | None]:
    """The scoring with `stream` decided, and a sentence for the user where nobody asked for what is done.

    models: those that transformers would hold at the same time. more_bytes: what others will take beside them.
    whole_for: an option that needs them in memory. loaded_in: a dtype, if not that of the scoring. Raises AlphaQError
    for options that exclude each other, and where models that an option needs in memory do not fit there.
    """
    check_stream(scoring, whole_for)
    if scoring.stream is not None:
        return scoring, None
    own_device = scoring.device not in (None, "cpu")
    if not models or own_device or scoring.dtype not in ("auto", COMPUTES_IN):
        return scoring.model_copy(update={"stream": False}), None
    dtype = loaded_in or usual_dtype(scoring.dtype, models)
    needed = sum(bytes_in_memory(one, dtype) for one in models) + more_bytes
    free, place = _free(scoring)
    if not free or needed <= USABLE * free:
        return scoring.model_copy(update={"stream": False}), None
    there = place.format(f"{free / 1e9:.1f} GB")
    sizes = f"{' and '.join(map(str, models))} would take {needed / 1e9:.1f} GB, and {there}"
    if whole_for is not None:
        raise AlphaQError(
            f"{sizes}: {whole_for} needs models in memory. Leave it out, and they are run layer by layer; or add "
            "--no-stream to try."
        )
    instead = "--device cpu: in the machine's memory" if place == ON_CARD else "--no-stream: in memory"
    return (
        scoring.model_copy(update={"stream": True}),
        f"{sizes}, so they are run layer by layer from disk, in {COMPUTES_IN} ({instead})",
    )


def usual_dtype(dtype: str, models: Sequence[str | Path | None]) -> str:
    """What models are loaded in that are compared: beside a GGUF file `auto` is float32."""
    beside_gguf = any(one is not None and find_gguf(expanded(one)) is not None for one in models)
    return COMPUTES_IN if dtype == "auto" and beside_gguf else dtype


def check_stream(scoring: Scoring, whole_for: str | None = None) -> None:
    """Raise AlphaQError for what models that `--stream` leaves on disk cannot do."""
    if not scoring.stream:
        return
    if scoring.dtype not in ("auto", COMPUTES_IN):
        raise AlphaQError(f"--stream computes in {COMPUTES_IN}, not in {scoring.dtype}. Drop --dtype or --stream.")
    if scoring.device not in (None, "cpu"):
        raise AlphaQError(f"--stream computes on the processor, not on {scoring.device}. Drop --device or --stream.")
    if whole_for is not None:
        raise AlphaQError(f"{whole_for} needs models in memory, and --stream leaves them on disk. Drop one of them.")


def bytes_in_memory(model: str | Path, dtype: str) -> int:
    """What a model takes when transformers has loaded it; 0 of what AlphaQ does not open, nor could run from disk.

    Headers say it: native codes stay as they are, and every other weight is restored to `dtype`.
    """
    with suppress(AlphaQError, OSError):  # who loads it says what is wrong
        source = opened_for_scoring(model)
        item = ITEM_BYTES.get(_own_dtype(source) if dtype == "auto" else dtype)
        return sum(_loaded(one, item) for shard in source.shards.values() for one in shard.values())
    return 0


def _own_dtype(source: Checkpoint) -> str:
    """What a config asks for; empty if nothing."""
    configs = (source.config, source.text_config)
    return str(next((found for one in configs for key in ("dtype", "torch_dtype") if (found := one.get(key))), ""))


def _loaded(info: TensorInfo, item: int | None) -> int:
    """Bytes of a tensor in memory. item: of a weight; None as it is stored."""
    if info.encoding is not None and info.encoding.scheme == NATIVE_METHOD and info.dtype == "F32":
        return info.nbytes  # kept ones that are coded have the dtype of before
    return math.prod(info.shape) * (item or STORED_BYTES.get(info.dtype, 2))


def _free(scoring: Scoring) -> tuple[int, str]:
    """Bytes where the models would lie, and a sentence about them; 0 where the system does not tell."""
    free, place = free_bytes(), "{} are free"
    if not free:
        free, place = memory_bytes(), "the machine has {}"
    if scoring.device is None and torch.cuda.is_available():
        on_card = torch.cuda.mem_get_info()[0]
        if not free or on_card < free:
            return on_card, ON_CARD
    return free, place
