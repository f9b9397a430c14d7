"""How a checkpoint says that its weights are quantized, by whom and how: in config.json or beside it.

A method that `finding` can decode becomes an `Announcement`; every other one is an error that names the tool. What
is decoded is no longer quantized, so `unquantized` takes such words out of a config.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import CheckpointError
from alphaq.work.untrusted import JsonObject, shown

MODELOPT_FILE = "hf_quant_config.json"
QUANTIZER_FILES = (MODELOPT_FILE, "quantize_config.json", "quant_config.json", "quanto_qmap.json")
"""What quantizers write beside a model; an output is quantized otherwise, so it gets none of them."""

FP8, MXFP4, COMPRESSED_TENSORS, MODELOPT = "fp8", "mxfp4", "compressed-tensors", "modelopt"
READABLE = "FP8, MXFP4, NVFP4 and compressed-tensors' integers"
KEYS = ("quantization_config", "compression_config")  # the second by older compressed-tensors
_STORED_KEYS = (*KEYS, "expert_dtype")  # the last is DeepSeek-V4's word for what its experts are stored as

_METHODS = {
    "fp8": FP8,
    "fbgemm_fp8": FP8,
    "mxfp4": MXFP4,
    "compressed-tensors": COMPRESSED_TENSORS,
    "modelopt": MODELOPT,
    "modelopt_fp4": MODELOPT,
    "modelopt_mixed": MODELOPT,
}
_FORMATS = (
    "dense",
    "fakequant",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
_ALGORITHMS = (
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_WO",
    "FP8_PB_REAL",
    "NVFP4",
    "W4A8_NVFP4_FP8",
    "W4A16_NVFP4",
    "W4A8_MXFP4_FP8",
    "MXFP4",
    "MXFP8",
    "MIXED_PRECISION",
)
_TOOLS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "eetq": "EETQ",
    "quanto": "quanto",
    "hqq": "HQQ",
    "torchao": "torchao",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "bitnet": "BitNet",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "quark": "Quark",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "fp_quant": "FP-Quant",
    "mlx": "MLX",
    "alphaq": "AlphaQ",
}
_SIGNS = {
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".W_q": "HQQ",
    "._data": "quanto",
    ".weight_qdata": "torchao",
    ".q_weight": "ExLlamaV2",
    ".trellis": "ExLlamaV3",
}
"""Ends of tensors' names that only one tool writes, for checkpoints whose config does not name it."""

_UNTOLD = (".weight_scale", "_scale_inv", ".weight_packed", ".weight_scale_2", ".qscale_weight")


@dataclass(frozen=True)
class Announcement:
    """What a checkpoint says about its codes.

    where: the file and the key that say so. blocks: rows and columns that may share a scale; only those may if
    `strict`. integers: bits and columns to a scale, None for whole rows, of packed integers.
    """

    method: str
    where: str
    blocks: tuple[tuple[int, int], ...] = ()
    strict: bool = False
    integers: tuple[tuple[int, int | None], ...] = ()


def announcement_of(model: object, config: Mapping[str, Any], beside: Mapping[str, Any] | None) -> Announcement | None:
    """What a config, or else ModelOpt's file `beside` it, says about how weights are stored; None if nothing.

    Raises CheckpointError if that cannot be decoded, naming who quantized the model.
    """
    said_at = list(_announcements(config))
    if beside is not None and not said_at:
        said_at = [(MODELOPT_FILE, beside.get("quantization"))]
    methods: dict[str, Announcement] = {}
    for where, said in said_at:
        if not isinstance(said, dict):
            raise CheckpointError(f"{model}: {where} is not an object. Restore the file.")
        one = _understood(model, where, said)
        methods.setdefault(one.method, one)
    if len(methods) > 1:
        places = " and ".join(one.where for one in methods.values())
        raise _already(model, " and ".join(methods), places)
    return next(iter(methods.values()), None)


def unquantized(config: Mapping[str, Any]) -> JsonObject:
    """A copy of a config that says nothing of how weights were stored, in its parts neither."""
    dropped = _STORED_KEYS if any(_announcements(config)) else KEYS
    return _without(config, dropped)


def require_no_codes(model: object, tensors: Iterable[TensorInfo], announcement: Announcement | None) -> None:
    """Raise CheckpointError for tensors of a quantized model that nothing tells of."""
    for tensor in tensors:
        for end, tool in _SIGNS.items():
            if tensor.name.endswith(end):
                raise _already(model, tool, f"the tensor {tensor.name}")
        if tensor.dtype == "U32" and tensor.name.endswith(".weight"):
            raise _already(model, "MLX", f"the tensor {tensor.name}")
        if announcement is None and (tensor.name.endswith(_UNTOLD) or tensor.dtype == "F8_E8M0"):
            raise CheckpointError(
                f"{tensor.name} belongs to a quantized weight, but neither config.json nor {MODELOPT_FILE} says how it "
                "is stored. Restore config.json."
            )


def _announcements(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Where a config and its parts speak of quantization, and what they say."""
    parts = [("", config)]
    for path, part in parts:
        mlx = _is_mlx(part.get("quantization"))
        for key in ["quantization"] if mlx else KEYS:
            if part.get(key):
                yield f"config.json, {path}{key}", {"quant_method": "mlx"} if mlx else part[key]
        parts += [
            (f"{path}{key}.", value) for key, value in part.items() if key not in KEYS and isinstance(value, dict)
        ]


def _is_mlx(said: object) -> bool:
    return isinstance(said, dict) and "bits" in said and "group_size" in said


def _without(part: Mapping[str, Any], dropped: tuple[str, ...]) -> JsonObject:
    return {
        key: _without(value, dropped) if isinstance(value, dict) else value
        for key, value in part.items()
        if key not in dropped
    }


def _already(model: object, tool: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{model} is already quantized by {tool} ({where}), which cannot be decoded. Give the original 16-bit "
        f"checkpoint; of quantized ones only {READABLE} can be read."
    )


def _understood(model: object, where: str, said: Mapping[str, Any]) -> Announcement:
    named = _method(said)
    method = _METHODS.get(named) if isinstance(named, str) else None
    if where == MODELOPT_FILE:
        method = MODELOPT
    if method in (FP8, MXFP4):
        blocks, strict = _fp8_blocks(said)
        return Announcement(method, where, blocks, strict)
    if method == MODELOPT:
        algorithm = said.get("quant_algo")
        if algorithm is not None and algorithm not in _ALGORITHMS:
            raise _already(model, f"ModelOpt as {shown(algorithm)}", where)
        return Announcement(MODELOPT, where, ((128, 128),))
    if method == COMPRESSED_TENSORS:
        return _compressed(model, where, said)
    tool = _TOOLS.get(named.lower(), shown(named)) if isinstance(named, str) else "an unknown tool"
    raise _already(model, tool, where)


def _method(said: Mapping[str, Any]) -> object:
    """The quant_method, or what stands for one where it is left out."""
    if "quant_method" in said:
        return said["quant_method"]
    known = {"quant_algo": "modelopt", "config_groups": "compressed-tensors", "load_in_4bit": "bitsandbytes"}
    return next((method for key, method in known.items() if key in said), None)


def _fp8_blocks(said: Mapping[str, Any]) -> tuple[tuple[tuple[int, int], ...], bool]:
    """The blocks of FP8 weights, and whether no other can be: where none is named, a scale is to 128², a row or all."""
    stated = said.get("weight_block_size")
    if stated is None:
        return ((128, 128),), False
    block = _block(stated)
    if block is None:
        raise CheckpointError(
            f"config.json: weight_block_size is {shown(stated)}, not two positive numbers. Restore config.json, or "
            "start from the 16-bit checkpoint."
        )
    return (block,), True


def _block(value: object) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n < 2**31 for n in value):
        return value[0], value[1]
    return None


def _compressed(model: object, where: str, said: Mapping[str, Any]) -> Announcement:
    groups = said.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise CheckpointError(f"{model}: {where}.config_groups is not an object. Restore the file.")
    schemes: list[Mapping[str, Any]] = [scheme for scheme in groups.values() if isinstance(scheme, dict)]
    for form in (said.get("format"), *(scheme.get("format") for scheme in schemes)):
        if form is not None and form not in _FORMATS:
            raise _already(model, f"compressed-tensors as {shown(form)}", where)
    sparsity = said.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise _already(model, "compressed-tensors with sparsity", where)
    if said.get("transform_config"):
        raise _already(model, "compressed-tensors with rotations (transform_config)", where)
    weights: list[Mapping[str, Any]] = [one for scheme in schemes if isinstance(one := scheme.get("weights"), dict)]
    blocks = [block for one in weights if (block := _block(one.get("block_structure"))) is not None]
    integers = [
        (one["num_bits"], size if type(size := one.get("group_size")) is int and 0 < size < 2**31 else None)
        for one in weights
        if one.get("type", "int") == "int" and type(one.get("num_bits")) is int
    ]
    return Announcement(
        COMPRESSED_TENSORS,
        where,
        tuple(dict.fromkeys([*blocks, (128, 128)])),
        integers=tuple(dict.fromkeys(integers)),
    )
