"""What the budget allows: exact bytes of every choice, and what pins, bounds and the engine leave open."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from alphaq.allocation.problem import Problem
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec, entry_bytes
from alphaq.engines.export import Layout, kept_dtype
from alphaq.engines.gguf.profile import gaussian_errors
from alphaq.engines.profile import Profile
from alphaq.errors import BudgetError, ChoiceError
from alphaq.formats.table import format_of
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.settings import PlanConfig, Rule
from alphaq.planning.request import Request
from alphaq.sensitivity.methods import Evidence


def problem_of(checkpoint: Checkpoint | None, request: Request, evidence: Evidence | None = None) -> Problem:
    """What the budget allows, from shapes alone, and from `evidence` where a bound needs measured errors.

    Raises BudgetError if it is infeasible, a pin names nothing, or a unit is left without a choice.
    """
    config, choices, profile = request.config, request.choices, request.profile
    ladder = tuple(choices.index(choice) for choice in request.ladder if choice in request.offered)
    if checkpoint is None:
        assert evidence is not None  # stats are read before
        names = evidence.names
        counted = np.ones(len(names), np.int64) if config.unweighted else evidence.weights
        costs = counted[:, None] * np.array([choice.bits for choice in choices], dtype=np.int64)
        if config.budget.bits is None:
            raise BudgetError("Stats alone know no bytes. State the budget as --bits, or give MODEL.")
        if config.engine != "native" or config.pins or config.min_bits or config.max_bits or config.per_layer:
            raise BudgetError("--engine, pins, bounds and --per-layer need to know the matrices. Give MODEL.")
        limit = math.floor(config.budget.bits * int(counted.sum()) + 1e-9)
        problem = Problem(
            names,
            np.arange(len(names)),
            choices,
            costs,
            _clear_enough(config, evidence),
            limit,
            np.full(len(names), -1),
            ladder,
        )
        floor = int(problem.unit_costs.min(axis=1).sum())
        problem.check(str(config.budget), _least(problem, request, f"--bits {_up(floor / int(counted.sum()))}"))
        return problem

    experts = checkpoint.planned
    if request.method.kind == "expert" and checkpoint.planned_role is not Role.EXPERT:
        raise BudgetError(
            f"--method {config.method} weighs routed experts, and {checkpoint.name} has none. Use auto, for one."
        )
    fixed, joined = outside_experts(checkpoint, request)
    matrices = [*experts, *joined]
    allowed = allowed_choices(request, matrices)
    if evidence is not None:
        pinned = [any(rule.matches(matrix) for rule in config.pins) for matrix in experts]
        allowed[: len(experts)] &= _clear_enough(config, evidence) | np.array(pinned)[:, None]
        if joined and config.min_sqnr_db is not None:
            allowed[len(experts) :] &= gaussian_errors(choices) <= 10 ** (-config.min_sqnr_db / 10)
    units = [profile.unit_of(matrix) for matrix in matrices]
    # In the model's order, not the files': shards sort layer 10 before layer 2.
    names = tuple(dict.fromkeys(units[number] for number in sorted(range(len(units)), key=lambda n: matrices[n].place)))
    numbers = {name: number for number, name in enumerate(names)}
    owner = np.array([numbers[unit] for unit in units])
    layers = np.full(len(names), -1)
    for number, matrix in zip(owner, matrices, strict=True):
        layers[number] = -1 if matrix.layer is None else matrix.layer
    blocks, in_file = byte_tables(profile, matrices, choices)
    if evidence is not None and evidence.coded is not None:
        blocks, in_file = evidence.coded, coded_table(evidence)
    parameters = sum(matrix.parameters for matrix in matrices)
    fixed_bytes = 0
    if config.budget.bits is not None and config.unweighted:
        costs = np.tile(np.array([choice.bits for choice in choices], dtype=np.int64), (len(matrices), 1))
        limit = math.floor(config.budget.bits * len(matrices) + 1e-9)
    elif config.budget.bits is not None:
        costs, limit = blocks, nominal_bytes(request, matrices, config.budget.bits)
    elif config.budget.bpw is not None:
        costs, limit = blocks, math.floor(config.budget.bpw * parameters / 8 + 1e-9)
    else:
        assert config.budget.size_bytes is not None
        kept16 = {matrix.name: Choice(16) for matrix in matrices}
        if_kept = profile.writer.layout(checkpoint, fixed | kept16)
        kept = byte_tables(profile, matrices, (Choice(16),))[1][:, 0]
        if evidence is not None and evidence.coded is not None:
            fixed_bytes = evidence.rest_bytes
            if Choice(16) in choices:
                kept = in_file[:, choices.index(Choice(16))]
        elif profile.kept_bytes is None:
            fixed_bytes = if_kept.size_bytes - int(kept.sum())
        else:
            # Padding is counted for each matrix below, so none of it may be taken off here.
            uses, data = _entries_of(if_kept)
            fixed_bytes = if_kept.size_bytes - sum(data[matrix.name] for matrix in matrices)
            kept = np.array([profile.kept_bytes(checkpoint, matrix) for matrix in matrices])
            # A tied embedding is written twice where llama.cpp insists on it.
            times = np.array([1] * len(experts) + [uses[matrix.name] for matrix in joined])
            in_file, kept = in_file * times[:, None], kept * times
        if Choice(16) in choices:
            in_file[:, choices.index(Choice(16))] = kept
        costs, limit = in_file, config.budget.size_bytes - fixed_bytes
    problem = Problem(names, owner, choices, costs, allowed, limit, layers, ladder)
    floor = int(problem.unit_costs.min(axis=1).sum())
    if config.budget.size_bytes is not None:
        least = f"--size {floor + fixed_bytes}"
    elif config.budget.bpw is not None:
        least = f"--bpw {_up(8 * floor / parameters)}"
    elif config.unweighted:
        least = f"--bits {_up(floor / len(matrices))}"
    else:
        least = f"--bits {_up(_nominal_bits(request, matrices, floor))}"
    problem.check(str(config.budget), _least(problem, request, least, matrices))
    return problem


def _entries_of(layout: Layout) -> tuple[Counter[str], Counter[str]]:
    """How many entries each matrix or kept tensor has, and how many bytes of data in all."""
    uses, data = Counter[str](), Counter[str]()
    for entry in layout.entries:
        name = entry.source if isinstance(entry.source, str) else entry.source.name
        uses[name] += 1
        data[name] += sum(place.nbytes for place in entry.places)
    return uses, data


def _clear_enough(config: PlanConfig, evidence: Evidence) -> np.ndarray:
    """bool [matrices, choices]: no noisier than --min-sqnr allows."""
    most = math.inf if config.min_sqnr_db is None else 10 ** (-config.min_sqnr_db / 10)
    return evidence.relative_errors <= most


def _up(bits: float) -> str:
    return f"{math.ceil(bits * 1e4 - 1e-6) / 1e4:g}"


def _least(problem: Problem, request: Request, least: str, matrices: Sequence[MatrixRef] = ()) -> str:
    """The smallest feasible budget, the choices that matrices have in it, and the ways out."""
    config = request.config
    cheapest = [problem.choices[column] for column in problem.chosen(problem.unit_costs.argmin(axis=1))]
    counts = sorted(Counter(cheapest).items())
    narrowest = counts[0][0]
    why = next(
        (
            f" ({reason})"
            for matrix, choice in zip(matrices, cheapest, strict=False)
            if choice != narrowest and (reason := request.profile.obstacle(narrowest, matrix))
        ),
        "",
    )
    mix = " and ".join(f"{count:,} at {choice}" for choice, count in counts).replace(" at", " matrices at", 1)
    if len(counts) == 1:
        mix = f"all at {narrowest}"
    ways = ["Raise it"]
    if config.min_bits or config.pins or config.min_sqnr_db is not None:
        ways.append("relax pins and bounds")
    if _has_narrower(request, narrowest.bits):
        ways.append("allow narrower --choices")
    if why and request.method.by_widths:
        ways.append(f"use a method that mixes all types of {request.profile.name}, such as --method distortion")
    if narrowest.group_size in (32, 64) and format_of(narrowest).regroups:
        ways.append("use a larger --group-size")
    return f"{least} with {mix}{why}. {', or '.join(ways)}"


def _has_narrower(request: Request, bits: int) -> bool:
    """Whether the engine has a choice of fewer bits that the method would take."""
    if not request.method.by_widths:
        return any(choice.bits < bits for choice in request.profile.choices)
    for width in range(1, bits):
        with suppress(ChoiceError):
            return request.profile.with_bits(width).bits < bits
    return False


def allowed_choices(request: Request, matrices: Sequence[MatrixRef]) -> np.ndarray:
    """bool [matrices, choices] after offers, bounds, pins and what the engine can store.

    Raises BudgetError for a rule that names no matrix.
    """
    config, choices = request.config, request.choices
    allowed = np.tile([choice in request.offered for choice in choices], (len(matrices), 1))
    bits = np.array([choice.bits for choice in choices])
    for option, rules, keeps in (
        ("--min-bits", config.min_bits, lambda least: bits >= least),
        ("--max-bits", config.max_bits, lambda most: bits <= most),
    ):
        for rule in rules:
            allowed[_named(rule, option, matrices)] &= keeps(rule.number(option))
    for rule in config.pins:
        rows = [number for number, matrix in enumerate(matrices) if rule.matches(matrix)]
        allowed[rows] = [choice == request.choice(rule.value) for choice in choices]
    shapes: dict[Any, bool] = {}
    for number, matrix in enumerate(matrices):
        for column, choice in enumerate(choices):
            key = (matrix.shape, matrix.role, matrix.projection, choice)
            if key not in shapes:
                shapes[key] = request.profile.obstacle(choice, matrix) is None
            allowed[number, column] &= shapes[key]
    return allowed


def pinned(request: Request, matrix: MatrixRef) -> Choice | None:
    """What the last pin that names a matrix says."""
    named = [rule.value for rule in request.config.pins if rule.matches(matrix)]
    return request.choice(named[-1]) if named else None


def _named(rule: Rule, option: str, matrices: Sequence[MatrixRef]) -> list[int]:
    rows = [number for number, matrix in enumerate(matrices) if rule.matches(matrix)]
    if not rows:
        raise BudgetError(
            f"{option} {rule.pattern!r} names no matrix of the budget. Write a projection (down), a role (expert) or "
            f"a glob on names such as {matrices[0].name!r}."
        )
    return rows


def outside_experts(checkpoint: Checkpoint, request: Request) -> tuple[dict[str, Choice], list[MatrixRef]]:
    """Choices of matrices outside the experts that are fixed, by role or by a pin, and those that join the budget.

    Where the engine's usual width cannot be stored, the next wider one that can is taken. Raises BudgetError if one
    that was asked for cannot be, or for a pin that names nothing.
    """
    profile, asked = request.profile, request.config.roles()
    outside = profile.roles - {checkpoint.planned_role}
    quantizable = [matrix for matrix in checkpoint.matrices if matrix.role in outside]
    for role in (asked.keys() & profile.on_request) - {matrix.role for matrix in quantizable}:
        raise _stored_nowhere(checkpoint, role)
    wanted = {matrix.name: request.choice(str(asked[matrix.role])) for matrix in quantizable if matrix.role in asked}
    planned = checkpoint.planned
    for rule in request.config.pins:
        named = [matrix for matrix in quantizable if rule.matches(matrix)]
        if not named:
            _named(rule, "--pin", planned)
        wanted.update({matrix.name: request.choice(rule.value) for matrix in named})
    fixed, joined = {}, []
    for matrix in quantizable:
        choice = wanted.get(matrix.name)
        if choice is not None:
            if why := profile.obstacle(choice, matrix):
                raise BudgetError(
                    f"{profile.name} cannot store {matrix.name} as {choice}: {why}. Keep it with "
                    f"--pin '{matrix.name}=16', or drop the width asked for."
                )
            fixed[matrix.name] = choice
        elif matrix.role in profile.on_request:
            continue
        elif request.joint and any(profile.obstacle(offered, matrix) is None for offered in request.offered):
            joined.append(matrix)
        else:
            usual = request.choice(str(profile.role_bits[matrix.role]))
            fixed[matrix.name] = _storable(profile, usual, matrix)
    return fixed, joined


def _stored_nowhere(checkpoint: Checkpoint, role: Role) -> BudgetError:
    """What a user may do who named a width for a role that has no matrix of its own."""
    tied = {Role.HEAD: Role.EMBEDDING, Role.EMBEDDING: Role.HEAD}.get(role)
    if tied is None or not checkpoint.with_role(tied):
        return BudgetError(f"{checkpoint.name} stores no {role.value}. Drop --{role.value}-bits.")
    return BudgetError(
        f"{checkpoint.name} stores no {role.value} of its own: it is tied to the {tied.value}. Use "
        f"--{tied.value}-bits, which is for both, in place of --{role.value}-bits."
    )


def byte_tables(
    profile: Profile, matrices: Sequence[MatrixRef], choices: tuple[Choice, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of each matrix at each choice, int64 [matrices, choices]: its data alone, and what it adds to the files.

    A choice that a matrix cannot take (see `Profile.obstacle`) is never chosen; it is counted as the next
    wider one that it can.
    """
    known: dict[Any, tuple[int, int]] = {}
    table = np.empty((len(matrices), len(choices), 2), np.int64)
    for number, matrix in enumerate(matrices):
        # A header entry depends on the name's length; that of a stack is counted with its first matrix.
        place = (matrix.role, matrix.projection, matrix.expert in (0, None))
        kind = (matrix.shape, matrix.dtype, len(json.dumps(matrix.name)), place)
        for column, choice in enumerate(choices):
            if (kind, choice) not in known:
                stored = _storable(profile, choice, matrix)
                known[kind, choice] = profile.storage_bytes(stored, matrix.shape), profile.file_bytes(matrix, stored)
            table[number, column] = known[kind, choice]
    return table[:, :, 0], table[:, :, 1]


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


def _storable(profile: Profile, choice: Choice, matrix: MatrixRef) -> Choice:
    """The choice itself, or the smallest of at least its bits that the engine can store the matrix in."""
    if profile.obstacle(choice, matrix) is None:
        return choice
    wider = [other for other in profile.choices if other.bits >= choice.bits and not profile.obstacle(other, matrix)]
    return min(wider, key=lambda other: profile.storage_bytes(other, matrix.shape))


def nominal_bytes(request: Request, matrices: Sequence[MatrixRef], bits: float) -> int:
    """Bytes of the experts at `bits` on average in plain choices: what a uniform mix of the engine's widths takes.

    Raises BudgetError if the engine has no plain choice that narrow.
    """
    rungs = sorted(request.ladder, key=lambda choice: choice.bits)
    if not rungs or bits < rungs[0].bits:
        least = rungs[0].bits if rungs else 16
        raise BudgetError(
            f"A budget of {bits:g} bits is below --bits {least}, the narrowest usual width of {request.profile.name}. "
            f"Raise it, or state the bytes with --size or --bpw."
        )
    low = max((choice for choice in rungs if choice.bits <= bits), key=lambda choice: choice.bits)
    high = min((choice for choice in rungs if choice.bits >= bits), key=lambda choice: choice.bits, default=low)
    share = 0.0 if high == low else (bits - low.bits) / (high.bits - low.bits)
    table, _ = byte_tables(request.profile, matrices, (low, high))
    totals = table.sum(axis=0)
    return math.floor((1 - share) * int(totals[0]) + share * int(totals[1]) + 1e-6)


def _nominal_bits(request: Request, matrices: Sequence[MatrixRef], nbytes: int) -> float:
    """The inverse of `nominal_bytes`: bits per weight of the plain mix that takes so many bytes."""
    rungs = sorted(request.ladder, key=lambda choice: choice.bits)
    totals = byte_tables(request.profile, matrices, tuple(rungs))[0].sum(axis=0)
    return float(np.interp(nbytes, totals, [choice.bits for choice in rungs]))


def size_bytes(checkpoint: Checkpoint, request: Request, chosen: dict[str, Choice]) -> int:
    """Bytes of all weight files, headers included."""
    fixed, _ = outside_experts(checkpoint, request)
    return request.profile.writer.layout(checkpoint, fixed | chosen).size_bytes


def plain_size(checkpoint: Checkpoint, request: Request, bits: float) -> int:
    """`--size` that holds a plain mix of `bits` on average exactly: what all methods get when they are compared."""
    matrices = checkpoint.planned
    kept = {matrix.name: Choice(16) for matrix in matrices}
    data, _ = byte_tables(request.profile, matrices, (Choice(16),))
    return size_bytes(checkpoint, request, kept) - int(data.sum()) + nominal_bytes(request, matrices, bits)
