"""What a plan may assume of the engine that will run it.

No engine with fused kernels loads a bit-width per expert, so a plan is always made for an engine: which
matrices must share a choice, which choices it can load, how many bytes each takes, and how files are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from alphaq.checkpoint.families.routing import OWN_COUNTS, own_counts
from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.export import Export
from alphaq.engines.importance import Importance
from alphaq.errors import PlanError
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role, Shape

Unit = Literal["matrix", "layer × projection", "layer"]
ROLE_BITS = {Role.ATTENTION: 4, Role.SHARED_EXPERT: 4, Role.DENSE_MLP: 4}


@dataclass(frozen=True)
class Profile:
    """One engine.

    unit: what must share one choice. choices: every choice it can load for experts; defaults: those offered when the
    user names none; fast: those offered instead with `--fast`, none where all are. with_bits: the choice meant by a
    bare bit-width (`--attention-bits 4`), and for roles outside the budget. storage_bytes: exact bytes of one matrix's
    tensors at a choice. file_bytes: what they add to the files, header entries included. kept_bytes: what a matrix that
    is kept adds to them, where that depends on the source; None if file_bytes says it. obstacle: why a matrix cannot be
    stored so, or None. quantizer: the one whose codes the engine reads, by name. merged: what the engine runs a matrix
    outside the experts as a part of, None if it is alone. keeps: why the engine must have a matrix of a checkpoint in
    16 bits, None if it need not. role_bits: usual width of each role that is quantized outside the budget. on_request:
    roles that are copied unless a user names a width for them. A budget for all files (`--size`) chooses for both of
    these too. export: how files are written, None where they cannot be yet. library: what the Hugging Face hub calls
    that which loads the files (`library_name` of a card). importance: (checkpoint, importance matrix) → what it says of
    each matrix; None if the engine's quantizers take none.
    searchable: whether `--ear` can try budgets, since the files are run here.
    uneven: whether layers may differ in how many experts they have.
    """

    name: str
    summary: str
    unit: Unit
    choices: tuple[Choice, ...]
    defaults: tuple[Choice, ...]
    with_bits: Callable[[int], Choice]
    storage_bytes: Callable[[Choice, Shape], int]
    file_bytes: Callable[[Checkpoint, MatrixRef, Choice], int]
    obstacle: Callable[[Choice, MatrixRef], str | None]
    quantizer: str
    fast: tuple[Choice, ...] = ()
    merged: Callable[[MatrixRef], str | None] = lambda matrix: None
    keeps: Callable[[Checkpoint, MatrixRef], str | None] = lambda checkpoint, matrix: None
    role_bits: Mapping[Role, int] = field(default_factory=lambda: dict(ROLE_BITS))
    on_request: frozenset[Role] = frozenset()
    part_bytes: int = 0
    kept_bytes: Callable[[Checkpoint, MatrixRef], int] | None = None
    export: Export | None = None
    library: str = "alphaq"
    importance: Callable[[Checkpoint, ImportanceMatrix], Importance] | None = None
    searchable: bool = False
    uneven: bool = False

    @property
    def writer(self) -> Export:
        """The export. Raises PlanError where there is none."""
        if self.export is None:
            raise PlanError(f"Plans for {self.name} cannot be written as files yet. Plan with --engine native.")
        return self.export

    def check_layers(self, checkpoint: Checkpoint) -> None:
        """Raise PlanError for layers with numbers of experts of their own, if the engine has one number for all."""
        fewer = own_counts(checkpoint.architecture, checkpoint.config).values()
        if fewer and not self.uneven:
            most = checkpoint.architecture.experts_per_layer(checkpoint.config)
            raise PlanError(
                f"{checkpoint.name}: by config.json ({OWN_COUNTS}) layers have {min(fewer)} to {most} experts, "
                f"and {self.name} has one number for all layers. Use --engine native, or start from the original "
                "model; where experts are to go, with --drop-counts equal."
            )

    def importance_of(self, checkpoint: Checkpoint, given: ImportanceMatrix | None) -> Importance:
        """What an importance matrix says of the columns of each matrix; nothing without one.

        Raises PlanError if the engine's quantizers take none.
        """
        if given is None:
            return Importance()
        if self.importance is None:
            raise PlanError(f"--imatrix is for llama.cpp's quantizers; {self.name} has none. Drop it.")
        return self.importance(checkpoint, given)

    @property
    def roles(self) -> frozenset[Role]:
        """Every role that can be quantized outside the budget."""
        return self.on_request | self.role_bits.keys()

    def unit_of(self, matrix: MatrixRef) -> str:
        """Name of the unit that a matrix belongs to; outside the experts each is its own, unless it is merged."""
        if matrix.role is not Role.EXPERT:
            return self.merged(matrix) or matrix.name
        if self.unit == "matrix":
            return matrix.name
        layer = f"layers.{matrix.layer}.experts"
        return layer if self.unit == "layer" else f"{layer}.{matrix.projection}"
