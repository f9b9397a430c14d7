"""Sums and loops whose results do not depend on how many threads there are: the same checkpoint, the same plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch

from alphaq.simd.vectors import LANES, flat, fma, kernel, lane_sum, load, load_some, splat

S = TypeVar("S")
T = TypeVar("T")

VALUES_AT_ONCE = 1 << 20
SAFE_SQUARES = (1e-30, float(np.finfo(np.float32).max))  # means and sums of squares that float32 is sure to hold
PART_VALUES = 1 << 17  # what one thread works on at a time: half a mebibyte of float32, inside its cache


def sums(values: torch.Tensor) -> tuple[float, float]:
    """Σ v and Σ v² of a float tensor of any shape, accumulated in float64."""
    source = flat(values.contiguous())
    parts = slices(len(source), VALUES_AT_ONCE)
    total, squares = _added(in_threads(lambda part: _sums(source[part]), parts))
    if SAFE_SQUARES[0] * len(source) <= squares <= SAFE_SQUARES[1]:
        return total, squares
    flattened = values.reshape(-1)  # squares that float32 cannot hold, of weights below 1e-15 or beyond 1e19
    return _added(in_threads(lambda part: _wide_sums(flattened[part]), parts))


def _added(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    total, squares = (math.fsum(column) for column in zip(*parts, strict=True)) if parts else (0.0, 0.0)
    return total, squares


def _wide_sums(values: torch.Tensor) -> tuple[float, float]:
    wide = values.double().numpy()
    with np.errstate(invalid="ignore"):  # NaN and infinity are the caller's to refuse
        return float(wide.sum()), float((wide * wide).sum())


def squared_norm(values: torch.Tensor) -> float:
    """Σ v² of a float tensor of any shape, in float64."""
    return sums(values)[1]


def squared_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Σ (a − b)² of two float tensors of one shape, in float64."""
    a, b = flat(first.contiguous()), flat(second.contiguous())
    parts = slices(len(a), VALUES_AT_ONCE)
    total = math.fsum(in_threads(lambda part: _squared_distance(a[part], b[part]), parts))
    if SAFE_SQUARES[0] * len(a) <= total <= SAFE_SQUARES[1] or (total == 0 and not (first != second).any()):
        return total
    one, other = first.reshape(-1), second.reshape(-1)
    return _added(in_threads(lambda part: _wide_sums(one[part].double() - other[part].double()), parts))[1]


def squares_by_row(values: torch.Tensor, worth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Σⱼ worth[j]·v² and Σⱼ v² of each row of [rows, columns], float64 [rows]. worth: float32 [columns]."""
    rows, columns = values.shape
    source, found = flat(values.contiguous()), np.empty((2, rows))

    def work(part: slice) -> None:
        _squares_by_row(source[part.start * columns : part.stop * columns], worth, found[0][part], found[1][part])

    in_threads(work, row_parts(rows, columns))
    return found[0], found[1]


@kernel
def _squares_by_row(values, worth, counted, plain):  # type: ignore[no-untyped-def]
    columns = worth.size
    whole = columns // LANES * LANES
    for row in range(plain.size):
        own = values[row * columns : (row + 1) * columns]
        rest = load_some(own, whole)
        rest = rest * rest
        counted[row], plain[row] = lane_sum(rest * load_some(worth, whole)), lane_sum(rest)
        for begin in range(0, whole, 16 * LANES):
            first, second = splat(np.float32(0)), splat(np.float32(0))
            for at in range(begin, min(begin + 16 * LANES, whole), LANES):
                square = load(own, at) * load(own, at)
                first, second = fma(square, load(worth, at), first), second + square
            counted[row] += lane_sum(first)
            plain[row] += lane_sum(second)


@kernel
def _sums(values):  # type: ignore[no-untyped-def]
    """Σ v and Σ v² in runs of 256, added up in float64."""
    whole = values.size // LANES * LANES
    rest = load_some(values, whole)
    total, squares = lane_sum(rest) * 1.0, lane_sum(rest * rest) * 1.0
    for begin in range(0, whole, 16 * LANES):
        first, second = splat(np.float32(0)), splat(np.float32(0))
        for at in range(begin, min(begin + 16 * LANES, whole), LANES):
            value = load(values, at)
            first = first + value
            second = fma(value, value, second)
        total += lane_sum(first)
        squares += lane_sum(second)
    return total, squares


@kernel
def _squared_distance(first, second):  # type: ignore[no-untyped-def]
    whole = first.size // LANES * LANES
    miss = load_some(first, whole) - load_some(second, whole)
    total = lane_sum(miss * miss) * 1.0
    for begin in range(0, whole, 16 * LANES):
        part = splat(np.float32(0))
        for at in range(begin, min(begin + 16 * LANES, whole), LANES):
            miss = load(first, at) - load(second, at)
            part = fma(miss, miss, part)
        total += lane_sum(part)
    return total


def slices(count: int, step: int) -> list[slice]:
    """[0, count) cut every `step`."""
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def row_parts(rows: int, columns: int) -> list[slice]:
    """Slices of whole rows, of a size that does not depend on the number of threads."""
    return slices(rows, max(1, PART_VALUES // max(1, columns)))


def in_threads(work: Callable[[S], T], parts: Sequence[S]) -> list[T]:
    """[work(part) for part in parts], on as many threads as torch uses; for work that releases the lock."""
    threads = min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        return [work(part) for part in parts]
    results: dict[int, T] = {}
    numbers = iter(range(len(parts)))

    def take() -> None:
        for number in numbers:  # shared: each number goes to one thread
            results[number] = work(parts[number])

    helpers = [_threads(threads - 1).submit(take) for _ in range(threads - 1)]
    take()
    for helper in helpers:
        if not helper.cancel():  # one that has not begun by now has nothing left to take
            helper.result()
    return [results[number] for number in range(len(parts))]


@lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="alphaq")
