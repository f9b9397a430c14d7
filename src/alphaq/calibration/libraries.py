"""What the libraries under a pass are told: how the C library keeps large tensors, to show no bars, which config."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from alphaq.checkpoint.reader import Checkpoint
from alphaq.work.untrusted import JsonObject

MMAP_THRESHOLD, LARGE_BYTES = -3, 1 << 22  # glibc's name of the setting; tensors of 4 MiB


@cache
def map_large_tensors() -> None:
    """Have glibc map large tensors by themselves, for as long as the process lives, so that freed ones leave it.

    Otherwise pieces that later tensors do not fit into pile up, 30 MB with every layer of 2,048 columns
    (docs/research/log.md).
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library, which has no such fault or no such remedy
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE_BYTES)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers shows one per load, which here is hundreds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def config_of(checkpoint: Checkpoint) -> Any:
    """The config of a checkpoint in its family's class. Raises what transformers raises."""
    from transformers import AutoConfig

    if checkpoint.gguf is None and not checkpoint.dropped:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    return AutoConfig.for_model(**json.loads(json.dumps(checkpoint.config), object_hook=_number))


def _number(part: JsonObject) -> JsonObject | float:
    """An infinity, as transformers writes it to a config.json; any other part as it is."""
    return float(part["__float__"]) if part.keys() == {"__float__"} else part
