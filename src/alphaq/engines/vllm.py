"""The vLLM profile: compressed-tensors `pack-quantized`, one choice for all experts of a layer.

A matrix X becomes `X.weight_packed` (int32 [out, ⌈in·b/32⌉], q least significant bits first along a row),
`X.weight_scale` (the model's 16-bit type, [out, in/g]) and `X.weight_shape` (int64 [2]); config.json says by regular
expressions which modules have which choice. vLLM looks up only expert 0's, and runs q, k, v and gate, up as one.

Marlin's fused experts take symmetric 4 and 8 bit with groups of 32, 64 and 128 if the hidden size is a multiple
of 128; other hidden sizes fall back to Triton. On CPU there is no kernel for 8 bits in groups. Under tensor
parallelism the group size must also divide each rank's share of the intermediate size, which depends on the
server, not the file. Source: vLLM 0.32, compressed-tensors 0.20.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alphaq.checkpoint.reader import Checkpoint, read_config
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
    as_published,
    kept_dtype,
    kept_fault,
    kept_part,
    linear_choices,
    module_name,
    module_patterns,
    require_agreement,
    require_family,
    safetensors_layout,
    safetensors_stored,
    shape_fault,
    write_model_folder,
)
from alphaq.engines.placement import left_out
from alphaq.engines.profile import Profile, ragged
from alphaq.engines.running import run_in_transformers
from alphaq.engines.settings import family_settings, require_settings
from alphaq.errors import ChoiceError, MissingExtraError, PlanError
from alphaq.formats.blocks import native_format
from alphaq.formats.native import GROUP_SIZES
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role, Shape
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix

FORMAT = "pack-quantized"
CHOICE_OF_BITS = {4: Choice(4, 128, symmetric=True), 8: Choice(8, 128, symmetric=True), 16: Choice(16)}
WEIGHT_SHAPE_BYTES = 16  # int64[2]
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj",
}
"""What vLLM makes one module of."""


def with_bits(bits: int) -> Choice:
    """Symmetric with groups of 128, or 16. Raises ChoiceError unless bits is 4, 8 or 16."""
    if bits not in CHOICE_OF_BITS:
        raise ChoiceError(f"vLLM's kernels for these files know no {bits}-bit weights. Available: 4, 8, 16 (kept).")
    return CHOICE_OF_BITS[bits]


def storage_bytes(choice: Choice, shape: Shape) -> int:
    """Exact bytes of `weight_packed`, `weight_scale` and `weight_shape`."""
    if choice.kept:
        return 2 * shape[0] * shape[1]
    return sum(native_format(choice).parts(choice, shape)) + WEIGHT_SHAPE_BYTES


def parts(matrix: MatrixRef, choice: Choice) -> tuple[Part, ...]:
    """The tensors of one matrix."""
    if choice.kept:
        return (kept_part(matrix, matrix.name),)
    module, (rows, columns) = module_name(matrix.name), matrix.shape
    return (
        Part(f"{module}.weight_packed", TensorSpec("I32", (rows, choice.row_bytes(columns) // 4))),
        Part(f"{module}.weight_scale", TensorSpec(kept_dtype(matrix.dtype), (rows, choice.groups(columns)))),
        Part(f"{module}.weight_shape", TensorSpec("I64", (2,))),
    )


def layout(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> Layout:
    """Every tensor of every output shard. Raises PlanError for what vLLM could not load."""
    require_family(checkpoint, "vLLM")
    require_settings(checkpoint, PROFILE.name)
    require_agreement(checkpoint, choices, "vLLM", _unit)
    return safetensors_layout(
        checkpoint, choices, parts, partial(as_published, checkpoint), left_out(checkpoint, PROFILE.name)
    )


def _unit(matrix: MatrixRef) -> str | None:
    """What vLLM runs a matrix with as one; None for what it does not quantize."""
    if matrix.role is Role.EXPERT:
        return PROFILE.unit_of(matrix)
    return _fused(module_name(matrix.name))


def _fused(module: str) -> str | None:
    """The module that vLLM merges another into."""
    before, _, leaf = module.rpartition(".")
    return f"{before}.{FUSED[leaf]}" if leaf in FUSED else None


def quantization_config(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> dict[str, Any]:
    """What config.json says of the weights: a group for each choice of experts, and for each of other modules.

    transformers applies the first group that speaks of experts to all of them, so theirs come first. vLLM reads a
    group's `format`, SGLang the global one. Merged modules are named too: not every model says what it merges.
    """
    known = linear_choices(checkpoint, choices, lambda matrix: module_name(as_published(checkpoint, matrix.name)))
    alike: dict[tuple[bool, Choice], list[str]] = {}
    for module, choice in known.items():
        routed = ".experts." in module
        modules = alike.setdefault((not routed, choice), [])
        modules.append(module)
        merged = None if routed else _fused(module)
        if merged is not None and merged not in modules:
            modules.append(merged)
    groups: dict[str, Any] = {}
    ignored: list[str] = []
    for (_, choice), modules in sorted(alike.items()):
        targets = [f"re:.*{pattern}$" for pattern in module_patterns(modules, known)]
        if choice == KEPT:
            ignored += targets
            continue
        groups[f"group_{len(groups)}"] = {
            "format": FORMAT,
            "targets": targets,
            "weights": {
                "num_bits": choice.bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": choice.group_size,
            },
        }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
    }


def write_rest(folder: Path, checkpoint: Checkpoint, plan: Plan, written: Layout) -> None:
    """Config, index and tokenizer."""
    choices = plan.every_choice()
    quantization = quantization_config(checkpoint, choices)
    needed = family_settings(PROFILE.name, checkpoint.architecture).written
    config = {key: value for key, value in needed.items() if checkpoint.config.get(key) is None}
    if quantization["config_groups"]:
        config["quantization_config"] = quantization
    write_model_folder(folder, checkpoint, written.entries, config)


def encode(matrix: QuantizedMatrix) -> tuple[torch.Tensor, ...]:
    """Packed codes, scales and shape. Raises MissingExtraError now rather than when all is to be read back."""
    _library()
    return matrix.codes.view(torch.int32), matrix.scales, torch.tensor(matrix.shape)


def _library() -> tuple[Any, Any]:
    """compressed-tensors' decompression, and what makes the description of a choice for it."""
    try:
        from compressed_tensors.compressors import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    except ImportError:
        raise MissingExtraError("compressed-tensors", "Files for vLLM are read back by compressed-tensors") from None

    def scheme(choice: Choice) -> Any:
        weights = QuantizationArgs(
            num_bits=choice.bits, type="int", symmetric=True, strategy="group", group_size=choice.group_size
        )
        return QuantizationScheme(targets=["Linear"], weights=weights)

    return PackedQuantizationCompressor.decompress, scheme


def reader(parts: Sequence[torch.Tensor], choice: Choice, shape: Shape, name: str) -> Rows:
    """Rows in the model's 16-bit type, by compressed-tensors' own code."""
    decompress, scheme = _library()
    columns, described = shape[1], scheme(choice)
    packed, scales = (part.view(shape[0], -1) for part in parts[:2])

    def rows(part: slice) -> torch.Tensor:
        size = torch.tensor((part.stop - part.start, columns))
        stored = {"weight_packed": packed[part], "weight_scale": scales[part], "weight_shape": size}
        values: torch.Tensor = decompress(stored, described)["weight"]
        return values

    return rows


def logits(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """What transformers computes with the files, which compressed-tensors decompresses, float32 [tokens, words].

    Raises PlanError for a plan whose experts differ: transformers gives all of them the first choice.
    """
    _library()
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)  # fused experts are not matched, but restored
    config = read_config(folder).get("quantization_config") or {"config_groups": {}, "ignore": []}
    of_experts = [group["targets"] for group in config["config_groups"].values()] + [config["ignore"]]
    if sum(any("experts" in target for target in targets) for targets in of_experts) > 1:
        raise PlanError(
            f"{folder} has several choices of experts, which vLLM loads and transformers does not; vLLM is not run "
            f"here. Try it there: vllm serve {folder}"
        )
    return run_in_transformers(folder, ids)


def fault(name: str, choice: Choice, stored: Sequence[Stored], parts: Sequence[torch.Tensor]) -> str | None:
    """Why a matrix is not what the plan says, or None."""
    if choice.kept:
        return kept_fault(name, stored)
    rows, columns = parts[2].tolist()
    packed, scales = (rows, choice.row_bytes(columns) // 4), (rows, choice.groups(columns))
    return shape_fault(name, choice, stored, (packed, scales, (2,)))


_QUANTIZED = tuple(Choice(bits, group_size, symmetric=True) for bits in (4, 8) for group_size in GROUP_SIZES)

PROFILE = Profile(
    name="vllm",
    summary="compressed-tensors: 4 and 8 bit symmetric, one choice per layer",
    unit="layer",
    choices=(*_QUANTIZED, Choice(16)),
    defaults=_QUANTIZED,
    with_bits=with_bits,
    storage_bytes=storage_bytes,
    file_bytes=lambda matrix, choice: added_bytes(parts(matrix, choice)),
    obstacle=ragged,
    quantizer="symmetric16",
    merged={"gate": "gate_up", "up": "gate_up"},
    export=Export(
        layout=layout,
        encode=encode,
        reader=reader,
        stored=safetensors_stored,
        usage="Serve it: vllm serve {out}",
        write_rest=write_rest,
        fault=fault,
        # vLLM wants a machine of its own; transformers reads the same files with the same library.
        run=Run("transformers with compressed-tensors", logits, tolerance=0.02),
        shape=lambda choice, stored: (stored[1].shape[0], stored[1].shape[1] * choice.group_size),
    ),
)
