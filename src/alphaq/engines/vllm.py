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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alphaq.checkpoint.config import read_config
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec
from alphaq.engines.effective import effective_config
from alphaq.engines.export import Rows, Run
from alphaq.engines.placement import prediction_layers
from alphaq.engines.running import run_in_transformers
from alphaq.engines.safetensors.engine import SafetensorsEngine, words
from alphaq.engines.safetensors.modules import (
    KEPT,
    as_published,
    linear_choices,
    module_name,
    module_of,
    module_patterns,
)
from alphaq.errors import ArchitectureError, MissingExtraError, PlanError
from alphaq.formats.native import GROUP_SIZES
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Shape
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.work.untrusted import JsonObject

FORMAT = "pack-quantized"
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj",
    "kv_a_proj_with_mqa": "fused_qkv_a_proj",
    "in_proj_qkv": "in_proj_qkvz",
    "in_proj_z": "in_proj_qkvz",
    "in_proj_b": "in_proj_ba",
    "in_proj_a": "in_proj_ba",
}
"""What vLLM makes one module of."""
ASKED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""SGLang 0.5 asks for the choice of experts by these names, whatever a family's tensors are called."""


def tensors(choice: Choice, shape: Shape, dtype: str) -> dict[str, TensorSpec]:
    """Codes, scales and the shape."""
    rows, columns = shape
    return {
        "weight_packed": TensorSpec("I32", (rows, words(columns, choice.bits))),
        "weight_scale": TensorSpec(dtype, (rows, choice.groups(columns))),
        "weight_shape": TensorSpec("I64", (2,)),
    }


def _fused(module: str) -> str | None:
    """The module that vLLM merges another into."""
    before, _, leaf = module.rpartition(".")
    return f"{before}.{FUSED[leaf]}" if leaf in FUSED else None


def _asked(expert: str) -> str:
    """The name by which SGLang asks for an expert's matrix."""
    before, _, leaf = expert.rpartition(".")
    return f"{before}.{ASKED.get(leaf, leaf)}"


def _called(checkpoint: Checkpoint, matrix: MatrixRef) -> str:
    """vLLM's name of the module that holds a matrix, which is not always that of its tensors."""
    return ENGINE.lines(checkpoint).called_module(module_name(as_published(checkpoint, matrix.name)))


def quantization_config(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> JsonObject:
    """What config.json says of the weights: a group for each choice of experts, and for each of other modules.

    transformers applies the first group that speaks of experts to all of them, so theirs come first. vLLM reads a
    group's `format`, SGLang the global one too. Merged modules are named: not every model says what it merges.
    """
    known = linear_choices(checkpoint, choices, _called)
    if checkpoint.text_config != checkpoint.config:  # vLLM has the language model in another place than transformers
        known |= linear_choices(checkpoint, choices, module_of)
    known |= {_asked(module): choice for module, choice in known.items() if ".experts." in module}
    alike: dict[tuple[bool, Choice], list[str]] = {}
    for module, choice in known.items():
        routed = ".experts." in module
        modules = alike.setdefault((not routed, choice), [])
        modules.append(module)
        merged = None if routed else _fused(module)
        if merged is not None and merged not in modules:
            modules.append(merged)
    targets = {key: [f"re:.*{pattern}$" for pattern in module_patterns(alike[key], known)] for key in sorted(alike)}
    kept = [name for (_, choice), named in targets.items() if choice == KEPT for name in named]
    if ENGINE.lines(checkpoint).prediction_layers:
        kept += [rf"re:.*\blayers\.{layer}\..*" for layer in prediction_layers(checkpoint)]
    quantized = [(choice, named) for (_, choice), named in targets.items() if choice != KEPT]
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"format": FORMAT, "targets": named, "weights": _settings(choice)}
            for number, (choice, named) in enumerate(quantized)
        },
        "ignore": kept,
    }


def _settings(choice: Choice) -> JsonObject:
    """A choice as compressed-tensors' QuantizationArgs has it."""
    return {
        "num_bits": choice.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": choice.group_size,
    }


def config(checkpoint: Checkpoint, plan: Plan) -> JsonObject:
    """The quantization, and what vLLM must find for the family."""
    quantization = quantization_config(checkpoint, plan.every_choice())
    return _told(checkpoint) | ({"quantization_config": quantization} if quantization["config_groups"] else {})


def _told(checkpoint: Checkpoint) -> JsonObject:
    """What vLLM must find for the family, and config.json does not say."""
    lines = ENGINE.lines(checkpoint)
    settings = effective_config(checkpoint) if lines.derived else {}
    needed = lines.written | {key: one.value(settings) for key, one in lines.derived.items()}
    lacking = {key: value for key, value in needed.items() if checkpoint.text_config.get(key) is None}
    if none := [key for key, value in lacking.items() if value is None]:
        raise ArchitectureError(
            f"config.json lacks what vLLM's {none[0]} is made of, without which it does not start. Restore the "
            "original file."
        )
    assert not lacking or checkpoint.text_config == checkpoint.config  # models inside others are refused
    return lacking


def encode(matrix: QuantizedMatrix) -> tuple[torch.Tensor, ...]:
    """Packed codes, scales and shape. Raises MissingExtraError now rather than when all is to be read back."""
    _decompressor(matrix.choice)
    return matrix.codes.view(torch.int32), matrix.scales, torch.tensor(matrix.shape)


def _decompressor(choice: Choice) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """compressed-tensors' own decompression of a choice."""
    try:
        from compressed_tensors.compressors import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    except ImportError:
        raise MissingExtraError("compressed-tensors", "Files for vLLM are read back by compressed-tensors") from None
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**_settings(choice)))
    decompress: Callable[..., Any] = PackedQuantizationCompressor.decompress
    return lambda stored: decompress(stored, scheme)["weight"]


def reader(parts: Sequence[torch.Tensor], choice: Choice, shape: Shape, name: str) -> Rows:
    """Rows in the model's 16-bit type, by compressed-tensors' own code."""
    decompressed, columns = _decompressor(choice), shape[1]
    packed, scales = (part.view(shape[0], -1) for part in parts[:2])

    def rows(part: slice) -> torch.Tensor:
        size = torch.tensor((part.stop - part.start, columns))
        return decompressed({"weight_packed": packed[part], "weight_scale": scales[part], "weight_shape": size})

    return rows


def logits(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """What transformers computes with the files, which compressed-tensors decompresses, float32 [tokens, words].

    vLLM wants a machine of its own; transformers reads the same files with the same library. Raises PlanError for a
    plan whose experts differ: transformers gives all of them the first choice; and CheckpointError for families of
    which it does not load all from such files (four of Granite's, Qwen3-VL, Gemma 4, Hunyuan 3; transformers 5.23).
    """
    _decompressor(PROFILE.defaults[0])
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)  # fused experts are not matched, but restored
    config = read_config(folder).get("quantization_config") or {"config_groups": {}, "ignore": []}
    of_experts = [group["targets"] for group in config["config_groups"].values()] + [config["ignore"]]
    if sum(any("experts" in target for target in targets) for targets in of_experts) > 1:
        raise PlanError(
            f"{folder} has several choices of experts, which vLLM loads and transformers does not; vLLM is not run "
            f"here. Try it there: vllm serve {folder}"
        )
    vllm = f"vLLM loads them, and is not run here. Drop --run, and try it there: vllm serve {folder}"
    return run_in_transformers(folder, ids, remedy=vllm)


def damage(choice: Choice, shape: Shape, parts: Sequence[torch.Tensor]) -> str:
    """What is wrong with tensors of the right shapes."""
    said = parts[2].tolist()
    return "" if said == list(shape) else f"is of shape {list(shape)}, its weight_shape says {said}"


ENGINE = SafetensorsEngine(
    name="vllm",
    title="vLLM",
    summary="compressed-tensors: 4 and 8 bit symmetric, one choice per layer",
    unit="layer",
    quantized=tuple(Choice(bits, group_size, symmetric=True) for bits in (4, 8) for group_size in GROUP_SIZES),
    group_size=128,
    quantizer="symmetric16",
    tensors=tensors,
    encode=encode,
    reader=reader,
    shape=lambda choice, stored: (stored[1].shape[0], stored[1].shape[1] * choice.group_size),
    config=config,
    usage="Serve it: vllm serve {out}",
    run=Run("transformers with compressed-tensors", logits, tolerance=0.02),
    damage=damage,
    merged=lambda matrix: _fused(module_name(matrix.name)),
)
PROFILE = ENGINE.profile()
