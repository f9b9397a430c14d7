"""How fast the native runtime multiplies one token with weights of each choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.functional import linear

from alphaq.calibration.stream import model_class
from alphaq.formats.blocks import encode
from alphaq.nouns.choice import Choice
from alphaq.quantizers.base import DEFAULT, rounder_of
from alphaq.runtime.multiply import multiply
from alphaq.runtime.packed import PackedWeights
from alphaq.simd.vectors import STATE
from alphaq.work.timing import usual_seconds
from alphaq.work.workers import Wrap

ROWS, COLUMNS, CHOSEN = 1024, 2048, 4
"""Of a matrix, and how many a token is multiplied with at a time, as it is with experts."""
STEPS = 16


def version() -> str:
    """Of what is timed."""
    return f"kernels {STATE}, torch {torch.__version__}"


def kernel_rates(choices: Sequence[Choice], nbytes: int, threads: int, wrap: Wrap) -> list[float]:
    """Bytes per second of each choice, of matrices that take at most so many bytes, or one.

    What is kept in 16 bits goes through torch, as it does in models.
    """
    return [_kernel_rate(one, nbytes, threads) for one in wrap(choices, len(choices), "measure our kernels")]


def _kernel_rate(choice: Choice, nbytes: int, threads: int) -> float:
    token = torch.randn(1, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()
    with _torch_threads(threads), torch.inference_mode():
        if choice.kept:
            whole = torch.full((nbytes // (2 * COLUMNS), COLUMNS), 0.5, dtype=torch.bfloat16)
            return whole.nbytes / usual_seconds(lambda: linear(token, whole))
        weights = _matrices(choice, nbytes)
        order = torch.randperm(len(weights.names[0]), generator=torch.Generator().manual_seed(0)).split(CHOSEN)
        same = [torch.zeros_like(few) for few in order]

        def products() -> None:
            for few, first in zip(order, same, strict=True):
                multiply(token, weights, few, first)

        return weights.nbytes / usual_seconds(products)


def _matrices(choice: Choice, nbytes: int) -> PackedWeights:
    """The same random matrix again and again, as experts of one projection."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    block = encode(rounder_of(DEFAULT)(weight, choice))
    blocks = [block.clone() for _ in range(max(1, nbytes // block.nbytes))]
    weights = PackedWeights([[f"expert {number}" for number in range(len(blocks))]], (ROWS, COLUMNS))
    weights.fill([blocks])
    return weights


def step_seconds(folder: Path, threads: int) -> float:
    """Seconds of a token that follows few others, of the model in an output folder."""
    from transformers import AutoConfig

    with _torch_threads(threads), torch.inference_mode():
        config = AutoConfig.from_pretrained(folder)
        model = model_class(config).from_pretrained(folder, dtype="auto").eval()
        token = torch.zeros(1, 1, dtype=torch.int64)

        def decode() -> None:
            out = model(token, use_cache=True)
            for _ in range(STEPS):
                out = model(token, past_key_values=out.past_key_values, use_cache=True)

        return usual_seconds(decode) / (STEPS + 1)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
