"""What the tests of safetensors exports share: plans, outputs and the models they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from alphaq import pipeline
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.engines.profile import Profile
from alphaq.engines.profiles import profile
from alphaq.engines.safetensors.modules import LINEAR
from alphaq.formats.table import parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import make_plan, measure_for_plan, resolve
from alphaq.quantizers.base import rounder_of

QUANTIZED_ROLES = (Role.EXPERT, Role.SHARED_EXPERT, Role.ATTENTION, Role.DENSE_MLP)


def quantized_choices(engine: Profile) -> list[Choice]:
    return [choice for choice in engine.choices if choice.bits != 16]


def cycled_plan(checkpoint: Checkpoint, engine: str, choices: Sequence[str], fixed: str | None) -> Plan:
    """The engine's units take the choices in turn; matrices that are no experts take the fixed one, or with None their
    turn too, and the embedding and the head with them where the engine stores them."""
    known, turns = profile(engine), cycle(choices)
    units: dict[str, str] = {}
    made = {}
    for matrix in checkpoint.matrices:
        if matrix.role in (known.roles | {Role.EXPERT} if fixed is None else QUANTIZED_ROLES):
            unit = known.unit_of(matrix)
            free = fixed is None or matrix.role is Role.EXPERT
            made[matrix.name] = units.setdefault(unit, next(turns)) if free else str(fixed)
            if any(known.obstacle(parse_choice(one), matrix) for one in choices) or known.keeps(checkpoint, matrix):
                made[matrix.name] = "16"
    return Plan(engine=engine, choices=made)


def plan_of(folder: Path, engine: str, **settings: object) -> Plan:
    """A plan by a method that needs no forward pass, unless told otherwise."""
    request = resolve(PlanConfig.model_validate({"budget": Budget(bits=4), "method": "alphaq", **settings}))
    request = resolve(PlanConfig.model_validate({**request.config.model_dump(), "engine": engine}))
    checkpoint = open_checkpoint(folder)
    return make_plan(checkpoint, request, measure_for_plan(checkpoint, request))


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def linear_modules(checkpoint: Checkpoint) -> dict[str, MatrixRef]:
    return {matrix.name.removesuffix(".weight"): matrix for matrix in checkpoint.matrices if matrix.role in LINEAR}


def gaussian(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / 20).to(dtype)


def round_trip(engine: Profile, choice: Choice, weight: torch.Tensor) -> tuple[QuantizedMatrix, torch.Tensor]:
    """A matrix quantized, encoded and read again by what reads the files."""
    shape = (weight.shape[0], weight.shape[1])
    matrix = rounder_of(engine.quantizer)(weight, choice, "x")
    parts = [part.contiguous().reshape(-1) for part in engine.writer.encode(matrix)]
    return matrix, engine.writer.reader(parts, choice, shape, "x")(slice(0, shape[0])).float()


def flip(folder: Path, tensor: str) -> None:
    """Damage one bit of a stored tensor."""
    place = (
        profile(Plan.from_json((folder / "plan.json").read_bytes(), "plan").engine).writer.stored(folder)[tensor].place
    )
    data = bytearray((folder / place.file).read_bytes())
    data[place.begin + place.nbytes // 2] ^= 1
    (folder / place.file).write_bytes(data)


def standing_for(values: Mapping[str, torch.Tensor], source: Path, folder: Path, dtype: torch.dtype) -> Any:
    """The model that transformers builds of these weights, named as in the source."""
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file({name: value.to(dtype).contiguous() for name, value in values.items()}, folder / "model.safetensors")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits_of(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([list(tokens)])).logits[0].float()
    return logits


def quantize(source: Path, plan: Plan, out: Path) -> Path:
    pipeline.quantize(open_checkpoint(source), plan, out)
    return out
