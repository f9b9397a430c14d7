"""GPTQModel in a process of its own, which runs many models: it exchanges classes of transformers for its own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from alphaq.engines.gptqmodel import logits_here


def logits(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """float32 [tokens, words]."""
    return torch.tensor(_process().submit(_logits, folder, ids).result())


@lru_cache(maxsize=1)
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def _logits(folder: Path, ids: Sequence[int]) -> Any:
    import transformers

    no_image: Any = classmethod(lambda cls, *arguments, **settings: None)
    transformers.AutoProcessor.from_pretrained = no_image
    return logits_here(folder, ids).tolist()
