"""The GPTQModel profile: every expert and projection chooses alone, in the GPTQ v2 layout.

A matrix X becomes `X.qweight` (int32 [in·b/32, out], q least significant bits first along a column), `X.qzeros`
(int32 [in/g, out·b/32], along a row), `X.scales` (float16 [in/g, out]) and `X.g_idx` (int32 [in], the group of each
input). Our packed codes and zero points are these words, transposed.

A GPTQ file stores zero points whether or not they are all equal, so a symmetric choice would save nothing: only
asymmetric ones are offered. They are packed as they are (v2); v1 stores the zero point minus one and so has no
place for zero. Source: TorchLinear of GPTQModel 7.7, which runs on any device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import alphaq
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec
from alphaq.engines.export import (
    KEPT,
    Export,
    Layout,
    Part,
    Rows,
    Run,
    Stored,
    added_bytes,
    kept_fault,
    kept_part,
    linear_choices,
    module_name,
    module_patterns,
    require_family,
    safetensors_layout,
    safetensors_stored,
    shape_fault,
    write_json,
    write_model_folder,
)
from alphaq.engines.placement import left_out
from alphaq.engines.profile import Profile, ragged
from alphaq.engines.settings import require_settings
from alphaq.errors import ChoiceError, MissingEngineError, PlanError
from alphaq.formats.blocks import dequantized_rows, native_format
from alphaq.formats.native import GROUP_SIZES
from alphaq.formats.packing import pack, unpack
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role, Shape
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix

DENSE_KEPT = ("qwen2_moe", "qwen3_moe")
"""Families of whose layers without experts GPTQModel knows nothing."""
BITS = (2, 3, 4, 8)
DEFAULT_GROUP_SIZE = 128  # GPTQModel's own
PACKED_ROWS = 32  # 32 codes fill whole int32 words at every width


def with_bits(bits: int) -> Choice:
    """Groups of 128, or 16. Raises ChoiceError for a width that GPTQModel lacks."""
    if bits == KEPT.bits:
        return KEPT
    if bits not in BITS:
        raise ChoiceError(f"GPTQModel has no {bits}-bit weights. Available: {', '.join(map(str, BITS))}, 16 (kept).")
    return Choice(bits, DEFAULT_GROUP_SIZE)


def storage_bytes(choice: Choice, shape: Shape) -> int:
    """Exact bytes of `qweight`, `qzeros`, `scales` and `g_idx`."""
    if choice.kept:
        return 2 * shape[0] * shape[1]
    return sum(native_format(choice).parts(choice, shape)) + 4 * shape[1]


def obstacle(choice: Choice, matrix: MatrixRef) -> str | None:
    """Codes are packed along the columns and zero points along the rows, in whole words; groups are whole too."""
    if choice.kept:
        return None
    rows, columns = matrix.shape
    if rows % PACKED_ROWS or columns % PACKED_ROWS:
        return f"its shape {rows}×{columns} is not in multiples of {PACKED_ROWS}"
    return ragged(choice, matrix)


def shapes(choice: Choice, shape: Shape) -> tuple[tuple[int, ...], ...]:
    """Shapes of `qweight`, `qzeros`, `scales` and `g_idx`."""
    (rows, columns), groups = shape, choice.groups(shape[1])
    return (columns * choice.bits // 32, rows), (groups, rows * choice.bits // 32), (groups, rows), (columns,)


def as_loaded(tensor: str) -> str:
    """A tensor's name in the model that transformers 5 builds and GPTQModel fills: every MoE block is `mlp` there."""
    return tensor.replace(".block_sparse_moe.", ".mlp.")


def module_path(matrix: MatrixRef) -> str:
    """The module that a matrix belongs to, in the model that GPTQModel fills."""
    module = module_name(as_loaded(matrix.name))
    if matrix.role is Role.EXPERT:
        return f"{module.rpartition('.')[0]}.{matrix.projection}_proj"
    return module


def parts(matrix: MatrixRef, choice: Choice) -> tuple[Part, ...]:
    """The tensors of one matrix."""
    module = module_path(matrix)
    if choice.kept:
        return (kept_part(matrix, f"{module}.weight"),)
    kinds = zip(("qweight", "qzeros", "scales", "g_idx"), ("I32", "I32", "F16", "I32"), strict=True)
    return tuple(
        Part(f"{module}.{name}", TensorSpec(dtype, shape))
        for (name, dtype), shape in zip(kinds, shapes(choice, matrix.shape), strict=True)
    )


def layout(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> Layout:
    """Every tensor of every output shard. Raises PlanError for what GPTQModel could not load."""
    require_family(checkpoint, "GPTQModel")
    require_settings(checkpoint, PROFILE.name)
    if checkpoint.architecture.name in DENSE_KEPT:
        for matrix in checkpoint.with_role(Role.DENSE_MLP):
            if choices.get(matrix.name, KEPT) != KEPT:
                raise PlanError(
                    f"GPTQModel does not quantize dense layers of {checkpoint.architecture.name}, such as "
                    f"{matrix.name}. Keep them with --pin 'dense_mlp=16'."
                )
    return safetensors_layout(checkpoint, choices, parts, as_loaded, left_out(checkpoint, PROFILE.name))


def quantization_config(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> dict[str, Any]:
    """What config.json and quantize_config.json say; empty if nothing is quantized.

    The most common choice is the rule; `dynamic` holds the exceptions as regular expressions, of which the first that
    matches counts (they exclude one another): `+:` for another choice, `-:` for what is kept.
    """
    known = linear_choices(checkpoint, choices, module_path)
    modules: dict[Choice, list[str]] = {}
    for module, choice in known.items():
        modules.setdefault(choice, []).append(module)
    counts = Counter({choice: len(names) for choice, names in modules.items() if choice != KEPT})
    if not counts:
        return {}
    (usual, _), *_ = counts.most_common(1)
    dynamic = {
        f"{'-' if choice == KEPT else '+'}:^{pattern}$": {} if choice == KEPT else _settings(choice)
        for choice, names in sorted(modules.items())
        if choice != usual
        for pattern in module_patterns(names, known)
    }
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        **_settings(usual),
        "desc_act": False,
        "sym": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "meta": {"quantizer": [f"alphaq:{alphaq.__version__}"]},
    }


def _settings(choice: Choice) -> dict[str, int]:
    return {"bits": choice.bits, "group_size": choice.group_size}


def write_rest(folder: Path, checkpoint: Checkpoint, plan: Plan, written: Layout) -> None:
    """Config, twice as GPTQModel writes it, index and tokenizer."""
    config = quantization_config(checkpoint, plan.every_choice())
    write_model_folder(folder, checkpoint, written.entries, {"quantization_config": config} if config else {})
    if config:
        write_json(folder / "quantize_config.json", config)


def encode(matrix: QuantizedMatrix) -> tuple[torch.Tensor, ...]:
    """qweight, qzeros, scales and g_idx."""
    choice, columns = matrix.choice, matrix.shape[1]
    assert matrix.offsets is not None  # only asymmetric choices are offered
    zeros = torch.from_numpy(pack(matrix.offsets.T.contiguous().numpy(), choice.bits))
    words = matrix.codes.view(torch.int32)
    return words.T, zeros.view(torch.int32), matrix.scales.T, _group_of(choice, columns)


def _group_of(choice: Choice, columns: int) -> torch.Tensor:
    return torch.arange(columns, dtype=torch.int32) // choice.group_size


def reader(parts: Sequence[torch.Tensor], choice: Choice, shape: Shape, name: str) -> Rows:
    """Rows in float32. GPTQModel is not used: it cannot be installed beside the versions that we need."""
    qweight, qzeros, scales = (part.view(size) for part, size in zip(parts[:3], shapes(choice, shape)[:3], strict=True))
    zeros = unpack(qzeros.contiguous().view(torch.uint8).numpy(), choice.bits, shape[0])
    matrix = QuantizedMatrix(
        choice,
        shape,
        qweight.T.contiguous().view(torch.uint8),
        scales.T.contiguous(),
        torch.from_numpy(zeros).T.contiguous(),
    )
    return lambda rows: dequantized_rows(matrix, rows)


def logits(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """What GPTQModel's TorchLinear computes, float32 [tokens, words]."""
    try:
        from gptqmodel import GPTQModel
    except ImportError:
        raise MissingEngineError("GPTQModel", "gptqmodel") from None
    loaded = GPTQModel.load(str(folder), backend="gptq_torch", device="cpu", dtype=torch.float16)
    with torch.inference_mode():
        values: torch.Tensor = loaded.model(input_ids=torch.tensor([list(ids)])).logits[0].float()
    return values


def fault(name: str, choice: Choice, stored: Sequence[Stored], parts: Sequence[torch.Tensor]) -> str | None:
    """Why a matrix is not what the plan says, or None."""
    if choice.kept:
        return kept_fault(name, stored)
    rows, columns = stored[0].shape[1], stored[3].shape[0]
    if why := shape_fault(name, choice, stored, shapes(choice, (rows, columns))):
        return why
    return None if torch.equal(parts[3], _group_of(choice, columns)) else f"{name} has groups out of order in g_idx"


_QUANTIZED = tuple(Choice(bits, group_size) for bits in BITS for group_size in GROUP_SIZES)

PROFILE = Profile(
    name="gptqmodel",
    summary="GPTQ v2: 2, 3, 4, 8 bit, each expert and projection on its own",
    unit="matrix",
    choices=(*_QUANTIZED, Choice(16)),
    defaults=_QUANTIZED,
    with_bits=with_bits,
    storage_bytes=storage_bytes,
    file_bytes=lambda matrix, choice: added_bytes(parts(matrix, choice)),
    obstacle=obstacle,
    quantizer="rtn",
    export=Export(
        layout=layout,
        encode=encode,
        reader=reader,
        stored=safetensors_stored,
        usage="Run it: python -c \"from gptqmodel import GPTQModel; GPTQModel.load('{out}', backend='gptq_torch')\"",
        write_rest=write_rest,
        fault=fault,
        run=Run("GPTQModel", logits, tolerance=0.1),
        shape=lambda choice, stored: (stored[2].shape[1], stored[3].shape[0]),
    ),
)
