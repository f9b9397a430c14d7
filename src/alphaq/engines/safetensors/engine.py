"""An engine of safetensors files that has a program of its own for each family: what sets one apart is a record.

Each matrix becomes a few tensors beside each other under its module's name, and config.json says which module has which
choice. The rest is the same for all: sizes, places, what is refused, and what a damaged file is told by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec
from alphaq.engines.assumptions.tables import Lines, family_lines
from alphaq.engines.export import Export, Layout, Part, Rows, Run, Stored, kept_dtype, write_json
from alphaq.engines.placement import left_out
from alphaq.engines.profile import Profile, Unit
from alphaq.engines.safetensors.folder import write_model_folder
from alphaq.engines.safetensors.layout import added_bytes, kept_fault, kept_part, safetensors_layout, safetensors_stored
from alphaq.engines.safetensors.modules import KEPT, as_published, module_of
from alphaq.engines.safetensors.refusals import require_agreement, require_family, require_quantizable
from alphaq.engines.settings import require_settings
from alphaq.errors import ChoiceError
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role, Shape
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.work.untrusted import JsonObject


def ragged(choice: Choice, matrix: MatrixRef) -> str | None:
    """The obstacle of engines that have no ragged groups."""
    columns = matrix.shape[1]
    if not choice.kept and columns % choice.group_size:
        return f"{columns} columns are not divisible by the group size {choice.group_size}"
    return None


def words(count: int, bits: int) -> int:
    """32-bit words that hold so many codes."""
    return -(-count * bits // 32)


@dataclass(frozen=True)
class SafetensorsEngine:
    """One engine.

    title: its name as its makers write it. quantized: the choices of which plans are made; group_size: of those, what a
    bare bit-width means. tensors: (choice, shape, dtype of scales) → what a quantized matrix fills, by the end of its
    name. encode: their values, in that order. reader: see `Export`. shape: (choice, stored tensors) → rows and columns.
    config: what config.json says of the quantization, empty for nothing. module: the engine's name of the module that
    holds a matrix. stacked: whether one module holds a projection of all a layer's experts. renamed: what the engine
    calls a tensor that is kept. refuse: raises ArchitectureError for settings that it could not be told, beside what is
    asked of every engine. damage: (choice, shape, the tensors' values) → what is wrong with them, or nothing.
    quantizer, merged, keeps, on_request, obstacle, library: see `Profile`.
    """

    name: str
    title: str
    summary: str
    unit: Unit
    quantized: tuple[Choice, ...]
    group_size: int
    quantizer: str
    tensors: Callable[[Choice, Shape, str], Mapping[str, TensorSpec]]
    encode: Callable[[QuantizedMatrix], Sequence[torch.Tensor]]
    reader: Callable[[Sequence[torch.Tensor], Choice, Shape, str], Rows]
    shape: Callable[[Choice, Sequence[Stored]], Shape]
    config: Callable[[Checkpoint, Plan], JsonObject]
    usage: str
    run: Run
    module: Callable[[Checkpoint, MatrixRef], str] = module_of
    stacked: Callable[[Checkpoint], bool] = lambda checkpoint: False
    renamed: Callable[[Checkpoint, str], str] = as_published
    refuse: Callable[[Checkpoint], object] = lambda checkpoint: None
    damage: Callable[[Choice, Shape, Sequence[torch.Tensor]], str] = lambda choice, shape, parts: ""
    obstacle: Callable[[Choice, MatrixRef], str | None] = ragged
    merged: Callable[[MatrixRef], str | None] = lambda matrix: None
    keeps: Callable[[Checkpoint, MatrixRef], str | None] = lambda checkpoint, matrix: None
    on_request: frozenset[Role] = frozenset()
    config_file: str = ""
    """A file beside config.json that says the same of the quantization."""

    def with_bits(self, bits: int) -> Choice:
        """The choice that a bare bit-width means. Raises ChoiceError for one that the engine lacks."""
        known = {choice.bits: choice for choice in self.quantized if choice.group_size == self.group_size}
        if bits not in known | {KEPT.bits: KEPT}:
            widths = ", ".join(map(str, sorted(known)))
            raise ChoiceError(f"{self.title} has no {bits}-bit weights in these files. Available: {widths}, 16 (kept).")
        return known.get(bits, KEPT)

    def storage_bytes(self, choice: Choice, shape: Shape) -> int:
        """Exact bytes of the tensors of one matrix."""
        if choice.kept:
            return 2 * shape[0] * shape[1]
        return sum(spec.nbytes for spec in self.tensors(choice, shape, "BF16").values())

    def parts(self, checkpoint: Checkpoint, matrix: MatrixRef, choice: Choice) -> tuple[Part, ...]:
        """The tensors of one matrix, or its share of them."""
        module, index = self.module(checkpoint, matrix), matrix.expert if self.stacked(checkpoint) else None
        if choice.kept:
            return (kept_part(matrix, f"{module}.weight", index),)
        specs = self.tensors(choice, matrix.shape, kept_dtype(matrix.dtype))
        return tuple(Part(f"{module}.{name}", spec, index) for name, spec in specs.items())

    def lines(self, checkpoint: Checkpoint) -> Lines:
        """What the engine's table says of a family with experts; nothing of another."""
        return family_lines(self.name, checkpoint.architecture, checkpoint.text_config.get("model_type"))

    def layout(self, checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> Layout:
        """Every tensor of every output shard.

        Raises PlanError or ArchitectureError for what the engine could not load, or would compute otherwise.
        """
        require_family(checkpoint, self.name, self.title)
        require_settings(checkpoint, self.name)
        require_agreement(checkpoint, choices, self.title, self.profile().unit_of)
        require_quantizable(checkpoint, choices, self.title, self.keeps)
        self.refuse(checkpoint)
        dropped = left_out(checkpoint, self.name)
        return safetensors_layout(
            checkpoint, choices, partial(self.parts, checkpoint), partial(self.renamed, checkpoint), dropped
        )

    def fault(self, name: str, choice: Choice, stored: Sequence[Stored], parts: Sequence[torch.Tensor]) -> str | None:
        """Why a matrix is not what the plan says, or None."""
        if choice.kept:
            return kept_fault(name, stored)
        shapes = [one.shape for one in stored]
        try:
            shape = self.shape(choice, stored)
        except IndexError:
            shape = (0, 0)  # no matrix has this shape
        expected = [spec.shape for spec in self.tensors(choice, shape, "BF16").values()]
        stack = shapes[0][: len(shapes[0]) - len(expected[0])]
        if shapes != [(*stack, *one) for one in expected]:
            found = " and ".join(str(list(one)) for one in shapes)
            return f"{name} is stored with shapes {found}, the plan says {choice}"
        wrong = self.damage(choice, shape, parts)
        return f"{name} {wrong}" if wrong else None

    def write_rest(self, folder: Path, checkpoint: Checkpoint, plan: Plan, written: Layout) -> None:
        """Config, index and tokenizer."""
        config = self.config(checkpoint, plan)
        write_model_folder(folder, checkpoint, written.entries, config)
        if self.config_file and (quantization := config.get("quantization_config")):
            write_json(folder / self.config_file, quantization)

    def profile(self) -> Profile:
        """What a plan may assume of the engine."""
        return Profile(
            name=self.name,
            library=self.name,
            summary=self.summary,
            unit=self.unit,
            defaults=self.quantized,
            choices=(*self.quantized, KEPT),
            with_bits=self.with_bits,
            storage_bytes=self.storage_bytes,
            obstacle=self.obstacle,
            quantizer=self.quantizer,
            merged=self.merged,
            keeps=self.keeps,
            on_request=self.on_request,
            file_bytes=lambda checkpoint, matrix, choice: added_bytes(self.parts(checkpoint, matrix, choice)),
            export=Export(
                layout=self.layout,
                encode=self.encode,
                reader=self.reader,
                stored=safetensors_stored,
                usage=self.usage,
                write_rest=self.write_rest,
                fault=self.fault,
                run=self.run,
                shape=self.shape,
            ),
        )
