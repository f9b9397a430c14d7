"""The MLX profile: affine groups with a scale and a bias each, one choice per layer and projection.

w ≈ scale·q + bias, q unsigned: our asymmetric choice, with 16 bits for the offset instead of a zero point. Files are
those of mlx-lm: `weight` (uint32 [out, in·b/32], least significant bits first along a row), `scales` and `biases`
(the model's 16-bit type, [out, in/g]); the experts of a layer are stacked under `switch_mlp`, and config.json names
every module whose choice is not the usual one. Source: mlx and mlx-lm 0.32.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec
from alphaq.engines.export import Rows, Run
from alphaq.engines.mlx.config import NAME, is_wrapped, told
from alphaq.engines.safetensors.engine import SafetensorsEngine, words
from alphaq.engines.safetensors.modules import KEPT, as_published, module_of
from alphaq.errors import MissingEngineError, MissingExtraError, PlanError
from alphaq.formats.native import GROUP_SIZES
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role, Shape
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.work.untrusted import JsonObject

BITS = (2, 3, 4, 5, 6, 8)
TIED_PLAINLY = ("seed_oss",)
"""Families whose class in mlx-lm takes the embedding's tensor for the head, where they are one, and not its module."""


def tensors(choice: Choice, shape: Shape, dtype: str) -> dict[str, TensorSpec]:
    """Codes, scales and biases."""
    rows, columns = shape
    per_group = TensorSpec(dtype, (rows, choice.groups(columns)))
    return {
        "weight": TensorSpec("U32", (rows, words(columns, choice.bits))),
        "scales": per_group,
        "biases": per_group,
    }


def module_path(checkpoint: Checkpoint, matrix: MatrixRef) -> str:
    """mlx-lm's name of the module that holds a matrix; usually one holds a projection of all a layer's experts."""
    lines, module = ENGINE.lines(checkpoint), module_of(checkpoint, matrix)
    if matrix.role is Role.EXPERT and lines.stacked:
        module = re.sub(r"experts\.\d+\.\w+$", f"switch_mlp.{matrix.projection}_proj", module)
    return _placed(checkpoint, lines.called(module))


def renamed(checkpoint: Checkpoint, tensor: str) -> str:
    """mlx-lm's name of a tensor that is kept."""
    return _placed(checkpoint, ENGINE.lines(checkpoint).called(as_published(checkpoint, tensor)))


def _placed(checkpoint: Checkpoint, name: str) -> str:
    """A name of a model in which the language model lies beside others: mlx-lm has it as `language_model`."""
    begins = {"lm_head": "language_model.lm_head", "model.language_model.": "language_model.model."}
    if not is_wrapped(checkpoint):
        if ENGINE.lines(checkpoint).wrapped != "always":
            return name
        begins["model."] = "language_model.model."  # after the other, by which name it may be stored, too
    found = next((begin for begin in begins if name.startswith(begin)), "")
    return begins.get(found, "") + name.removeprefix(found)


def keeps(checkpoint: Checkpoint, matrix: MatrixRef) -> str | None:
    """Why mlx-lm must have a matrix in 16 bits, or None."""
    family = str(checkpoint.config.get("model_type"))
    if why := next((why for part, why in ENGINE.lines(checkpoint).kept.items() if part in matrix.name), None):
        return why
    if family in TIED_PLAINLY and matrix.role is Role.EMBEDDING and not checkpoint.with_role(Role.HEAD):
        return f"it is the head too, and mlx-lm's {family} multiplies by its stored numbers"
    return None


def quantization_config(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> JsonObject:
    """What config.json says: the most common choice, and every module that has another. Empty if none is quantized."""
    modules = {module_path(checkpoint, matrix): choices.get(matrix.name, KEPT) for matrix in checkpoint.matrices}
    quantized = {module: choice for module, choice in modules.items() if choice != KEPT}
    if not quantized:
        return {}
    (usual, _), *_ = Counter(quantized.values()).most_common(1)
    others = {module: _settings(choice) for module, choice in quantized.items() if choice != usual}
    return {**_settings(usual), "mode": "affine", **others}


def _settings(choice: Choice) -> dict[str, int]:
    return {"group_size": choice.group_size, "bits": choice.bits}


def config(checkpoint: Checkpoint, plan: Plan) -> JsonObject:
    """Settings as mlx-lm reads them. The quantization appears twice, as mlx-lm writes it."""
    quantization = quantization_config(checkpoint, plan.every_choice())
    twice = {"quantization": quantization, "quantization_config": quantization}
    return told(checkpoint) | (twice if quantization else {})


def encode(matrix: QuantizedMatrix) -> tuple[torch.Tensor, ...]:
    """Packed codes, scales and biases. Raises MissingExtraError now rather than when all is to be read back."""
    _library()
    assert matrix.offsets is not None  # only asymmetric choices are offered
    return matrix.codes.view(torch.uint32), matrix.scales, matrix.offsets


def _library() -> ModuleType:
    try:
        import mlx.core
    except ImportError:
        raise MissingExtraError("mlx", "Files for MLX are read back by MLX itself") from None
    return mlx.core


def reader(parts: Sequence[torch.Tensor], choice: Choice, shape: Shape, name: str) -> Rows:
    """Rows in float32, by MLX's own code.

    Its Metal kernels compute in float32 from 16-bit scales and biases, so these are handed over as float32: given
    16 bits, the CPU would round in between.
    """
    mx = _library()
    codes = parts[0].view(shape[0], -1).numpy()
    scales, biases = (part.view(shape[0], -1) for part in parts[1:])

    def rows(part: slice) -> torch.Tensor:
        arrays = (codes[part], scales[part].float().numpy(), biases[part].float().numpy())
        values = mx.dequantize(*map(mx.array, arrays), group_size=choice.group_size, bits=choice.bits, stream=mx.cpu)
        return torch.from_numpy(np.array(values))

    return rows


def logits(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """What mlx-lm computes in float32, float32 [tokens, words]."""
    try:
        from mlx_lm.utils import load_model
    except ImportError:
        raise MissingEngineError("mlx-lm", "'alphaq[mlx]' mlx-lm") from None
    mx = _library()
    try:
        model, _ = load_model(folder)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PlanError(f"mlx-lm cannot load {folder} ({str(error)[:300]}). Use --engine native.") from error
    model.set_dtype(mx.float32)
    return torch.from_numpy(np.array(model(mx.array([list(ids)]))[0].astype(mx.float32)))


ENGINE: SafetensorsEngine = SafetensorsEngine(
    name=NAME,
    title="MLX",
    summary="MLX affine: 2, 3, 4, 5, 6, 8 bit, one choice per layer and projection",
    unit="layer × projection",
    quantized=tuple(Choice(bits, group_size) for bits in BITS for group_size in GROUP_SIZES),
    group_size=64,  # mlx's own
    quantizer="affine",
    tensors=tensors,
    encode=encode,
    reader=reader,
    shape=lambda choice, stored: (stored[1].shape[-2], stored[1].shape[-1] * choice.group_size),
    config=config,
    usage="Run it: mlx_lm.generate --model {out} --prompt '…'",
    run=Run("mlx-lm", logits, tolerance=0.01),
    module=module_path,
    stacked=lambda checkpoint: ENGINE.lines(checkpoint).stacked,
    renamed=renamed,
    refuse=told,
    keeps=keeps,
    on_request=frozenset({Role.EMBEDDING, Role.HEAD}),
)
PROFILE = ENGINE.profile()
