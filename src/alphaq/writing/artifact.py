"""A native checkpoint as a source: its matrices as what they stand for, so that it can be planned and written again.

What an artifact cannot tell is how far it is from the original; errors that are measured on it are in addition.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch

from alphaq.checkpoint.files import PlainFile
from alphaq.checkpoint.reader import NATIVE_METHOD, Checkpoint, open_checkpoint, open_native
from alphaq.checkpoint.tensors import Encoding, TensorInfo
from alphaq.engines.native import PROFILE as NATIVE
from alphaq.engines.output import PLAN_NAME, Output
from alphaq.errors import PlanError
from alphaq.formats.blocks import decode, dequantize, is_block
from alphaq.formats.coding import block_header, decode_tensor, decoded_info, is_coded
from alphaq.formats.table import format_of, stored_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.option import settings_of
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.nouns.settings import PlanConfig
from alphaq.nouns.spectrum import Spectrum
from alphaq.spectra.measure import Stats


@dataclass(frozen=True)
class Artifact(Checkpoint):
    """A native checkpoint whose matrices are restored as they are read."""

    def read_rows(self, matrix: MatrixRef, part: slice, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Some rows of a matrix. Its codes are kept until another one is asked for: who reads rows reads many."""
        encoding = self.info(matrix.tensor).encoding
        if encoding is None or encoding.scheme != NATIVE_METHOD:
            return super().read_rows(matrix, part, memory)
        known = self._last.get(matrix.name)
        if known is None:
            known = self._opened(matrix)
            self._last.clear()
            self._last[matrix.name] = known
        return known[part] if isinstance(known, torch.Tensor) else dequantize(known, rows=part)

    def _opened(self, matrix: MatrixRef) -> QuantizedMatrix | torch.Tensor:
        """A matrix's codes, or its values where it has none or they are part of a tensor that is read as a whole."""
        if (stored := self.stored(matrix)) is None:
            return self.read(matrix)
        plain = decode_tensor(stored, matrix.name)
        return decode(plain, matrix.name) if is_block(plain) else plain.view(matrix.shape)

    @cached_property
    def _last(self) -> dict[str, QuantizedMatrix | torch.Tensor]:
        return {}

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in super().__getstate__().items() if name != "_last"}


def open_artifact(folder: Path) -> tuple[Checkpoint, Plan]:
    """What `alphaq quantize` wrote, to be read like a checkpoint, and its plan.

    Raises CheckpointError, or PlanError if the files are another engine's.
    """
    output = Output(folder)
    if not output.profile.writer.holds_codes:
        raise PlanError(
            f"{folder} is for {output.plan.engine}, which cannot be read back. Only native checkpoints can be sliced."
        )
    opened = open_native(folder, _restored)
    return Artifact(**{one.name: getattr(opened, one.name) for one in fields(Checkpoint)}), output.plan


def open_source(model: str) -> Checkpoint:
    """What an output was made of: a checkpoint, or another output that it was sliced from."""
    folder = Path(model).expanduser()
    return open_artifact(folder)[0] if (folder / PLAN_NAME).is_file() else open_checkpoint(model, quantized=True)


def _restored(file: PlainFile, info: TensorInfo) -> TensorInfo:
    """What a stored tensor stands for."""
    header = block_header(file.read, info)
    if header is not None:
        return replace(info, dtype="F32", shape=header[1], encoding=Encoding(NATIVE_METHOD, (1, 1), decoder=_values))
    prefix = file.read(info.begin, min(info.nbytes, 1 << 10))
    if not is_coded(prefix):
        return info
    return replace(decoded_info(info, prefix), encoding=Encoding(NATIVE_METHOD, (1, 1), decoder=decode_tensor))


def _values(stored: torch.Tensor, name: str) -> torch.Tensor:
    """Float32 [rows, columns] of a block, coded or not."""
    return dequantize(decode(decode_tensor(stored, name), name))


def check_cuttable(folder: Path, plan: Plan) -> None:
    """PlanError if an artifact holds codes of which nothing can be cut off."""
    streams = {name: choice for name, choice in plan.every_choice().items() if format_of(choice).streams}
    if not streams:
        return
    name, choice = min(streams.items())
    raise PlanError(
        f"{folder} cannot be sliced: {len(streams)} of its matrices are in trellis codes ({name} in {choice}), which "
        "have no top bits to take: fewer bits mean a new search, whose error comes on top of theirs. Plan again from "
        f"the original with a smaller --size or --bits: {_again(plan)}"
    )


def _again(plan: Plan) -> str:
    """A command that quantizes to a plan's choices by its own data; the budget is the user's to add."""
    source = plan.source.name if plan.source is not None else "MODEL"
    words, settings = ["alphaq", "quantize", source], settings_of(PlanConfig)
    for name in ("engine", "method", "choices", "calibration"):
        value = getattr(plan.settings, name, None)
        if value != settings[name].default:
            words += settings[name].words(value)
    return shlex.join([*words, "-o", "OUT"])


def nested_choices(checkpoint: Checkpoint, plan: Plan) -> str | None:
    """What planned matrices can be cut down to, as `--choices` wants it; None if none of their codes nest."""
    choices = plan.every_choice()
    held = {choices[matrix.name] for matrix in checkpoint.planned}
    offered = {one for own in held if (cut := format_of(own).narrower(own)) for one in (own, *cut)}
    return ",".join(map(str, sorted(offered))) or None


def known_alphas(checkpoint: Checkpoint, plan: Plan, config: PlanConfig) -> Stats | None:
    """α of planned matrices as the original weights have it, if the plan was made of it and the config wants the same.

    Energies are NaN: they are added up from codes while errors are measured.
    """
    made = plan.settings
    same = made is not None and (made.spectrum, made.tail) == (config.spectrum, config.tail)
    names = [matrix.name for matrix in checkpoint.planned]
    if not same or config.noise == "analytic" or not plan.alpha.keys() | plan.neutral.keys() >= set(names):
        return None
    unknown = math.nan
    return Stats(
        {
            name: Spectrum(plan.alpha.get(name), 0, 0, unknown, unknown, unknown, plan.neutral.get(name, ""))
            for name in names
        },
        {},
        {},
    )


def own_pins(checkpoint: Checkpoint, plan: Plan, asked: Container[Role] = ()) -> list[str]:
    """`--pin` rules that leave what is outside the budget as the artifact has it, coded again or not.

    asked: roles whose width a user asked for.
    """
    choices = {name: stored_choice(choice) for name, choice in plan.every_choice().items()}
    by_role: dict[str, Counter[Choice]] = {}
    roles = {role for role in NATIVE.roles if role is not checkpoint.planned_role and role not in asked}
    copied = NATIVE.on_request  # unless the artifact has them quantized; a pin to 16 bits would convert float32
    outside = [
        one for one in checkpoint.matrices if one.role in roles and (one.role not in copied or one.name in choices)
    ]
    for matrix in outside:
        by_role.setdefault(matrix.role.value, Counter())[choices.get(matrix.name, Choice(16))] += 1
    usual = {role: counts.most_common(1)[0][0] for role, counts in by_role.items()}
    pins = [f"{role}={choice}" for role, choice in usual.items()]
    for matrix in outside:
        own = choices.get(matrix.name, Choice(16))
        if own != usual[matrix.role.value]:
            pins.append(f"{matrix.name}={own}")
    return pins
