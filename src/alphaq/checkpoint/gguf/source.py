"""A GGUF file seen as a Hugging Face checkpoint, so that every later stage works on it unchanged.

A stack of experts [experts, rows, columns] is as many matrices, each contiguous in the file, so it is shown as
tensors of their own under the names that the family's checkpoints use. The config is made of the metadata. What is
called what is in the `[gguf]` table of the architecture's file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alphaq.checkpoint.families.architecture import Architecture, architectures
from alphaq.checkpoint.files import check_link
from alphaq.checkpoint.gguf.format import GgufFile, GgufTensor, read_gguf
from alphaq.checkpoint.gguf.mapping import GgufKey, GgufMapping
from alphaq.checkpoint.gguf.plain import MAX_MATRICES, Matched, open_plain
from alphaq.checkpoint.gguf.rope import FACTORS_TENSOR, llama3_settings
from alphaq.checkpoint.gguf.values import GgufValue, Scalar
from alphaq.checkpoint.safetensors_format import TORCH_DTYPES
from alphaq.checkpoint.tensors import Encoding, TensorInfo
from alphaq.errors import ArchitectureError, CheckpointError
from alphaq.formats.ggml import GGML_TYPES
from alphaq.work.untrusted import JsonObject, shown

READABLE_TYPES = ("BF16", "F16", "F32", "Q8_0")
_NUMBERS = ("I8", "I16", "I32", "I64", "F64")  # of tables, which nothing quantizes
_HEADS = {"permute_q": "num_attention_heads", "permute_k": "num_key_value_heads"}
"""Transforms of heads that can be undone, with the config key of the heads whose rows they reorder."""
_SHIFTED = "plus_one"
"""The other transform that can be undone."""

_FUSED = {"blk.{layer}.ffn_gate_up_exps.weight": ("blk.{layer}.ffn_gate_exps.weight", "blk.{layer}.ffn_up_exps.weight")}
"""Stacks of newer files whose experts' rows are those of two stacks."""

_ROUTER_OF_ONE = "blk.{layer}.ffn_gate_inp_shexp.weight"
"""A matrix of one row in a checkpoint, but in some files a vector."""

_MAY_LACK = (
    *("rope.", "attention.key_length", "attention.value_length", "attention.head_count_kv", "vocab_size"),
    "final_logit_softcapping",
)
_ROPE_BASES = ("rope.freq_base", "rope.freq_base_swa")
MAX_NUMBER = 1e12
_USUAL_ROPE_BASE = 10_000.0  # what llama.cpp takes if a file does not say


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file as a checkpoint. shards: tensors under their Hugging Face names, by the file that holds them.

    names: Hugging Face name → the GGUF tensor that holds it. A file of a family that is not known has GGUF's names.
    """

    file: GgufFile
    architecture: Architecture
    config: JsonObject
    shards: dict[str, dict[str, TensorInfo]]
    names: dict[str, str]
    matched: Matched | None = None
    """Matrices and roles, where names alone tell them."""


def find_gguf(model: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only model of a folder that holds no other kind of weights.

    Raises CheckpointError if a folder holds several.
    """
    if model.suffix == ".gguf" and not model.is_dir():
        return model
    if not model.is_dir() or (model / "config.json").exists():
        return None
    files = sorted(
        path for path in model.glob("*.gguf") if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", path.name)
    )
    if len(files) > 1:
        raise CheckpointError(f"{model} holds {len(files)} models, {files[0].name} among them. Name the file instead.")
    for path in files:
        check_link(path)
    return files[0] if files else None


def open_gguf(path: Path, quantized: bool = False) -> GgufModel:
    """Open a model's GGUF file, or the first of its parts. quantized: whether it may be of any type.

    Raises CheckpointError if it is damaged or quantized.
    """
    file = read_gguf(path)
    where = file.files[0]
    for tensor in file.tensors.values():
        if tensor.type not in (*READABLE_TYPES, *_NUMBERS) and not quantized:
            raise CheckpointError(
                f"{where}: {tensor.name} is already quantized to {tensor.type}. Start from a file in "
                f"{', '.join(READABLE_TYPES)}, or add --requantize, which plan, quantize and analyze take."
            )
    family = _architecture(file)
    if family is None:
        return _by_names(file)
    try:
        return _as_family(file, *family)
    except ArchitectureError as unlike:
        return _by_names(file, f"{unlike} Until then it is read by names alone, for llama.cpp only")


def _by_names(file: GgufFile, *notes: str) -> GgufModel:
    """A file that no table describes."""
    plain = open_plain(file)
    matched = replace(plain.matched, notes=(*notes, *plain.matched.notes))
    return GgufModel(file, plain.architecture, plain.config, plain.shards, plain.names, matched)


def _as_family(file: GgufFile, architecture: Architecture, mapping: GgufMapping) -> GgufModel:
    """A file that a table describes. Raises ArchitectureError for what table or configs lack."""
    where = file.files[0]
    config = _config(file, architecture, mapping, where) | {"model_type": architecture.model_types[0]}
    if FACTORS_TENSOR in file.tensors and any(rule.made for rule in mapping.tensors):
        config["rope_parameters"] = _rope_of_factors(file, config, where)
    shards: dict[str, dict[str, TensorInfo]] = {part: {} for part in file.files}
    names: dict[str, str] = {}
    for tensor in file.tensors.values():
        for info in _views(tensor, mapping, architecture, config, where):
            if info.name in names:
                raise CheckpointError(f"{where}: {tensor.name} and {names[info.name]} are the same. Convert it again.")
            if len(names) >= MAX_MATRICES:
                raise CheckpointError(f"{where} claims more than {MAX_MATRICES} matrices. Download the file again.")
            names[info.name] = tensor.name
            shards[tensor.file][info.name] = info
    return GgufModel(file, architecture, config, shards, names)


def _architecture(file: GgufFile) -> tuple[Architecture, GgufMapping] | None:
    """The family of a file, None if there is no table to read it by, or one of changes that cannot be undone.

    One architecture of llama.cpp's may be that of a family with experts and of one without.
    """
    name = file.metadata["general.architecture"].value if "general.architecture" in file.metadata else None
    count = file.metadata.get(f"{name}.expert_count")
    sparse = count is not None and bool(count.value)
    found: tuple[Architecture, GgufMapping] | None = None
    for architecture in architectures().values():
        mapping = architecture.gguf
        if mapping is None or mapping.arch != name:
            continue
        if not all(not rule.transform or rule.transform in (*_HEADS, _SHIFTED) for rule in mapping.tensors):
            continue
        if found is None or (_suits(architecture, sparse) and not _suits(found[0], sparse)):
            found = architecture, mapping
    return found


def _suits(architecture: Architecture, sparse: bool) -> bool:
    return bool(architecture.num_experts_keys) == sparse


# -- metadata → config ----------------------------------------------------------------------------


def _config(file: GgufFile, architecture: Architecture, mapping: GgufMapping, where: str) -> JsonObject:
    config: JsonObject = {}
    for key, origin in mapping.metadata.items():
        value = _scalar(file.metadata, f"{mapping.arch}.{key}", where)
        if value is None and key in _ROPE_BASES:
            value = _USUAL_ROPE_BASE
        if value is None and not origin.values and (origin.required or not key.startswith(_MAY_LACK)):
            raise ArchitectureError(
                f"{where} lacks {mapping.arch}.{key}; it may hold another kind of model or come from an old converter. "
                "Convert the model again with a current llama.cpp."
            )
        target = origin.config[0] if origin.config else ""
        if not re.fullmatch(r"[\w.]+", target):
            continue  # a formula, of values that other keys give
        value = _meant(origin, value, f"{where}: {mapping.arch}.{key}")
        if value is not None:
            _set(config, target, value, f"{where}: {mapping.arch}.{key}")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    counts = ("num_attention_heads", "num_key_value_heads", "hidden_size")
    for key in (*counts, "num_experts_per_tok") if architecture.num_experts_keys else counts:
        if type(config.get(key)) is not int or not config[key]:
            raise CheckpointError(f"{where}: its {key} is {config.get(key)!r}, not a count. Download the file again.")
    return _completed(config, file, architecture, mapping)


def _meant(origin: GgufKey, value: Scalar | None, where: str) -> Scalar | None:
    """What a config says where a file has this value. Raises ArchitectureError for one that no config says."""
    if origin.values:
        meanings = {written: meant for meant, written in reversed(origin.values.items())}  # the first, of several
        if (value or "") not in meanings:
            raise ArchitectureError(
                f"{where} is {shown(value)}; readable: {', '.join(map(repr, meanings))}. "
                "Start from the Hugging Face folder."
            )
        value = meanings[value or ""]
    # Counts, sizes and rates: none is negative, infinite or beyond what a model could have.
    if value is not None and not isinstance(value, str) and not 0 <= value <= MAX_NUMBER:
        raise CheckpointError(f"{where} is {value!r}. Download the file again.")
    return value


def _completed(config: JsonObject, file: GgufFile, architecture: Architecture, mapping: GgufMapping) -> JsonObject:
    """A config with what the tensors say, and what llama.cpp takes for granted."""
    where = file.files[0]
    if "attention.key_length" in mapping.metadata:  # else a class may have a default of its own
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape:
        config.setdefault("vocab_size", embedding.shape[0])
    layers = architecture.layers(config)
    for key, assumed in mapping.config.items():
        if assumed.stated and (value := assumed.value(config, layers)) is not None:
            _set(config, key, value, f"{where}: its {key}")
    flags = {key: tensor in file.tensors for key, tensor in mapping.present.items()}
    tied = "output.weight" not in file.tensors
    # A class may have a padding token of its own that the vocabulary lacks.
    return config | flags | {"tie_word_embeddings": tied, "pad_token_id": None}


def _rope_of_factors(file: GgufFile, config: Mapping[str, Any], where: str) -> JsonObject:
    """The rotary settings that the file's factors stand for. Raises ArchitectureError for factors of another kind."""
    tensor, rope, head_dim = file.tensors[FACTORS_TENSOR], config["rope_parameters"], config["head_dim"]
    theta, plain = rope["rope_theta"], rope.get("rope_type") == "default"
    if plain and isinstance(theta, float) and type(head_dim) is int and tensor.shape == (head_dim // 2,) != (0,):
        with (file.folder / tensor.file).open("rb") as stored:
            stored.seek(tensor.begin)
            data = stored.read(tensor.nbytes)
        if tensor.type == "F32" and (
            found := llama3_settings(torch.frombuffer(bytearray(data), dtype=torch.float32), theta)
        ):
            return found
    raise ArchitectureError(
        f"{where}: {FACTORS_TENSOR} holds rotary factors that are not Llama 3's usual ones. "
        "Start from the Hugging Face folder."
    )


def _scalar(metadata: Mapping[str, GgufValue], key: str, where: str) -> Scalar | None:
    if key not in metadata:
        return None
    if metadata[key].element is not None:
        raise ArchitectureError(
            f"{where}: {key} differs by layer, which cannot be read. Start from the Hugging Face folder."
        )
    value = metadata[key].value
    assert not isinstance(value, tuple)  # that of no array
    # The shortest number with the same bits, which is what the config said before it was rounded to 32 bits.
    return float(str(np.float32(value))) if metadata[key].type == "float32" else value


def _set(config: JsonObject, key: str, value: Any, where: str) -> None:
    *tables, last = key.split(".")
    for table in tables:
        config = config.setdefault(table, {})
    if config.setdefault(last, value) != value:
        raise ArchitectureError(
            f"{where} is {value!r}, but another key says that {last} is {config[last]!r}, which no Hugging Face config "
            "can say. Start from the Hugging Face folder."
        )


# -- tensors → tensors of a checkpoint ------------------------------------------------------------


def _views(
    tensor: GgufTensor, mapping: GgufMapping, architecture: Architecture, config: Mapping[str, Any], where: str
) -> Iterator[TensorInfo]:
    """What a GGUF tensor holds, under Hugging Face names."""
    numbered = re.match(r"blk\.(0|[1-9]\d{0,5})\.", tensor.name)
    template = tensor.name if numbered is None else f"blk.{{layer}}.{tensor.name[numbered.end() :]}"
    rules = [rule for name in _FUSED.get(template, (template,)) for rule in mapping.tensors if rule.name == name]
    if not rules:
        raise ArchitectureError(
            f"{where}: {tensor.name} is not a known tensor of a {mapping.arch} model. "
            "Start from the Hugging Face folder."
        )
    stacked = "{expert}" in rules[0].sources[0]
    experts = architecture.experts_per_layer(config) if stacked else 1
    shape = tensor.shape[1:] if stacked else tensor.shape
    if template == _ROUTER_OF_ONE and len(shape) == 1:
        shape = (1, *shape)
    fits = (len(shape) == 2 and tensor.shape[0] == experts) if stacked else len(shape) in (1, 2)
    if not fits or 0 in shape or shape[0] % len(rules):
        sort = (
            f"model of {architecture.experts_per_layer(config)} experts" if architecture.num_experts_keys else "model"
        )
        raise CheckpointError(
            f"{where}: {tensor.name} has the shape {list(tensor.shape)}, unlike any in a {mapping.arch} {sort}. "
            "Convert the model again."
        )
    shape = (shape[0] // len(rules), *shape[1:])
    nbytes = GGML_TYPES[tensor.type].storage_bytes(shape)
    for number in range(experts * len(rules)):
        expert, part = divmod(number, len(rules))
        begin = tensor.begin + number * nbytes
        yield TensorInfo(
            rules[part].sources[0].format(layer=numbered and numbered[1], expert=expert),
            tensor.type if tensor.type in TORCH_DTYPES else "F32",
            shape,
            begin,
            begin + nbytes,
            _encoding(tensor, rules[part].transform, config, where),
        )


def _encoding(tensor: GgufTensor, transform: str, config: Mapping[str, Any], where: str) -> Encoding | None:
    heads = config[_HEADS[transform]] if transform in _HEADS else 0
    if transform in _HEADS and (type(heads) is not int or heads <= 0 or tensor.shape[0] % (2 * heads)):
        raise CheckpointError(
            f"{where}: {tensor.name} of shape {list(tensor.shape)} has no {heads!r} heads of two halves. "
            "Convert the model again."
        )
    if transform and len(tensor.shape) == 1:
        if tensor.type != "F32":
            raise CheckpointError(f"{where}: {tensor.name} is {tensor.type}, not F32. Convert the model again.")
        return Encoding("plain", (1, 1), decoder=partial(_vector, heads=heads))
    head_rows = tensor.shape[0] // heads if heads else 0
    if tensor.type not in TORCH_DTYPES:
        return Encoding(tensor.type, (1, GGML_TYPES[tensor.type].block_weights), head_rows=head_rows)
    return Encoding("plain", (1, 1), head_rows=head_rows) if head_rows else None


def _vector(stored: Tensor, name: str, heads: int) -> Tensor:
    """A bias whose heads' halves lie in turns, or without heads a norm that scales by one more, put right."""
    values = stored.view(torch.float32)
    return values.view(heads, -1, 2).transpose(1, 2).flatten() if heads else values - 1
