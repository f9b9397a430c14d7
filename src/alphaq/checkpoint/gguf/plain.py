"""A GGUF file of an architecture that is not described here, seen as a checkpoint by its names alone.

llama.cpp calls the same things by the same names in every architecture, and its own quantizer goes by nothing else. So
tensors keep their names, and their roles and projections come from `names.toml`. An expert of a stack
[experts, rows, columns] is a tensor of its own, `blk.3.ffn_down_exps.17.weight`; another tensor of three dimensions,
such as a matrix to each attention head, is one matrix [heads · rows, columns]. What cannot be quantized is kept as it
is, and so is what has an unknown name, which a note tells. Only llama.cpp can run such a model.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from alphaq.checkpoint.families.architecture import Architecture
from alphaq.checkpoint.gguf.format import GgufFile, GgufTensor
from alphaq.checkpoint.safetensors_format import TORCH_DTYPES
from alphaq.checkpoint.tensors import Encoding, TensorInfo
from alphaq.errors import CheckpointError
from alphaq.formats.ggml import GGML_TYPES, SHORTEST_BLOCK
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.work.untrusted import JsonObject, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_MATRICES = 250_000  # four times those of the largest model
MOST_NAMED = 3  # tensors in a note

_LAYERED = re.compile(r"(?:enc\.|dec\.)?blk\.(?P<layer>0|[1-9]\d{0,5})\.(?P<kind>.+)")
_PLANNED = ("experts", "shared_expert", "dense_mlp", "attention", "mixer", "embedding", "head")
_SETTINGS = {
    # a config's key: that of the metadata, after the architecture's name
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}


@dataclass(frozen=True)
class Matched:
    """What names tell. matrices: those that may be quantized. roles: of every tensor. notes: for the user."""

    matrices: tuple[MatrixRef, ...]
    roles: dict[str, Role]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PlainModel:
    """A file by its names. shards: tensors by the file that holds them; names: the GGUF tensor that holds each."""

    architecture: Architecture
    config: JsonObject
    shards: dict[str, dict[str, TensorInfo]]
    names: dict[str, str]
    matched: Matched


@dataclass(frozen=True)
class Kind:
    """What a tensor is. why: the reason to keep it as it is, "" if it may be quantized; known: whether its name is."""

    role: Role
    projection: str = ""
    stacked: bool = False
    why: str = ""
    known: bool = True


def kind_of(name: str, shape: Sequence[int]) -> Kind:
    """What a tensor is by its name and shape, and whether it may be quantized: the one place that decides it."""
    described = _described()
    for part, (role, why) in described["kept"].items():
        if part in name:
            return Kind(Role(role), why=why)
    if not name.endswith(".weight"):
        return Kind(Role.OTHER, why="no weight")
    sides = [side for side in shape if side > 1]
    if len(sides) < 2:
        return Kind(Role.OTHER, why="a vector")
    layered = _LAYERED.fullmatch(name)
    kind = (layered["kind"] if layered else name).removesuffix(".weight")
    group = next((group for group in _PLANNED if kind in described[group]), None)
    if group is None:
        return Kind(Role.OTHER, why="a name that is not known", known=False)
    stacked = group == "experts"
    role = Role.EXPERT if stacked else Role(group)
    if stacked and len(shape) != 3:
        return Kind(role, why="no stack of experts", known=False)
    if shape[-1] % SHORTEST_BLOCK:
        return Kind(
            role, why=f"rows of {shape[-1]} weights, which are no whole blocks of {SHORTEST_BLOCK}", known=False
        )
    return Kind(role, described[group][kind], stacked)


def open_plain(file: GgufFile) -> PlainModel:
    """A file whose architecture may be any. Raises CheckpointError if its metadata or sizes cannot be a model's."""
    config = _config(file)
    shards: dict[str, dict[str, TensorInfo]] = {part: {} for part in file.files}
    names: dict[str, str] = {}
    matrices: list[MatrixRef] = []
    roles: dict[str, Role] = {}
    kept: dict[str, list[str]] = {}
    for tensor in file.tensors.values():
        kind = kind_of(tensor.name, tensor.shape)
        if not kind.known:
            kept.setdefault(kind.why, []).append(tensor.name)
        for number, info in enumerate(_views(tensor, kind)):
            if info.name in names:
                raise CheckpointError(
                    f"{file.files[0]}: {tensor.name} and {names[info.name]} are the same. Convert it again."
                )
            if len(names) >= MAX_MATRICES:
                raise CheckpointError(
                    f"{file.files[0]} claims more than {MAX_MATRICES} matrices. Download the file again."
                )
            names[info.name], roles[info.name] = tensor.name, kind.role
            shards[tensor.file][info.name] = info
            if not kind.why:
                matrices.append(_matrix(info, kind, number))
    return PlainModel(_architecture(config), config, shards, names, Matched(tuple(matrices), roles, _notes(kept)))


@lru_cache(maxsize=1)
def _described() -> JsonObject:
    return tomllib.loads((files("alphaq.checkpoint.gguf") / "names.toml").read_text(encoding="utf-8"))


def _views(tensor: GgufTensor, kind: Kind) -> Iterator[TensorInfo]:
    """A stack's experts, a matrix, or what is kept in the shape that it has."""
    count = tensor.shape[0] if kind.stacked else 1
    shape = tensor.shape[1:] if kind.stacked else tensor.shape
    if not kind.why:
        shape = (math.prod(shape[:-1]), shape[-1])
    plain = tensor.type in TORCH_DTYPES
    encoding = None if plain else Encoding(tensor.type, (1, GGML_TYPES[tensor.type].block_weights))
    nbytes = tensor.nbytes // count
    for number in range(count):
        name = f"{tensor.name.removesuffix('.weight')}.{number}.weight" if kind.stacked else tensor.name
        begin = tensor.begin + number * nbytes
        yield TensorInfo(name, tensor.type if plain else "F32", shape, begin, begin + nbytes, encoding)


def _matrix(info: TensorInfo, kind: Kind, number: int) -> MatrixRef:
    layered = _LAYERED.fullmatch(info.name)
    return MatrixRef(
        info.name,
        (info.shape[0], info.shape[1]),
        info.dtype,
        int(layered["layer"]) if layered else None,
        number if kind.stacked else None,
        kind.projection or None,
        kind.role,
        info.name,
    )


def _notes(kept: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """What is kept although its size would be worth it."""
    return tuple(
        f"kept as stored: {', '.join(names[:MOST_NAMED])}"
        f"{f' and {len(names) - MOST_NAMED} more' if len(names) > MOST_NAMED else ''} ({why})"
        for why, names in kept.items()
    )


# -- metadata → config ----------------------------------------------------------------------------


def _config(file: GgufFile) -> JsonObject:
    """What commands ask of a config, as far as the metadata say it in one number."""
    where, entry = file.files[0], file.metadata.get("general.architecture")
    arch = None if entry is None else entry.value
    if not isinstance(arch, str) or not re.fullmatch(r"[\w.\-]{1,64}", arch):
        raise CheckpointError(
            f"{where}: general.architecture is {shown(arch)}, not a name. Convert the model again with llama.cpp."
        )
    config: JsonObject = {"model_type": arch}
    for key, said in _SETTINGS.items():
        value = file.metadata[f"{arch}.{said}"].value if f"{arch}.{said}" in file.metadata else None
        if type(value) is int and 0 < value < 10**9:
            config[key] = value
    if not 0 < config.get("num_hidden_layers", 0) < 10**5:
        raise CheckpointError(
            f"{where}: {arch}.block_count is no count of layers, so it holds no language model. Name a model's file."
        )
    if config.get("num_experts", 0) >= 10**5:
        raise CheckpointError(f"{where}: {arch}.expert_count is {config['num_experts']}. Download the file again.")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) == 2:
        config["vocab_size"] = embedding.shape[0]
    return config | {"tie_word_embeddings": "output.weight" not in file.tensors}


def _architecture(config: JsonObject) -> Architecture:
    """A family that has nothing but a name and counts."""
    counted = ["num_experts"] if "num_experts" in config else []
    return Architecture.parse(
        {
            "name": config["model_type"],
            "model_types": [config["model_type"]],
            "settings": [],
            "num_experts": counted,
            "top_k": ["num_experts_per_tok"] if counted else [],
            "expert_name": "",
            "projections": {},
            "router_norm": "",
            "tensors": [],
        }
    )
