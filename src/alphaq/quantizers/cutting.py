"""From wide nested codes to narrow ones by their bits alone, without the values that they stand for.

Levels of nested codes are odd halves of a step, so everything that the narrow codes' scale is fitted to, and their
error, are sums of whole numbers: the top bits are kept, and a group's numbers added up, at the speed of memory.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from alphaq.checkpoint.reader import Checkpoint
from alphaq.formats.blocks import decode, is_block
from alphaq.formats.coding import decode_tensor
from alphaq.formats.table import format_of
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.base import DEFAULT
from alphaq.quantizers.debiased import BIAS_WEIGHT
from alphaq.quantizers.nested_kernels import cut_rows
from alphaq.simd.sums import in_threads, slices

PART_CODES = 1 << 20  # what one thread works on at a time
CUTS = DEFAULT  # the quantizer whose scales these are


def held_form(checkpoint: Checkpoint, matrix: MatrixRef) -> QuantizedMatrix | None:
    """The codes of a matrix, where the checkpoint is a native one that holds them; else None.

    Raises CheckpointError naming the tensor if it is damaged.
    """
    stored = checkpoint.stored(matrix)
    if stored is None:
        return None
    block = decode_tensor(stored, matrix.name)
    return decode(block, matrix.name) if is_block(block) else None


def can_cut(held: Choice, choice: Choice) -> bool:
    """Whether codes of one choice hold those of another: the same, or the top bits of nested ones."""
    return choice == held or choice in format_of(held).narrower(held)


def cut(held: QuantizedMatrix, choice: Choice) -> tuple[QuantizedMatrix, float]:
    """A matrix at a choice that its own codes hold (`can_cut`), and Σŵ² of what it stood for before.

    The squared error of the result is the distance from that. Where nothing is cut, both are 0.
    """
    if choice == held.choice:
        return replace(held, squared_error=0.0), 0.0
    rows, columns = held.shape
    parts = slices(rows, max(1, PART_CODES // columns))
    width, groups = choice.bits, choice.groups(columns)
    packed = np.zeros((rows, choice.row_bytes(columns)), np.uint8)
    scales, energies = np.empty((rows, groups), np.float32), np.empty((len(parts), 1))
    codes, steps = held.codes.numpy(), held.scales.float().numpy()

    def work(number: int) -> float:
        part = parts[number]
        return cut_rows(
            codes[part].reshape(-1),
            columns,
            held.choice.bits,
            choice.group_size,
            steps[part].reshape(-1),
            width,
            np.float32(BIAS_WEIGHT),
            packed[part].reshape(-1),
            scales[part].reshape(-1),
            energies[number],
        )

    error = math.fsum(in_threads(work, range(len(parts))))
    made = torch.from_numpy(packed), torch.from_numpy(scales.astype(np.float16))
    return QuantizedMatrix(choice, held.shape, *made, None, max(error, 0.0)), float(energies.sum())
