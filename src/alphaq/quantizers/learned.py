"""Learned grids: the codes of a matrix and the steps of its groups, found together by gradient descent.

A layer's output moves by (w − ŵ)·x for each row w, so with H the mean of x·xᵀ over its inputs the error is

    E = Σ over rows of (w − ŵ)·H·(w − ŵ)ᵀ,        ŵ = step·(code − zero) + mean.

Rounding to nearest ignores that errors of correlated inputs can cancel; GPTQ decides on one column after another and
never comes back. Here each code may stay or move by one, with the probabilities softmax((logits + noise) / heat), and
Adam lowers E of the expected codes by the logits and by the logarithm of every step. The noise is Gumbel's: without the
heat the largest sum is a draw from softmax(logits). Heat falls until the codes are all but decided. The likeliest codes
are then polished: column after column takes the code that minimises E with all others held, each group the step that
does, until little changes. Rounds of both follow until one lowers E by less than a tolerance.

Without H, or with its diagonal alone, columns do not interact: the nearest code is the best, and steps and zero points
are searched instead. The same search, weighted by the diagonal of H, also gives levels for GPTQ, and learning begins
from each row's better one of that and what is given. Rows never interact, so the best of each is kept.

Source: GSQ (arXiv 2604.18556). Tried here and left out, as they gain nothing or lose: more than three codes to choose
from, even at 2 bits; drawn codes in place of expected ones (straight-through); no noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from alphaq.errors import QuantizationError
from alphaq.formats.table import format_of
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.quantizers.gptq import quantize_gptq
from alphaq.quantizers.learning.annealing import LearnedSettings, refined
from alphaq.quantizers.learning.levels import best_rows, levels_of, matrix_of
from alphaq.quantizers.learning.search import searched
from alphaq.quantizers.moments import check_moments
from alphaq.quantizers.rows import FP16_MAX, too_large
from alphaq.simd.sums import slices
from alphaq.work.workers import Wrap, silent

WEIGHTS_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 23}  # learning takes some 250 bytes for each
USUAL = LearnedSettings()


def quantize_learned(
    weight: torch.Tensor,
    choice: Choice,
    name: str = "matrix",
    hessian: torch.Tensor | None = None,
    start: QuantizedMatrix | None = None,
    device: str | torch.device | None = None,
    settings: LearnedSettings = USUAL,
    progress: Wrap = silent,
) -> QuantizedMatrix:
    """Quantize a [rows, columns] matrix whose inputs x have the second moments `hessian`, any multiple of E[x·xᵀ].

    hessian: float32 [columns, columns], symmetric; or [columns], its diagonal; or None for the identity. It is taken
    at its word: one of few inputs wants a larger diagonal first. start: a quantized form to begin from, that of
    `quantize_debiased` if None; no row of the result has a larger error (w − ŵ)·H·(w − ŵ)ᵀ. device: torch's; a CUDA one
    if None and there is one. On the CPU equal arguments give equal bytes, whatever the number of threads; the name
    seeds the noise. progress: is shown the parts of the matrix. Raises QuantizationError naming the matrix if it cannot
    be stored, or if the moments are not those of its inputs.
    """
    if format_of(choice).streams:  # the states are no grid: GPTQ's codes are the best there are
        return quantize_gptq(weight, choice, name, hessian, start)
    _check(weight, choice, name, hessian)
    start = start or quantize_debiased(weight, choice, name)
    if (start.choice, start.shape) != (choice, tuple(weight.shape)):
        raise QuantizationError(f"{name}: learning cannot begin from {start.choice} {start.shape}. Pass its own form.")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    moments = (torch.ones(weight.shape[1]) if hessian is None else hessian).to(place, torch.float32)
    importance = moments if moments.ndim == 1 else moments.diagonal()

    def search_part(part: slice) -> QuantizedMatrix:
        rows, begin = weight[part].to(place).float(), levels_of(start, part, place)
        found = searched(rows, begin, importance)
        if moments.ndim == 1:
            found = best_rows(rows, begin, found, moments)
        return matrix_of(rows, found)

    parts = slices(len(weight), max(1, WEIGHTS_AT_ONCE["cuda" if place.type == "cuda" else "cpu"] // weight.shape[1]))
    if moments.ndim == 1:
        return _in_parts(search_part, parts, place, progress, name)
    other = quantize_gptq(weight, choice, name, hessian, _in_parts(search_part, parts, place, silent, name))

    def learn_part(part: slice) -> QuantizedMatrix:
        rows, given = weight[part].to(place).float(), levels_of(start, part, place)
        begin = best_rows(rows, given, levels_of(other, part, place), moments)
        found = refined(rows, begin, moments, settings, _generator(f"{name}:{part.start}", place))
        return matrix_of(rows, best_rows(rows, begin, found, moments))

    return _in_parts(learn_part, parts, place, progress, name)


def _check(weight: torch.Tensor, choice: Choice, name: str, hessian: torch.Tensor | None) -> None:
    if format_of(choice).foreign:
        raise QuantizationError(f"{name}: {choice} is rounded by llama.cpp's own code. Give it an --imatrix instead.")
    if not format_of(choice).learnable:
        raise QuantizationError(f"{name}: {choice} has no one grid of codes to learn. Use --quantizer debiased for it.")
    if not torch.isfinite(weight).all():
        raise too_large(name, FP16_MAX)
    if hessian is not None:
        check_moments(hessian, weight.shape[1], name)


def _in_parts(
    work: Callable[[slice], QuantizedMatrix], parts: list[slice], place: torch.device, progress: Wrap, name: str
) -> QuantizedMatrix:
    """The matrix whose rows `work` quantizes, part by part, each with a single thread: sums never depend on threads."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads if place.type == "cpu" else 1, "alphaq", torch.set_num_threads, (1,))
    try:
        found = list(progress(pool.map(work, parts), len(parts), name))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # threads to come take after the last one set
    return QuantizedMatrix(
        found[0].choice,
        (sum(part.shape[0] for part in found), found[0].shape[1]),
        torch.cat([part.codes for part in found]),
        torch.cat([part.scales for part in found]),
        None if found[0].offsets is None else torch.cat([part.offsets for part in found]),
        math.fsum(part.squared_error or 0.0 for part in found),
    )


def _generator(seed: str, place: torch.device) -> torch.Generator:
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator(place).manual_seed(int.from_bytes(digest[:7], "little"))
