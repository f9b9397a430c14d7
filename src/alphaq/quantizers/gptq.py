"""GPTQ: columns are rounded one after the other, and each takes over the errors of those before it.

The layer's output moves by (W − Ŵ)·x, so with H the mean of x·xᵀ what counts is Σ (w − ŵ)·H·(w − ŵ)ᵀ over rows w. With
H = R·D·Rᵀ, R upper triangular with ones on its diagonal, this is a sum over columns of D[k]·((w − ŵ)·R)[k]²: the
column's own error and a part of earlier ones, which rounding can make up for,

    ŵ[k] = nearest level to w[k] + Σ over j < k of (w[j] − ŵ[j])·R[j, k].

This is what pushing errors through the Cholesky factor of H⁻¹ comes to, without an inverse. Columns with the largest
inputs come first. The levels are another quantizer's, found before: groups stay whole wherever their columns come.
Source: GPTQ (arXiv 2210.17323); the form above is that of QuIP (arXiv 2307.13304), which proves them equal.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from alphaq.errors import QuantizationError
from alphaq.formats.base import levels_of_bits
from alphaq.formats.blocks import encode, restored_error
from alphaq.formats.coding import encode_tensor
from alphaq.formats.levels import grid_of
from alphaq.formats.packing import pack
from alphaq.formats.table import format_of, rate_of
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.quantizers.factoring import factor_of, mixing_of
from alphaq.quantizers.moments import check_moments
from alphaq.quantizers.rated import quantize_rated
from alphaq.quantizers.trellis import quantize_trellis
from alphaq.quantizers.trellis_feedback import feed_back
from alphaq.simd.sums import in_threads, slices, squared_norm
from alphaq.simd.vectors import (
    LANES,
    fma,
    kernel,
    load,
    maximum,
    minimum,
    nearest,
    splat,
    store,
    store_bytes,
    where_less,
)

BLOCK = 128  # columns whose errors reach the later ones together
TASK_LANES = 8  # rows of a task, in vectors
RATE_TRIES, RATE_SLACK = 6, 0.004  # for coded bytes within so much of what they may be


def quantize_gptq(
    weight: torch.Tensor,
    choice: Choice,
    name: str = "matrix",
    hessian: torch.Tensor | None = None,
    found: QuantizedMatrix | None = None,
    coded: bool = False,
) -> QuantizedMatrix:
    """Quantize a [rows, columns] matrix whose inputs x have the second moments `hessian`, any multiple of E[x·xᵀ].

    hessian: float32 [columns, columns], or [columns] where only its diagonal is known; None or a diagonal leave
    nothing to make up for, so the levels nearest to the weights are kept. found: a quantized form whose levels are
    used; those of `quantize_debiased` otherwise. coded: the codes will be entropy-coded, and may take no more bytes
    then than those of `found`; so it is with every choice of a rate. Raises QuantizationError naming the matrix if it
    cannot be stored, or if the moments are not those of its inputs.
    """
    if format_of(choice).foreign:
        raise QuantizationError(f"{name}: {choice} is rounded by llama.cpp's own code. Give it an --imatrix instead.")
    if not (format_of(choice).one_grid or format_of(choice).streams):
        raise QuantizationError(
            f"{name}: the codes of {choice} do not lie on one grid. Use --quantizer debiased for it."
        )
    found = found or _nearest(weight, choice, name)
    if hessian is None or hessian.ndim == 1:
        return found
    check_moments(hessian, weight.shape[1], name)
    if not hessian.diagonal().any():
        return found
    if format_of(choice).streams:
        fed = feed_back(weight, found, hessian, name)
        return found if coded and _coded_bytes(fed) > _coded_bytes(found) else fed
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = factor_of(hessian, order, name)
    if coded or rate_of(choice):
        return _rounded_within_bytes(weight, name, hessian, found, factor, order)
    grid = grid_of(found)
    codes = _round_in_order(weight, grid.step, grid.start, choice, factor, order)
    matrix = replace(found, codes=torch.from_numpy(pack(codes, choice.bits)), squared_error=None)
    return replace(matrix, squared_error=restored_error(matrix, weight))


def _nearest(weight: torch.Tensor, choice: Choice, name: str) -> QuantizedMatrix:
    """What is improved on where nothing is given."""
    if format_of(choice).streams:
        return quantize_trellis(weight, choice, name)
    return (quantize_rated if rate_of(choice) else quantize_debiased)(weight, choice, name)


def _rounded_within_bytes(
    weight: torch.Tensor,
    name: str,
    hessian: torch.Tensor,
    found: QuantizedMatrix,
    factor: np.ndarray,
    order: torch.Tensor,
) -> QuantizedMatrix:
    """A matrix whose codes will be entropy-coded, in no more bytes than `found` takes; `found` if none are fewer.

    Coded bits grow by about Σŵ²/(2·ln 2·σ²) where weights have variance σ², so λ times the rate is μ·|ŵ|² (CERWU):
    (w − ŵ)·H·(w − ŵ)ᵀ + μ·|ŵ|² is least where GPTQ with H + μ rounds w·H·(H + μ)⁻¹. On the curve that the step Δ moves
    along, μ = mean D·Δ²/(12·σ²). Where a rate asks for one step it is widened, else μ raised, until the bytes fit. The
    one step is fitted to the codes at last.
    """
    choice, rate, limit, energy, parameters = (
        found.choice,
        rate_of(found.choice),
        _coded_bytes(found),
        squared_norm(weight),
        weight.numel(),
    )
    steps, start = grid_of(found).step, grid_of(found).start
    mean_square = float(steps.double().square().mean())
    if not mean_square > 0 or not energy > 0:
        return found
    natural = float(np.square(factor.diagonal(), dtype=np.float64).mean()) * mean_square * parameters / (12 * energy)
    best, most, wider, more = found, 0, 1.0, 1.0
    for _ in range(RATE_TRIES):
        mu = natural * wider * wider * more
        tilted = factor_of(hessian, order, name, mu)
        codes = _round_in_order(_shrunk(weight, tilted, mu, order), wider * steps, wider * start, choice, tilted, order)
        matrix = replace(found, codes=torch.from_numpy(pack(codes, choice.bits)), squared_error=None)
        nbytes = _coded_bytes(matrix)
        if most < nbytes <= limit:
            best, most = _fitted(matrix, weight, codes, hessian) if rate else matrix, nbytes
        if nbytes <= limit and (not rate or nbytes >= limit * (1 - RATE_SLACK)):
            break
        if rate:
            wider *= 2.0 ** (8 * (nbytes - limit * (1 - RATE_SLACK / 2)) / parameters)
        else:
            more *= 2
    return replace(best, squared_error=restored_error(best, weight))


def _coded_bytes(matrix: QuantizedMatrix) -> int:
    return encode_tensor(encode(matrix)).nbytes


def _shrunk(weight: torch.Tensor, factor: np.ndarray, mu: float, order: torch.Tensor) -> torch.Tensor:
    """w·H·(H + μ)⁻¹ = w − μ·w·(H + μ)⁻¹, float32 [rows, columns]; factor: that of H + μ."""
    from scipy.linalg import lapack  # here: few runs need it, and it takes half a second

    backwards = order.flip(0)
    wanted = weight.float()[:, backwards].numpy().T
    solved, _ = lapack.spotrs(factor.T, wanted, lower=0)
    shrunk = weight.float().clone()
    shrunk[:, backwards] -= mu * torch.from_numpy(np.ascontiguousarray(solved.T))
    return shrunk


def _fitted(matrix: QuantizedMatrix, weight: torch.Tensor, codes: np.ndarray, hessian: torch.Tensor) -> QuantizedMatrix:
    """The same codes with the one step of least (w − ŵ)·H·(w − ŵ)ᵀ."""
    levels = torch.from_numpy(codes).float() - levels_of_bits(matrix.choice.bits).zero
    weighed = levels @ hessian
    square = float((weighed * levels).sum(dtype=torch.float64))
    step = float((weighed * weight.float()).sum(dtype=torch.float64)) / square if square > 0 else 0.0
    scales = torch.full_like(matrix.scales, step)
    return replace(matrix, scales=scales) if step > 0 and torch.isfinite(scales[0, 0]) else matrix


def _round_in_order(
    weight: torch.Tensor,
    step: torch.Tensor,
    start: torch.Tensor,
    choice: Choice,
    factor: np.ndarray,
    order: torch.Tensor,
) -> np.ndarray:
    """Codes of levels step·q + start, uint8 [rows, columns]. Works on the transpose, its rows padded to vectors."""
    rows, columns = weight.shape
    width = -(-rows // LANES) * LANES
    wanted = torch.zeros(columns, width)
    wanted[:, :rows] = weight.T.float()[order]
    steps, starts = (torch.zeros(value.shape[1], width) for value in (step, start))
    steps[:, :rows], starts[:, :rows] = step.T, start.T
    group_of = (order // choice.group_size).numpy()
    codes = np.zeros((columns, width), np.uint8)
    misses = torch.empty(min(BLOCK, columns), width)
    carried = torch.zeros_like(wanted)
    for block in slices(columns, BLOCK):
        count = block.stop - block.start
        mixing = mixing_of(factor, block)
        own = np.ascontiguousarray(mixing[:, :count])

        def work(part: slice, block: slice = block, own: np.ndarray = own) -> None:
            round_columns(
                wanted.numpy()[block].reshape(-1),
                carried.numpy()[block].reshape(-1),
                own.reshape(-1),
                group_of[block],
                steps.numpy().reshape(-1),
                starts.numpy().reshape(-1),
                np.float32(2**choice.bits - 1),
                width,
                part.start,
                part.stop,
                codes[block].reshape(-1),
                misses.numpy().reshape(-1),
            )

        in_threads(work, slices(width, TASK_LANES * LANES))
        if block.stop < columns:
            carried[block.stop :].addmm_(torch.from_numpy(mixing[:, count:]).T, misses[:count])
    restored = np.empty((rows, columns), np.uint8)
    restored[:, order.numpy()] = codes[:, :rows].T
    return restored


@kernel
def round_columns(  # type: ignore[no-untyped-def]
    wanted, carried, mixing, group_of, steps, starts, top, width, first, end, codes, misses
):
    """Round a block of columns, of rows first to end (multiples of 16), each with the errors of those before it.

    wanted: float32 [columns · width], the transposed weights. carried: what earlier blocks' errors add. mixing: float32
    [columns · columns], R of the block. group_of: int64 [columns]. steps, starts: float32 [groups · width]. codes:
    uint8, misses (w − ŵ): float32, both [columns · width], are written.
    """
    count = group_of.size
    sums = np.empty(count * LANES, np.float32)
    none, ceiling = splat(np.float32(0)), splat(top)
    for row in range(first, end, LANES):
        for column in range(count):
            store(sums, column * LANES, load(wanted, column * width + row) + load(carried, column * width + row))
        for column in range(count):
            grid = group_of[column] * width + row
            step, start = load(steps, grid), load(starts, grid)
            inverse = where_less(none, step, splat(np.float32(1)) / step, none)
            code = minimum(maximum(nearest((load(sums, column * LANES) - start) * inverse), none), ceiling)
            miss = load(wanted, column * width + row) - fma(code, step, start)
            store_bytes(codes, column * width + row, code)
            store(misses, column * width + row, miss)
            for later in range(column + 1, count):
                share = splat(mixing[column * count + later])
                store(sums, later * LANES, fma(share, miss, load(sums, later * LANES)))
