"""An output of `alphaq quantize` as the checkpoint that it stands for: every matrix restored when it is read.

With the original at hand its config and names are kept, so that what the output's own metadata fail to say shows.
Without it the output speaks for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch

from alphaq.checkpoint.config import read_config
from alphaq.checkpoint.families.architecture import architecture_of
from alphaq.checkpoint.families.matching import match_tensors
from alphaq.checkpoint.files import PlainFile
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.checkpoint.writer import Place
from alphaq.engines.export import AS_IT_IS, Form, Rows, Stored
from alphaq.engines.output import Output
from alphaq.errors import ArchitectureError, CheckpointError
from alphaq.formats.coding import PREFIX_BYTES, decode_tensor, is_coded
from alphaq.nouns.matrix import MatrixRef
from alphaq.writing.artifact import open_artifact
from alphaq.writing.planned import plan_choices


@dataclass(frozen=True)
class RestoredCheckpoint(Checkpoint):
    """A checkpoint whose values come from an output.

    forms: how the engine changed the values of an entry first, for those that it did.
    """

    output: Output | None = None
    forms: Mapping[str, Form] = field(default_factory=dict)

    @cached_property
    def _quantized(self) -> dict[str, list[MatrixRef]]:
        """The matrices of the plan by the stored tensor that holds them."""
        assert self.output is not None  # who makes one gives it
        return self.matrices_by_tensor(self.output.plan.choices)

    def read(self, matrix: MatrixRef, memory: torch.Tensor | None = None) -> torch.Tensor:
        """One matrix, restored, [rows, columns]."""
        if not self._has(matrix.name):
            return super().read(matrix, memory)
        values = self._values(matrix.name, matrix.shape)
        form = self.forms.get(matrix.name, AS_IT_IS)
        return self._put_back(values, replace(form, dtype="")) if form.transform else values

    def read_rows(self, matrix: MatrixRef, part: slice, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Some rows of a matrix, restored. Its codes are kept until another is asked for: who reads rows reads many."""
        if not self._has(matrix.name):
            return super().read_rows(matrix, part, memory)
        known = self._last.get(matrix.name)
        if known is None:
            known = self._rows(matrix)
            self._last.clear()
            self._last[matrix.name] = known
        return known(part)

    @cached_property
    def _last(self) -> dict[str, Rows]:
        return {}

    def _rows(self, matrix: MatrixRef) -> Rows:
        """Rows of an entry: all of it is held where they are in another order, else its codes, or nothing."""
        if self.forms.get(matrix.name, AS_IT_IS).transform:
            whole = self.read(matrix)
            return lambda part: whole[part]
        return self._opened(matrix.name, matrix.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor with its matrices restored."""
        held = self._quantized.get(name, [])
        if not held:
            return self._values(name, self.info(name).shape) if self._has(name) else super().tensor(name)
        if len(held) == 1 and held[0].shape == self.info(name).shape and not held[0].transposed:
            return self.read(held[0])
        whole = super().tensor(name).float()
        for matrix in held:
            place = whole if matrix.index is None else whole[matrix.index]
            place = place.T if matrix.transposed else place
            place[matrix.row_start :: matrix.row_step][: matrix.shape[0]].copy_(self.read(matrix))
        return whole

    def _has(self, name: str) -> bool:
        """Whether the output holds an entry in the source's layout, or in one that can be put back."""
        assert self.output is not None
        quantized = self.output.choice(name)
        kept = quantized is None or quantized.kept
        return name in self.output.manifest and not (kept and name in self.forms)

    def _values(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """What an entry's bytes stand for."""
        return self._opened(name, shape)(slice(0, shape[0]) if shape else slice(None))

    def _opened(self, name: str, shape: tuple[int, ...]) -> Rows:
        """Values of an entry by slices of its first dimension."""
        assert self.output is not None
        stored = [self.output.stored[tensor] for tensor, _ in self.output.parts(name)]
        places, choice = self.output.places(name), self.output.choice(name)
        if choice is not None and not choice.kept:
            parts = [self._read(one, place, name) for one, place in zip(stored, places, strict=True)]
            return self.output.profile.writer.reader(parts, choice, (shape[0], shape[1]), name)
        (one, *_), (place, *_) = stored, places
        file = PlainFile(self.output.folder / place.file)
        if not shape or is_coded(file.read(place.begin, min(place.nbytes, PREFIX_BYTES))):
            whole = self._read(one, place, name).view(shape)
            return lambda part: whole[part] if shape else whole
        row_bytes = place.nbytes // shape[0]

        def rows(part: slice) -> torch.Tensor:
            data = file.read(place.begin + part.start * row_bytes, (part.stop - part.start) * row_bytes)
            return one.typed(data).view(-1, *shape[1:])

        return rows

    def _read(self, one: Stored, place: Place, name: str) -> torch.Tensor:
        """A stored tensor, flat, no longer coded."""
        assert self.output is not None
        values = one.typed(PlainFile(self.output.folder / place.file).read(place.begin, place.nbytes))
        return decode_tensor(values, name).reshape(-1) if is_coded(values) else values

    def _put_back(self, values: torch.Tensor, form: Form) -> torch.Tensor:
        """Rows where they were before the engine reordered them."""
        assert self.output is not None
        numbers = torch.arange(len(values), dtype=torch.float32)[:, None]
        order = self.output.profile.writer.convert(numbers, form, self).flatten().long()
        restored = torch.empty_like(values)
        restored[order] = values
        return restored


def restored_from(output: Output, source: Checkpoint) -> Checkpoint:
    """The source with the output's values. Raises PlanError if they do not belong together."""
    written = output.profile.writer.layout(source, plan_choices(output.plan, source))
    forms = {entry.name: entry.form for entry in written.entries if entry.form != AS_IT_IS}
    given = {one.name: getattr(source, one.name) for one in fields(Checkpoint)}
    return RestoredCheckpoint(**given, output=output, forms=forms)


def restored_alone(output: Output) -> Checkpoint:
    """What an output stands for by its own metadata. Raises CheckpointError where they do not tell."""
    shape_of = output.profile.writer.shape
    if output.profile.writer.holds_codes:
        return open_artifact(output.folder)[0]
    if shape_of is None:
        try:
            return open_checkpoint(next(output.folder.glob("*.gguf")), quantized=True)
        except ArchitectureError as error:
            raise CheckpointError(f"{error} With --reference MODEL its config is taken from there.") from error
    config = read_config(output.folder)
    for key in ("quantization_config", "quantization"):
        config.pop(key, None)
    infos = {}
    for name in output.manifest:
        stored = [output.stored[tensor] for tensor, _ in output.parts(name)]
        choice, whole = output.choice(name), stored[0].shape
        kept = choice is None or choice.kept
        own = whole[1:] if output.parts(name)[0][1] is not None else whole
        shape = own if kept or choice is None else shape_of(choice, stored)
        infos[name] = TensorInfo(name, stored[0].dtype if kept else "F32", shape, 0, 0)
    architecture = architecture_of(config)
    matrices, roles = match_tensors(architecture, config, infos.values())
    return RestoredCheckpoint(
        output.folder, output.folder.name, config, architecture, {"": infos}, tuple(matrices), roles, "", output=output
    )
