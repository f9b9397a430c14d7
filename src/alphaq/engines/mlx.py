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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec
from alphaq.engines.effective import model_settings, settings_of
from alphaq.engines.export import (
    KEPT,
    Export,
    Layout,
    Part,
    Rows,
    Run,
    Stored,
    added_bytes,
    as_published,
    kept_dtype,
    kept_fault,
    kept_part,
    module_name,
    require_agreement,
    require_family,
    safetensors_layout,
    safetensors_stored,
    shape_fault,
    write_model_folder,
)
from alphaq.engines.placement import left_out
from alphaq.engines.profile import Profile, ragged
from alphaq.engines.settings import ROPE, family_settings, require_settings
from alphaq.errors import ArchitectureError, ChoiceError, MissingEngineError, MissingExtraError, PlanError
from alphaq.formats.blocks import native_format
from alphaq.formats.native import GROUP_SIZES
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role, Shape
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix

BITS = (2, 3, 4, 5, 6, 8)
DEFAULT_GROUP_SIZE = 64  # mlx's own


def with_bits(bits: int) -> Choice:
    """Groups of 64, or 16. Raises ChoiceError for a width that MLX lacks."""
    if bits == KEPT.bits:
        return KEPT
    if bits not in BITS:
        raise ChoiceError(f"MLX has no {bits}-bit weights. Available: {', '.join(map(str, BITS))}, 16 (kept).")
    return Choice(bits, DEFAULT_GROUP_SIZE)


def storage_bytes(choice: Choice, shape: Shape) -> int:
    """Exact bytes of `weight` uint32 [out, in·b/32], `scales` and `biases` 16-bit [out, in/g] each."""
    if choice.kept:
        return 2 * shape[0] * shape[1]
    codes, _, scales, _ = native_format(choice).parts(choice, shape)
    return codes + 2 * scales


def module_path(matrix: MatrixRef) -> str:
    """mlx-lm's name of the module that holds a matrix; one module holds a projection of all a layer's experts."""
    module = module_name(matrix.name)
    if matrix.role is Role.EXPERT:
        return re.sub(r"experts\.\d+\.\w+$", f"switch_mlp.{matrix.projection}_proj", module)
    return module


def parts(matrix: MatrixRef, choice: Choice) -> tuple[Part, ...]:
    """The tensors of one matrix, or its share of them."""
    module, (rows, columns) = module_path(matrix), matrix.shape
    if choice.kept:
        return (kept_part(matrix, f"{module}.weight", matrix.expert),)
    per_group = TensorSpec(kept_dtype(matrix.dtype), (rows, choice.groups(columns)))
    return (
        Part(f"{module}.weight", TensorSpec("U32", (rows, choice.row_bytes(columns) // 4)), matrix.expert),
        Part(f"{module}.scales", per_group, matrix.expert),
        Part(f"{module}.biases", per_group, matrix.expert),
    )


def layout(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> Layout:
    """Every tensor of every output shard. Raises PlanError for what mlx-lm could not load."""
    require_family(checkpoint, "MLX")
    require_settings(checkpoint, PROFILE.name)
    told(checkpoint)  # what cannot be told is refused before any work
    require_agreement(checkpoint, choices, "MLX", PROFILE.unit_of)
    if checkpoint.architecture.name == "deepseek_v3":
        again = [name for name, choice in choices.items() if name.endswith("kv_b_proj.weight") and choice != KEPT]
        if again:
            raise PlanError(
                f"mlx-lm splits {again[0]} by head and would quantize it a second time. Keep it, and those of the "
                "other layers, with --pin '*.kv_b_proj=16'."
            )
    return safetensors_layout(
        checkpoint, choices, parts, partial(as_published, checkpoint), left_out(checkpoint, PROFILE.name)
    )


def quantization_config(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> dict[str, Any]:
    """What config.json says: the most common choice, and every module that has another. Empty if none is quantized."""
    modules = {module_path(matrix): choices.get(matrix.name, KEPT) for matrix in checkpoint.matrices}
    quantized = {module: choice for module, choice in modules.items() if choice != KEPT}
    if not quantized:
        return {}
    (usual, _), *_ = Counter(quantized.values()).most_common(1)
    others = {module: _settings(choice) for module, choice in quantized.items() if choice != usual}
    return {**_settings(usual), "mode": "affine", **others}


def _settings(choice: Choice) -> dict[str, Any]:
    return {"group_size": choice.group_size, "bits": choice.bits}


def told(checkpoint: Checkpoint) -> dict[str, Any]:
    """Settings as mlx-lm must read them: those that it has a default of its own for, and those of older names.

    It says nothing of a rotary base or a type that it does not find.
    """
    if not checkpoint.architecture.num_experts_keys:
        return _told_of_dense(checkpoint)
    known = family_settings(PROFILE.name, checkpoint.architecture)
    config, keys = require_settings(checkpoint, PROFILE.name), checkpoint.architecture.num_experts_keys
    found = {key: config[key] for key in known.carried if config.get(key) is not None}
    if keys:
        found[keys[0]] = checkpoint.architecture.experts_per_layer(checkpoint.config)
    rope = {key: value for key, value in (config.get(ROPE) or {}).items() if value is not None and key != "type"}
    if rope:
        found["rope_theta"] = rope.pop("rope_theta", None)
        kind = rope.pop("rope_type", "default")
        found["rope_scaling"] = None if kind == "default" else {"type": kind, "rope_type": kind, **rope}
    return {key: value for key, value in found.items() if checkpoint.config.get(key) != value}


def _told_of_dense(checkpoint: Checkpoint) -> dict[str, Any]:
    """The same of a family without experts: every setting of its class, and rotary ones by their older names."""
    settings = settings_of(checkpoint)
    found = {key: settings[key] for key in model_settings(checkpoint) if settings.get(key) is not None}
    rope = found.pop(ROPE, None) or settings.get(ROPE)
    parts: Any = {} if rope is None else rope
    if isinstance(parts, dict) and isinstance(local := parts.get("sliding_attention"), dict):
        found["rope_local_base_freq"] = local.get("rope_theta")
        parts = parts.get("full_attention")
    if not isinstance(parts, dict):
        raise ArchitectureError(f"config.json: {ROPE} is {rope!r:.80}, not an object. Restore the original file.")
    parts = {key: value for key, value in parts.items() if value is not None and not isinstance(value, dict)}
    found["rope_theta"], kind = parts.pop("rope_theta", None), parts.pop("rope_type", "default")
    parts.pop("type", None)
    if kind != "default":
        found["rope_scaling"] = {"type": kind, "rope_type": kind, **parts}
    elif checkpoint.config.get("rope_scaling") is not None:
        found["rope_scaling"] = None
    return {key: value for key, value in found.items() if checkpoint.config.get(key) != value}


def write_rest(folder: Path, checkpoint: Checkpoint, plan: Plan, written: Layout) -> None:
    """Config, index and tokenizer. The quantization appears twice, as mlx-lm writes it."""
    config = told(checkpoint)
    if quantization := quantization_config(checkpoint, plan.every_choice()):
        config |= {"quantization": quantization, "quantization_config": quantization}
    write_model_folder(folder, checkpoint, written.entries, config)


def encode(matrix: QuantizedMatrix) -> tuple[Any, ...]:
    """Packed codes, scales and biases. Raises MissingExtraError now rather than when all is to be read back."""
    _library()
    return matrix.codes.view(torch.uint32), matrix.scales, matrix.offsets


def _library() -> Any:
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
    words = parts[0].view(shape[0], -1).numpy()
    scales, biases = (part.view(shape[0], -1) for part in parts[1:])

    def rows(part: slice) -> torch.Tensor:
        arrays = (words[part], scales[part].float().numpy(), biases[part].float().numpy())
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


def fault(name: str, choice: Choice, stored: Sequence[Stored], parts: Sequence[torch.Tensor]) -> str | None:
    """Why a matrix is not what the plan says, or None."""
    if choice.kept:
        return kept_fault(name, stored)
    *before, groups = stored[1].shape
    words = choice.row_bytes(groups * choice.group_size) // 4
    return shape_fault(name, choice, stored, ((*before, words), (*before, groups), (*before, groups)))


_QUANTIZED = tuple(Choice(bits, group_size) for bits in BITS for group_size in GROUP_SIZES)

PROFILE = Profile(
    name="mlx",
    summary="MLX affine: 2, 3, 4, 5, 6, 8 bit, one choice per layer and projection",
    unit="layer × projection",
    choices=(*_QUANTIZED, Choice(16)),
    defaults=_QUANTIZED,
    with_bits=with_bits,
    storage_bytes=storage_bytes,
    file_bytes=lambda matrix, choice: added_bytes(parts(matrix, choice)),
    obstacle=ragged,
    quantizer="affine",
    export=Export(
        layout=layout,
        encode=encode,
        reader=reader,
        stored=safetensors_stored,
        usage="Run it: mlx_lm.generate --model {out} --prompt '…'",
        write_rest=write_rest,
        fault=fault,
        run=Run("mlx-lm", logits, tolerance=0.01),
        shape=lambda choice, stored: (stored[1].shape[-2], stored[1].shape[-1] * choice.group_size),
    ),
)
