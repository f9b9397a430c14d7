"""Exact bytes of every matrix at every choice, and what a budget of each kind makes of them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec, entry_bytes
from alphaq.engines.export import Layout, kept_dtype
from alphaq.engines.profile import Profile
from alphaq.errors import BudgetError, TooSmallError
from alphaq.formats.table import code_bits
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.planning.request import Request
from alphaq.planning.scope import Scope, next_storable
from alphaq.sensitivity.base import Evidence

ROUNDING = 1e-15  # more than bits per weight lose, relative, that were computed from whole bytes


@dataclass(frozen=True)
class Costs:
    """What may be spent and on what, in the budget's own unit.

    table: int64 [matrices, choices]. stated: how a user writes a total of that unit as a budget.
    """

    table: np.ndarray
    limit: int
    stated: Callable[[int], str]


def costs_of(scope: Scope, evidence: Evidence | None) -> Costs:
    """What the matrices of a scope cost under its budget; coded bytes are those that were measured."""
    config = scope.request.config
    if config.budget.size_bytes is not None:
        return _by_size(scope, evidence, config.budget.size_bytes)
    if config.budget.bits is not None and config.unweighted:
        return by_count(scope.request.choices, np.ones(len(scope.matrices), np.int64), config.budget.bits)
    blocks = data_table(scope, evidence)
    if config.budget.bpw is not None:
        return _by_stored_bits(scope, blocks, config.budget.bpw)
    assert config.budget.bits is not None  # a budget has one unit
    return _by_nominal_bits(scope, blocks, config.budget.bits)


def by_count(choices: Sequence[Choice], counts: np.ndarray, bits: float) -> Costs:
    """Code bits of matrices that count so often each, int64 [matrices].

    Raises BudgetError for choices of no whole number of bits.
    """
    if broken := [choice for choice in choices if code_bits(choice) != choice.bits]:
        raise BudgetError(
            f"This budget counts whole bits of codes, and {broken[0]} has a fraction. Leave it out of --choices, or "
            "plan by bytes: with MODEL and without --unweighted."
        )
    table = counts[:, None] * np.array([choice.bits for choice in choices], dtype=np.int64)
    total = int(counts.sum())
    return Costs(table, math.floor(bits * total + 1e-9), lambda spent: f"--bits {rounded_up(spent / total)}")


def bytes_at(bpw: float, parameters: int) -> int:
    """Whole bytes of so many weights at `bpw` bits each; if those were computed from whole bytes, these."""
    return math.floor(bpw * parameters / 8 * (1 + ROUNDING) + 1e-9)


def _by_stored_bits(scope: Scope, blocks: np.ndarray, bpw: float) -> Costs:
    parameters = sum(matrix.parameters for matrix in scope.matrices)
    limit = bytes_at(bpw, parameters)
    return Costs(blocks, limit, lambda nbytes: f"--bpw {rounded_up(8 * nbytes / parameters)}")


def _by_nominal_bits(scope: Scope, blocks: np.ndarray, bits: float) -> Costs:
    request, matrices = scope.request, scope.matrices
    limit = nominal_bytes(request, matrices, bits)
    return Costs(blocks, limit, lambda nbytes: f"--bits {rounded_up(_nominal_bits(request, matrices, nbytes))}")


def _by_size(scope: Scope, evidence: Evidence | None, limit: int) -> Costs:
    """What each matrix adds to the files, and what is left of the limit beside everything else in them."""
    if evidence is not None and evidence.coded is not None:
        table, rest = coded_table(evidence), evidence.rest_bytes
    else:
        table, rest = _file_table(scope)
    return Costs(table, limit - rest, lambda nbytes: f"--size {nbytes + rest}")


def _file_table(scope: Scope) -> tuple[np.ndarray, int]:
    """Bytes that each matrix adds to the files, int64 [matrices, choices], and those of all else."""
    request, profile, matrices = scope.request, scope.request.profile, scope.matrices
    table = file_table(scope.checkpoint, profile, matrices, request.choices)
    if_kept = profile.writer.layout(scope.checkpoint, {**scope.fixed, **{one.name: Choice(16) for one in matrices}})
    if profile.kept_bytes is None:  # of engines whose files are not split
        return table, if_kept.size_bytes - int(file_table(scope.checkpoint, profile, matrices, (Choice(16),)).sum())
    # Padding is counted for each matrix, so none of it may be taken off the rest.
    uses, data = _entries_of(if_kept)
    kept = np.array([profile.kept_bytes(scope.checkpoint, matrix) for matrix in matrices])
    # A tied embedding is written twice where llama.cpp insists on it.
    times = np.array([1] * len(scope.planned) + [uses[matrix.name] for matrix in scope.joined])
    table = table * times[:, None]
    if Choice(16) in request.choices:
        table[:, request.choices.index(Choice(16))] = kept * times
    rest = if_kept.size_bytes - sum(data[matrix.name] for matrix in matrices)
    return table, rest + spare_bytes(scope, if_kept, rest + int(table.max(axis=1).sum()))


def spare_bytes(scope: Scope, whole: Layout, most: int) -> int:
    """What splitting files of up to `most` bytes may add to them, whatever is chosen; 0 where they are not split.

    Of two neighbouring parts, the second begins with what the first had no room for.
    """
    split_bytes, added = scope.request.config.split_bytes, scope.request.profile.part_bytes
    if split_bytes is None:
        return 0
    tensors = len({tensor for entry in whole.entries for tensor, _ in entry.parts})
    if split_bytes <= 2 * added:
        return tensors * added
    return min(tensors, math.ceil((2 * most + split_bytes) / (split_bytes - 2 * added))) * added


def _entries_of(layout: Layout) -> tuple[Counter[str], Counter[str]]:
    """How many entries each matrix or kept tensor has, and how many bytes of data in all."""
    uses, data = Counter[str](), Counter[str]()
    for entry in layout.entries:
        name = entry.source if isinstance(entry.source, str) else entry.source.name
        uses[name] += 1
        data[name] += sum(place.nbytes for place in entry.places)
    return uses, data


def rounded_up(bits: float) -> str:
    """Bits as a user may write them, so that nothing less is meant."""
    return f"{math.ceil(bits * 1e4 - 1e-6) / 1e4:g}"


def data_table(scope: Scope, evidence: Evidence | None) -> np.ndarray:
    """Bytes of each matrix' data at each choice, int64 [matrices, choices]: coded ones where those were measured."""
    if evidence is not None and evidence.coded is not None:
        return evidence.coded
    return byte_table(scope.request.profile, scope.matrices, scope.request.choices)


def byte_table(profile: Profile, matrices: Sequence[MatrixRef], choices: tuple[Choice, ...]) -> np.ndarray:
    """Bytes of each matrix' data at each choice, int64 [matrices, choices].

    A choice that a matrix cannot take (see `Profile.obstacle`) is never chosen; it is counted as the next
    wider one that it can.
    """
    return _table(profile, matrices, choices, lambda matrix, choice: profile.storage_bytes(choice, matrix.shape))


def file_table(
    checkpoint: Checkpoint, profile: Profile, matrices: Sequence[MatrixRef], choices: tuple[Choice, ...]
) -> np.ndarray:
    """The same of what each matrix adds to the files."""
    return _table(profile, matrices, choices, partial(profile.file_bytes, checkpoint))


def _table(
    profile: Profile,
    matrices: Sequence[MatrixRef],
    choices: tuple[Choice, ...],
    nbytes: Callable[[MatrixRef, Choice], int],
) -> np.ndarray:
    known: dict[tuple[object, ...], int] = {}
    table = np.empty((len(matrices), len(choices)), np.int64)
    for number, matrix in enumerate(matrices):
        # A header entry depends on the name's length; that of a stack is counted with its first matrix.
        place = (matrix.role, matrix.projection, matrix.expert in (0, None))
        kind = (matrix.shape, matrix.dtype, len(json.dumps(matrix.name)), place)
        for column, choice in enumerate(choices):
            if (kind, choice) not in known:
                known[kind, choice] = nbytes(matrix, next_storable(profile, choice, matrix))
            table[number, column] = known[kind, choice]
    return table


def coded_table(evidence: Evidence) -> np.ndarray:
    """What each matrix adds to entropy-coded files at each choice, header entry included, int64 [matrices, choices]."""
    assert evidence.coded is not None  # the caller knows
    table = evidence.coded.copy()
    for number, matrix in enumerate(evidence.matrices):
        for column, choice in enumerate(evidence.choices):
            nbytes = int(table[number, column])
            uncoded = choice.kept and nbytes == 2 * matrix.parameters
            spec = TensorSpec(kept_dtype(matrix.dtype), matrix.shape) if uncoded else TensorSpec("U8", (nbytes,))
            table[number, column] += entry_bytes(matrix.name, spec)
    return table


def nominal_bytes(request: Request, matrices: Sequence[MatrixRef], bits: float) -> int:
    """Bytes of the experts at `bits` on average in plain choices: what a uniform mix of the engine's widths takes.

    Where experts may be dropped, bits below the narrowest width mean that part of its bytes. Raises TooSmallError if
    the engine has no plain choice that narrow.
    """
    rungs = sorted(request.ladder, key=lambda choice: choice.bits)
    if rungs and bits < rungs[0].bits and request.config.drop:
        narrowest = int(byte_table(request.profile, matrices, (rungs[0],)).sum())
        return math.floor(narrowest * bits / rungs[0].bits + 1e-6)
    if not rungs or bits < rungs[0].bits:
        least = rungs[0].bits if rungs else 16
        raise TooSmallError(
            f"A budget of {bits:g} bits is below --bits {least}, the narrowest usual width of {request.profile.name}. "
            f"Raise it, or state the bytes with --size or --bpw."
        )
    low = max((choice for choice in rungs if choice.bits <= bits), key=lambda choice: choice.bits)
    high = min((choice for choice in rungs if choice.bits >= bits), key=lambda choice: choice.bits, default=low)
    share = 0.0 if high == low else (bits - low.bits) / (high.bits - low.bits)
    table = byte_table(request.profile, matrices, (low, high))
    totals = table.sum(axis=0)
    return math.floor((1 - share) * int(totals[0]) + share * int(totals[1]) + 1e-6)


def _nominal_bits(request: Request, matrices: Sequence[MatrixRef], nbytes: int) -> float:
    """The inverse of `nominal_bytes`: bits per weight of the plain mix that takes so many bytes."""
    rungs = sorted(request.ladder, key=lambda choice: choice.bits)
    totals = byte_table(request.profile, matrices, tuple(rungs)).sum(axis=0)
    return float(np.interp(nbytes, totals, [choice.bits for choice in rungs]))


def plain_size(checkpoint: Checkpoint, request: Request, bits: float) -> int:
    """`--size` that holds a plain mix of `bits` on average exactly: what all methods get when they are compared."""
    scope = Scope.of(checkpoint, request)
    kept = {**scope.fixed, **{matrix.name: Choice(16) for matrix in scope.planned}}
    if_kept = request.profile.writer.layout(checkpoint, kept)
    kept_bytes = if_kept.size_bytes + spare_bytes(scope, if_kept, if_kept.size_bytes)
    data = byte_table(request.profile, scope.planned, (Choice(16),))
    return kept_bytes - int(data.sum()) + nominal_bytes(request, scope.planned, bits)
