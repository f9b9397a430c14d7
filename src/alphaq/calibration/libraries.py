"""What the libraries under a pass are told: how the C library keeps large tensors, and to show no bars."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

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
