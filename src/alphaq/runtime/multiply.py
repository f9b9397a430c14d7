"""Multiply with packed matrices: one operator, kernels for each kind of device.

An operator of torch's, so that compilers keep it whole.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numba
import numpy as np
import torch
from torch import Tensor

from alphaq.runtime import kernels
from alphaq.runtime.packed import ADDRESS, BITS, FLAGS
from alphaq.runtime.threads import run_on_all
from alphaq.simd import flat
from alphaq.simd_codes import FEATURES

FEW_TOKENS = 32  # of one expert; more are multiplied with its restored matrix
RESTORED_BYTES = 16 << 20  # of a matrix at a time


@torch.library.custom_op("alphaq::packed_linear", mutates_args=())
def packed_linear(inputs: Tensor, table: Tensor, rows: int, experts: Tensor, tokens: Tensor) -> Tensor:
    """y[i] = W[experts[i]] · inputs[tokens[i]] for every projection, one after the other: [pairs, projections · rows].

    inputs: [tokens, columns], float32, bfloat16 or float16; the result has its type. table: int64
    [projections, experts, FIELDS] of `PackedWeights`, whose blocks must live on. experts, tokens: int64 [pairs]; an
    expert that the table does not have gives zeros.
    """
    if inputs.device.type == "cuda":
        from alphaq.runtime import triton_kernels

        return triton_kernels.packed_linear(inputs, table, rows, experts, tokens)
    return cpu_linear(inputs, table, rows, experts, tokens)


@packed_linear.register_fake
def _(inputs: Tensor, table: Tensor, rows: int, experts: Tensor, tokens: Tensor) -> Tensor:
    return inputs.new_empty(experts.shape[0], table.shape[0] * rows)


def cpu_linear(inputs: Tensor, table: Tensor, rows: int, experts: Tensor, tokens: Tensor) -> Tensor:
    """`packed_linear` on the CPU."""
    inputs, codings = inputs.contiguous(), table.numpy()
    wanted = experts.numpy()
    order = np.argsort(wanted, kind="stable")
    numbers, starts = np.unique(wanted[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    present = (numbers >= 0) & (numbers < len(codings[0]))
    few = present & (ends - starts <= FEW_TOKENS)
    out = torch.zeros(len(order), len(codings) * rows) if not present.all() else None
    if out is None:
        out = torch.empty(len(order), len(codings) * rows)
    mine = np.stack([tokens.numpy()[order], order])
    groups = list(zip(numbers.tolist(), starts.tolist(), ends.tolist(), strict=True))
    jobs = [
        (*codings[projection, expert].tolist(), projection * rows, start, end - start)
        for (expert, start, end), small in zip(groups, few, strict=True)
        if small
        for projection in range(len(codings))
    ]
    if jobs:
        _multiply(inputs, jobs, rows, mine, out)
    for (expert, start, end), many in zip(groups, present & ~few, strict=True):
        if many:
            chosen = torch.from_numpy(mine[:, start:end])
            _multiply_restored(inputs[chosen[0]], codings[:, expert], rows, out, chosen[1])
    return out.to(inputs.dtype)


def _multiply(inputs: Tensor, jobs: list[tuple[int, ...]], rows: int, pairs: np.ndarray, out: Tensor) -> None:
    """Multiply with codes. pairs: int64 [2, pairs], rows of inputs and of out."""
    tokens, columns = inputs.shape
    planes, padded = 3 if inputs.dtype == torch.float32 else 2, -(-columns // 512) * 512
    digits = np.zeros((planes, tokens, padded), np.int8)
    steps, sums = np.zeros((2, 3, tokens, padded // 32), np.float32)
    values = np.zeros((tokens, padded), np.float32)
    kernels.prepare(flat(inputs), tokens, columns, planes, kernels.LIMITS[planes - 1], digits, steps, sums, values)
    work = np.array(jobs, np.int64)
    request = np.zeros(kernels.REQUEST, np.int64)
    request[kernels.TASKS] = len(jobs) * -(-rows // kernels.TASK_ROWS)
    request[kernels.JOBS], request[kernels.PAIRS] = work.ctypes.data, pairs.ctypes.data
    request[kernels.PAIR_COUNT], request[kernels.TOKENS] = pairs.shape[1], tokens
    request[kernels.ROWS], request[kernels.COLUMNS], request[kernels.WIDTH] = rows, columns, out.shape[1]
    request[kernels.PLANES], request[kernels.DIGITS] = planes, digits.ctypes.data
    request[kernels.STEPS], request[kernels.SUMS] = steps.ctypes.data, sums.ctypes.data
    request[kernels.VALUES], request[kernels.OUT] = values.ctypes.data, out.data_ptr()
    run_on_all(_compiled("work"), request.ctypes.data)


def _multiply_restored(inputs: Tensor, codings: np.ndarray, rows: int, out: Tensor, places: Tensor) -> None:
    """Multiply many tokens with some rows of one expert's matrices at a time, restored."""
    columns = inputs.shape[1]
    brain = inputs.dtype == torch.bfloat16 and "avx512bf16" in FEATURES
    kind = torch.bfloat16 if brain else torch.float32
    inputs = inputs.to(kind)
    step = max(1, RESTORED_BYTES // (columns * kind.itemsize) // kernels.TASK_ROWS) * kernels.TASK_ROWS
    scratch = torch.empty(min(step, rows), columns, dtype=kind)
    for projection, coding in enumerate(codings):
        for first in range(0, rows, step):
            count = min(step, rows - first)
            part = scratch[:count]
            if coding[BITS] == 16:
                part = _kept(coding, first, count, columns).to(kind)
            else:
                _restore(coding, rows, columns, first, part)
            out[places, projection * rows + first : projection * rows + first + count] = (inputs @ part.T).float()


def _restore(coding: np.ndarray, rows: int, columns: int, first: int, part: Tensor) -> None:
    """Values of some rows of a block to `part`, bfloat16 or float32 [count, columns]; whole tasks, but for the end."""
    job = np.zeros(kernels.JOB, np.int64)
    job[: len(coding)] = coding
    job[kernels.JOB_FIRST] = first
    request = np.zeros(kernels.REQUEST, np.int64)
    request[kernels.TASKS] = -(-len(part) // kernels.TASK_ROWS)
    request[kernels.JOBS], request[kernels.ROWS], request[kernels.COLUMNS] = job.ctypes.data, rows, columns
    request[kernels.PLANES], request[kernels.OUT] = part.dtype == torch.bfloat16, part.data_ptr()
    run_on_all(_compiled("restore"), request.ctypes.data)


def _kept(coding: np.ndarray, first: int, count: int, columns: int) -> Tensor:
    """Rows of a matrix of 16 bits where it lies."""
    begin = int(coding[ADDRESS]) + 2 * first * columns
    held = np.ctypeslib.as_array((ctypes.c_int16 * (count * columns)).from_address(begin))
    kind = torch.float16 if coding[FLAGS] else torch.bfloat16
    return torch.from_numpy(held).view(kind).view(count, columns)


@lru_cache
def _compiled(name: str) -> int:
    """Address of a kernel that threads run, compiled for this machine."""
    options = {"error_model": "numpy", "boundscheck": False}
    function = getattr(kernels, name)
    try:
        return numba.cfunc(kernels.SIGNATURE, cache=True, **options)(function).address
    except RuntimeError:  # no folder to keep it in
        return numba.cfunc(kernels.SIGNATURE, **options)(function).address
