"""What a request decides of a checkpoint, resolved once: what is planned, joined, fixed, and must share a choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.export import Layout
from alphaq.engines.profile import Profile
from alphaq.errors import BudgetError, PlanError
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.settings import Rule
from alphaq.planning.request import Request

KEPT = Choice(16)


@dataclass(frozen=True)
class Units:
    """What must share a choice, in the model's order. owner: int [matrices], the unit of each. layers: int [units], −1
    outside layers."""

    names: tuple[str, ...]
    owner: np.ndarray
    layers: np.ndarray

    @classmethod
    def of(cls, profile: Profile, matrices: Sequence[MatrixRef]) -> Units:
        """The units that matrices make up in an engine."""
        of_matrix = [profile.unit_of(matrix) for matrix in matrices]
        # In the model's order, not the files': shards sort layer 10 before layer 2.
        in_order = sorted(range(len(matrices)), key=lambda number: matrices[number].place)
        names = tuple(dict.fromkeys(of_matrix[number] for number in in_order))
        numbers = {name: number for number, name in enumerate(names)}
        owner = np.array([numbers[unit] for unit in of_matrix])
        layers = np.full(len(names), -1)
        for number, matrix in zip(owner, matrices, strict=True):
            layers[number] = -1 if matrix.layer is None else matrix.layer
        return cls(names, owner, layers)


@dataclass(frozen=True, eq=False)
class Scope:
    """Every matrix that a plan says something of.

    planned: those that methods weigh, the routed experts or, without any, the MLPs. joined: of other roles, whose
    choices share the budget. fixed: choices of all others that are quantized, by name. pinned: what the last pin that
    names a planned matrix says, by its name.
    """

    checkpoint: Checkpoint
    request: Request
    planned: Sequence[MatrixRef]
    joined: Sequence[MatrixRef]
    fixed: Mapping[str, Choice]
    pinned: Mapping[str, Choice]

    @classmethod
    def of(cls, checkpoint: Checkpoint, request: Request) -> Scope:
        """Raises BudgetError for a width that was asked for and cannot be stored, a pin that names nothing, and pins or
        widths that do not agree about what is run as one; PlanError for a model that the engine cannot take."""
        profile, planned = request.profile, checkpoint.planned
        profile.check_layers(checkpoint)
        if checkpoint.plain and not profile.writer.from_gguf:
            raise PlanError(
                f"{checkpoint.name} is a GGUF file of the architecture {checkpoint.architecture.name!r}, which is "
                f"known by the names of its tensors alone, so {profile.name} cannot take it. Start from the Hugging "
                "Face folder."
            )
        if not planned:
            raise PlanError(f"{checkpoint.name} has no matrix of experts or of an MLP that could be quantized.")
        others = profile.roles - {checkpoint.planned_role}
        outside = [matrix for matrix in checkpoint.matrices if matrix.role in others]
        pins = _pins(request, planned, outside)
        asked_of = _asked(checkpoint, request, outside, pins)
        fixed, joined = {}, []
        for matrix in outside:
            asked, kept = asked_of.get(matrix.name), profile.keeps(checkpoint, matrix) is not None
            if asked is not None and (asked.firm or not kept):
                fixed[matrix.name] = _as_asked(profile, checkpoint, asked.choice, matrix)
            elif kept:
                fixed[matrix.name] = KEPT
            elif request.joint and any(profile.obstacle(offered, matrix) is None for offered in request.offered):
                joined.append(matrix)
            elif matrix.role not in profile.on_request:
                usual = request.of_width(profile.role_bits[matrix.role])
                own = stored_as(profile, checkpoint, matrix)
                narrow = own if own is not None and own.bits <= usual.bits else None
                fixed[matrix.name] = narrow or next_storable(profile, usual, matrix, request.config.fast)
        _require_agreement(profile, outside, fixed)
        pinned = {matrix.name: pins[matrix.name] for matrix in planned if matrix.name in pins}
        return cls(checkpoint, request, planned, joined, fixed, pinned)

    @cached_property
    def matrices(self) -> list[MatrixRef]:
        """Those that the budget decides on: the planned ones, then the joined ones."""
        return [*self.planned, *self.joined]

    @cached_property
    def units(self) -> Units:
        """Of `matrices`."""
        return Units.of(self.request.profile, self.matrices)

    def members(self) -> dict[str, list[MatrixRef]]:
        """The planned matrices by the unit that they belong to."""
        members: dict[str, list[MatrixRef]] = {}
        for matrix in self.planned:
            members.setdefault(self.request.profile.unit_of(matrix), []).append(matrix)
        return members

    def storable(self, matrix: MatrixRef) -> frozenset[Choice]:
        """Choices of the request that the engine can store a matrix in."""
        kind = (matrix.shape, matrix.role, matrix.projection)
        if kind not in self._storable:
            obstacle = self.request.profile.obstacle
            self._storable[kind] = frozenset(one for one in self.request.choices if obstacle(one, matrix) is None)
        return self._storable[kind]

    def stored_as(self, matrix: MatrixRef) -> Choice | None:
        """The choice that a GGUF file has for a matrix already: its bytes are copied, and nothing is lost."""
        return stored_as(self.request.profile, self.checkpoint, matrix)

    def open_to(self, matrix: MatrixRef) -> frozenset[Choice]:
        """What a matrix may take, bounds aside: its pin, or what is offered, as far as the engine can store it."""
        kind = self.storable(matrix), self.pinned.get(matrix.name)
        if kind not in self._open:  # most are alike, and there may be 70,000 matrices
            storable, pin = kind
            self._open[kind] = storable & (self.request.offered if pin is None else {pin})
        return self._open[kind]

    def layout(self, choices: Mapping[str, Choice]) -> Layout:
        """All weight files, with matrices at these choices."""
        writer, split_bytes = self.request.profile.writer, self.request.config.split_bytes
        return writer.laid_out(self.checkpoint, {**self.fixed, **choices}, split_bytes)

    def size_bytes(self, choices: Mapping[str, Choice]) -> int:
        """Bytes of all weight files, headers included, with matrices at these choices."""
        return self.layout(choices).size_bytes

    @cached_property
    def _storable(self) -> dict[tuple[object, ...], frozenset[Choice]]:
        return {}

    @cached_property
    def _open(self) -> dict[tuple[frozenset[Choice], Choice | None], frozenset[Choice]]:
        return {}


def stored_as(profile: Profile, checkpoint: Checkpoint, matrix: MatrixRef) -> Choice | None:
    """The choice of an engine that a GGUF file has for a matrix already; None where it is copied to no such file."""
    if checkpoint.gguf is None or not profile.writer.from_gguf:
        return None
    own = checkpoint.gguf_tensor(matrix.tensor).type
    return next((choice for choice in profile.choices if str(choice) == own), None)


@dataclass(frozen=True)
class _Asked:
    """A choice that a user asked for. firm: whether what the engine must have in 16 bits is refused it, not kept."""

    choice: Choice
    firm: bool


def _asked(
    checkpoint: Checkpoint, request: Request, outside: Sequence[MatrixRef], pins: Mapping[str, Choice]
) -> dict[str, _Asked]:
    """What a user asked for, by the name of each matrix: by a pin for itself or for what the engine runs with it, else
    by a width for the role of either. A width of a role with many matrices is for those that can take it."""
    unit_of, firm = request.profile.unit_of, request.profile.on_request
    by_role = _asked_by_role(checkpoint, request, outside)
    unit_pins = {unit_of(one): pins[one.name] for one in outside if one.name in pins}
    unit_widths = {unit_of(one): by_role[one.role] for one in outside if one.role in by_role}
    asked: dict[str, _Asked] = {}
    for one in outside:
        unit = unit_of(one)
        if (pin := pins.get(one.name, unit_pins.get(unit))) is not None:
            asked[one.name] = _Asked(pin, firm=True)
        elif (width := by_role.get(one.role, unit_widths.get(unit))) is not None:
            asked[one.name] = _Asked(width, firm=one.role in firm)
    return asked


def _require_agreement(profile: Profile, outside: Sequence[MatrixRef], fixed: Mapping[str, Choice]) -> None:
    """Raise BudgetError if matrices that the engine runs as one are fixed at different choices."""
    first: dict[str, str] = {}
    present = [matrix for matrix in outside if matrix.name in fixed]
    others = [first.setdefault(profile.unit_of(matrix), matrix.name) for matrix in present]
    apart = [pair for pair in zip(others, present, strict=True) if fixed[pair[0]] != fixed[pair[1].name]]
    if apart:
        other, matrix = apart[0]
        named = matrix.in_every_layer if len({one.layer for _, one in apart}) > 1 else matrix.name
        raise BudgetError(
            f"{profile.name} runs {other} and {matrix.name} as one, but they would be stored as {fixed[other]} and "
            f"{fixed[matrix.name]}. Give them one choice, for example with --pin '{named}={fixed[other]}' after other "
            "pins."
        )


def _asked_by_role(checkpoint: Checkpoint, request: Request, outside: Sequence[MatrixRef]) -> dict[Role, Choice]:
    """The choices that a user named for whole roles outside the budget."""
    asked = request.config.widths()
    present = {matrix.role for matrix in outside}
    for role in (asked.keys() & request.profile.on_request) - present:
        raise _stored_nowhere(checkpoint, role)
    return {role: request.of_width(bits) for role, bits in asked.items() if role in present}


def _pins(request: Request, planned: Sequence[MatrixRef], outside: Sequence[MatrixRef]) -> dict[str, Choice]:
    """What the last pin that names a matrix says, by the matrix' name."""
    pins: dict[str, Choice] = {}
    for rule in request.config.pins:
        named = [matrix.name for matrix in (*planned, *outside) if rule.matches(matrix)]
        if not named:
            raise names_nothing(rule, "--pin", planned)
        pins |= dict.fromkeys(named, request.choice(rule.value))
    return pins


def _as_asked(profile: Profile, checkpoint: Checkpoint, choice: Choice, matrix: MatrixRef) -> Choice:
    """The choice. Raises BudgetError if the engine cannot store the matrix so."""
    if why := profile.obstacle(choice, matrix) or (None if choice.kept else profile.keeps(checkpoint, matrix)):
        raise BudgetError(
            f"{profile.name} cannot store {matrix.name} as {choice}: {why}. Keep it with "
            f"--pin '{matrix.in_every_layer}=16' after other pins, or drop the width asked for."
        )
    return choice


def next_storable(profile: Profile, choice: Choice, matrix: MatrixRef, fast: bool = False) -> Choice:
    """The choice itself, or the smallest of at least its bits that the engine can store the matrix in. fast: without
    those that take long to quantize to."""
    if profile.obstacle(choice, matrix) is None:
        return choice
    # Of usual ones alone: some types are only good for weights that were trained in them.
    usual = [*(profile.fast if fast else profile.defaults), KEPT]
    wider = [other for other in usual if other.bits >= choice.bits and not profile.obstacle(other, matrix)]
    return min(wider, key=lambda other: profile.storage_bytes(other, matrix.shape))


def names_nothing(rule: Rule, option: str, matrices: Sequence[MatrixRef]) -> BudgetError:
    """The error of a rule that names none of the matrices that it could name."""
    return BudgetError(
        f"{option} {rule.pattern!r} names no matrix of the budget. Write a projection (down), a role (expert) or "
        f"a glob on names such as {matrices[0].name!r}."
    )


def _stored_nowhere(checkpoint: Checkpoint, role: Role) -> BudgetError:
    """What a user may do who named a width for a role that has no matrix of its own."""
    tied = {Role.HEAD: Role.EMBEDDING, Role.EMBEDDING: Role.HEAD}.get(role)
    if tied is None or not checkpoint.with_role(tied):
        return BudgetError(f"{checkpoint.name} stores no {role.value}. Drop --{role.value}-bits.")
    return BudgetError(
        f"{checkpoint.name} stores no {role.value} of its own: it is tied to the {tied.value}. Use "
        f"--{tied.value}-bits, which is for both, in place of --{role.value}-bits."
    )
