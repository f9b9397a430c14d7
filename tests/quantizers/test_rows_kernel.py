"""Kernels made of a common loop and a part of their own."""

from __future__ import annotations

from typing import Any

from alphaq.simd.vectors import kernel, kernel_over


def part(value: Any) -> Any:
    """What each of the kernels below has another one for."""
    raise NotImplementedError


def total(values: Any) -> Any:
    found = 0
    for value in values:
        found += part(value)
    return found


def doubled(value: Any) -> Any:
    return 2 * value


def squared(value: Any) -> Any:
    return value * value


def test_kernels_over_one_loop_are_compiled_and_kept_apart() -> None:
    double, square = (kernel_over(total, part=kernel(own)) for own in (doubled, squared))
    assert (double((1, 2, 3)), square((1, 2, 3))) == (12, 14)
    names = [found.py_func.__qualname__ for found in (double, square)]
    assert names[0] != names[1] and all(name.startswith("total_") for name in names)  # code is kept by these names
