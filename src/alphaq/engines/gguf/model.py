"""What a checkpoint becomes in a GGUF file: its metadata, and which tensors are made of which.

How a family's config and tensors are called there is data, the `[gguf]` table of its architecture file. What is left
is common to all: types, formulas, and the few changes of layout that llama.cpp's kernels want. Source: llama.cpp's
convert_hf_to_gguf.py, which the tests compare.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from alphaq.checkpoint.families.formulas import current, evaluated, looked_up
from alphaq.checkpoint.gguf.mapping import GgufKey, GgufMapping, GgufTensorRule
from alphaq.checkpoint.gguf.rope import KIND, llama3_factors
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.checkpoint.hub import model_name
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.effective import settings_of
from alphaq.engines.gguf.package import general_metadata
from alphaq.engines.gguf.tokenizer import tokenizer_metadata
from alphaq.engines.placement import is_harmless
from alphaq.engines.settings import require_settings
from alphaq.errors import ArchitectureError
from alphaq.nouns.matrix import MatrixRef
from alphaq.work.untrusted import JsonObject

ENGINE = "llama.cpp"
FILE_TYPES = {"F16": 1, "BF16": 32}  # llama.cpp's LLAMA_FTYPE_MOSTLY_…
QUANTIZATION_VERSION = 2  # ggml's, unchanged since 2023

# Counts, flags and names tell their type themselves; a config may write these numbers without a point.
_FLOATS = frozenset(
    {
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "attention.scale",
        "attention.temperature_scale",
        "attn_logit_softcapping",
        "embedding_scale",
        "expert_weights_scale",
        "final_logit_softcapping",
        "logit_scale",
        "residual_scale",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scaling.factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_log_multiplier",
    }
)
_REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
    "expert_count",
    "expert_used_count",
)


@dataclass(frozen=True)
class TensorRecipe:
    """How one tensor of a GGUF file is made.

    shape: [..., rows, columns], as NumPy has it. type: what it is stored as unless a plan quantizes it, BF16 or F16; or
    F32, which it always is. matrices: one, or one per expert to be stacked along the first axis. vector: name of the
    stored tensor, for what is no matrix. transform: how the values of the only matrix change, see `transformed`.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    matrices: tuple[MatrixRef, ...] = ()
    vector: str = ""
    transform: str = ""

    @property
    def is_stack(self) -> bool:
        """Whether each matrix is an entry of it; heads that one matrix is cut into are none."""
        return len(self.shape) == 3 and len(self.matrices) == self.shape[0] and not self.transform


def gguf_metadata(checkpoint: Checkpoint, pre_tokenizer: str | None = None) -> dict[str, GgufValue]:
    """All keys and values of the exported file, in order; `general.file_type` for a file that quantizes nothing.

    pre_tokenizer: llama.cpp's name for the rule that cuts a text into words; None recognises it. Raises
    ArchitectureError as `gguf_tensors` does, or for a config that cannot be said in GGUF; CheckpointError for a
    tokenizer that llama.cpp lacks; MissingExtraError without the `gguf` package.
    """
    mapping = _mapping(checkpoint)
    tensors = gguf_tensors(checkpoint)
    embedding = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
    experts = checkpoint.architecture.experts_per_layer(checkpoint.config)
    labels = general_metadata(
        checkpoint.folder, model_name(checkpoint.folder), checkpoint.config, _parameters(tensors), experts
    )
    return {
        "general.architecture": GgufValue.of("string", mapping.arch),
        "general.type": GgufValue.of("string", "model"),
        **labels,
        **_hyperparameters(mapping, current(require_settings(checkpoint, ENGINE))),
        "general.file_type": GgufValue.of("uint32", FILE_TYPES[embedding.type]),
        "general.quantization_version": GgufValue.of("uint32", QUANTIZATION_VERSION),
        **tokenizer_metadata(checkpoint.folder, embedding.shape[0], pre_tokenizer),
    }


def gguf_tensors(checkpoint: Checkpoint) -> list[TensorRecipe]:
    """Every tensor of the exported file, in order.

    Layers beyond `num_hidden_layers` (multi-token prediction) are left out. Raises ArchitectureError if the family is
    none of llama.cpp's, if llama.cpp would compute the model otherwise, or if a stored tensor has no place in the file.
    """
    if checkpoint.plain:
        return list(_as_they_are(checkpoint))
    mapping = _mapping(checkpoint)
    require_settings(checkpoint, ENGINE)
    layers = checkpoint.architecture.layers(checkpoint.config)
    found = _Stored(checkpoint, settings_of(checkpoint))
    recipes = [
        recipe for rule, layer in _places(mapping.tensors, layers) if (recipe := found.recipe(rule, layer)) is not None
    ]
    if left := found.left(layers):
        raise ArchitectureError(
            f"{left[0]!r} has no place in a GGUF file of llama.cpp's {mapping.arch!r}"
            f"{f', nor have {len(left) - 1} more' if len(left) > 1 else ''}. "
            "Use another engine, or complete [gguf.tensors] of the architecture file if llama.cpp has a place for it."
        )
    if not recipes or recipes[0].name != "token_embd.weight":
        raise ArchitectureError(f"{checkpoint.folder} holds no embedding. Complete the download.")
    return recipes


# -- tensors ----------------------------------------------------------------------------------------


def _as_they_are(checkpoint: Checkpoint) -> Iterator[TensorRecipe]:
    """Those of a GGUF file whose family is not known: its own, in its own order."""
    matrices: dict[str, list[MatrixRef]] = {}
    for matrix in checkpoint.matrices:
        matrices.setdefault(checkpoint.gguf_names[matrix.name], []).append(matrix)
    assert checkpoint.gguf is not None  # which `plain` says
    for tensor in checkpoint.gguf.tensors.values():
        held = tuple(matrices.get(tensor.name, ()))
        yield TensorRecipe(tensor.name, tensor.shape, "BF16" if held else "F32", held, "" if held else tensor.name)


class _Stored:
    """A checkpoint's matrices and vectors by name, and which of them have been used."""

    def __init__(self, checkpoint: Checkpoint, settings: JsonObject) -> None:
        self.checkpoint, self.settings = checkpoint, settings
        self.matrices = {matrix.name: matrix for matrix in checkpoint.matrices}
        self.experts = checkpoint.architecture.experts_per_layer(checkpoint.config)
        self.used: set[str] = set()

    def recipe(self, rule: GgufTensorRule, layer: int | None) -> TensorRecipe | None:
        """How a layer's tensor is made, None if the checkpoint has nothing for it."""
        name = rule.name.format(layer=layer)
        for source in rule.sources:
            stacked = "{expert}" in source
            if stacked and not self.experts:
                family = self.checkpoint.architecture.name
                raise ArchitectureError(
                    f"{self.checkpoint.name} has no experts, and llama.cpp runs every {family!r} model with some. Use "
                    "another engine."
                )
            names = [source.format(layer=layer, expert=expert) for expert in range(self.experts if stacked else 1)]
            if names[0] in self.matrices:
                matrices = tuple(self.matrices[name] for name in names)
                self.used.update(matrix.tensor for matrix in matrices)
                rows, columns = matrices[0].shape
                shape = _shape(rule, (len(names), rows, columns) if stacked else (rows, columns), self.settings)
                return TensorRecipe(name, shape, _type(name, matrices[0].dtype), matrices, transform=rule.transform)
            if names[0] in self.checkpoint.shard_of:
                self.used.add(names[0])
                shape = _shape(rule, self.checkpoint.info(names[0]).shape, self.settings)
                return TensorRecipe(name, shape, "F32", vector=names[0], transform=rule.transform)
        return self._made(rule, name)

    def _made(self, rule: GgufTensorRule, name: str) -> TensorRecipe | None:
        """How a tensor is made out of the config, where that asks for it; it is written beside the last norm."""
        if not rule.made or looked_up("rope_parameters.rope_type", self.settings) != KIND:
            return None
        shape = _shape(replace(rule, transform=rule.made), (1,), self.settings)
        return TensorRecipe(
            name, shape, "F32", vector=sorted(self.used - self.matrices.keys())[-1], transform=rule.made
        )

    def left(self, layers: int) -> list[str]:
        """Stored tensors that no recipe uses and that are not meant to be dropped."""
        beyond = re.compile(r"model\.layers\.(\d+)\.")
        return [
            name
            for name in self.checkpoint.shard_of
            if name not in self.used
            and not is_harmless(name)
            and not ((match := beyond.match(name)) and int(match[1]) >= layers)
        ]


def _places(rules: Iterable[GgufTensorRule], layers: int) -> Iterator[tuple[GgufTensorRule, int | None]]:
    """The rules in order, neighbours that belong to a layer repeated layer by layer."""
    for layered, group in itertools.groupby(rules, lambda rule: "{layer}" in rule.name):
        of_layer = list(group)
        for layer in range(layers) if layered else (None,):
            yield from ((rule, layer) for rule in of_layer)


def _type(name: str, dtype: str) -> str:
    """What a matrix is stored as if nothing quantizes it; llama.cpp has routers in single precision."""
    if "ffn_gate_inp" in name:
        return "F32"
    return "F16" if dtype == "F16" else "BF16"


def _rotated_pairs(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head reordered so that the two that one rotary angle turns are neighbours, not half a head apart."""
    return values.view(heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape)


def _factors(config: JsonObject) -> torch.Tensor:
    """Of the config's rotary waves. Raises KeyError, TypeError, ValueError or ZeroDivisionError if it is incomplete."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return llama3_factors(config["rope_parameters"], head_dim)


def _latent_parts(values: torch.Tensor, config: JsonObject) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [heads, nope, rank] and values [heads, v, rank] that latent attention keeps in one matrix."""
    sizes = (config["qk_nope_head_dim"], config["v_head_dim"])
    keys, rest = values.view(config["num_attention_heads"], sum(sizes), -1).split(sizes, dim=1)
    return keys, rest


_TRANSFORMS: dict[str, Callable[[torch.Tensor, JsonObject], torch.Tensor]] = {
    "": lambda values, config: values,
    "permute_q": lambda values, config: _rotated_pairs(values, config["num_attention_heads"]),
    "permute_k": lambda values, config: _rotated_pairs(
        values, config.get("num_key_value_heads") or config["num_attention_heads"]
    ),
    # Gemma's norms scale by 1 + w, llama.cpp's by w.
    "plus_one": lambda values, config: values.float() + 1,
    "llama3_factors": lambda values, config: _factors(config),
    # Keys are multiplied from the other side: the query is taken into the latent space, not the keys out of it.
    "kv_b_to_k": lambda values, config: _latent_parts(values, config)[0].transpose(1, 2).contiguous(),
    "kv_b_to_v": lambda values, config: _latent_parts(values, config)[1].contiguous(),
}


def transformed(transform: str, values: torch.Tensor, config: JsonObject) -> torch.Tensor:
    """A matrix's values [rows, columns] as the GGUF file holds them, contiguous; themselves if transform is ""."""
    return _TRANSFORMS[transform](values, config)


def _shape(rule: GgufTensorRule, shape: tuple[int, ...], settings: JsonObject) -> tuple[int, ...]:
    """Shape after a rule's transformation. Raises ArchitectureError if config.json has no heads of that size."""
    if not rule.transform:
        return shape
    try:
        return tuple(_TRANSFORMS[rule.transform](torch.empty(shape, device="meta"), settings).shape)
    except (KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError):
        if rule.made:
            raise ArchitectureError(
                "config.json: rope_parameters lacks numbers that its rope_type needs. Restore the original file."
            ) from None
        raise ArchitectureError(
            f"{rule.sources[0]!r} has shape {list(shape)}, which cannot be cut into the attention heads that "
            "config.json promises. Restore the original config.json."
        ) from None


# -- metadata ---------------------------------------------------------------------------------------


def _mapping(checkpoint: Checkpoint) -> GgufMapping:
    if checkpoint.architecture.gguf is None:
        raise ArchitectureError(
            f"{checkpoint.name}: the architecture {checkpoint.architecture.name!r} has no [gguf] table, so it cannot "
            "be written for llama.cpp. Use another engine, or add the table as docs/architectures.md explains."
        )
    return checkpoint.architecture.gguf


def _hyperparameters(mapping: GgufMapping, config: JsonObject) -> dict[str, GgufValue]:
    """What the table says of the config, in the table's order."""
    found: dict[str, GgufValue] = {}
    for key, rule in mapping.metadata.items():
        value = _said(rule, config, mapping.arch)
        if value is None and (key in _REQUIRED or rule.required):
            raise ArchitectureError(
                f"config.json has no {' or '.join(rule.config)}, which llama.cpp needs. Restore the original file."
            )
        if not (value is None or value is False or value == ""):  # a flag that is not there is false
            found[f"{mapping.arch}.{key}"] = GgufValue.of(_value_type(key, value), value)
    scaled = f"{mapping.arch}.rope.scaling.type" in found  # without a type llama.cpp takes a factor as linear
    return {key: value for key, value in found.items() if scaled or ".rope.scaling." not in key}


def _said(rule: GgufKey, config: JsonObject, arch: str) -> Any:
    """The value for a key, None for nothing."""
    if any(looked_up(other, config) not in needed for other, needed in rule.when.items()):
        return None
    values = ((name, evaluated(name, config)) for name in rule.config)
    name, value = next((pair for pair in values if pair[1] is not None), ("", rule.default))
    if not rule.values or value is None:
        return value
    if not isinstance(value, str) or value not in rule.values:
        raise ArchitectureError(
            f"config.json: {name} is {value!r}, which cannot be written for llama.cpp's {arch!r}. "
            f"It can be {', '.join(map(repr, rule.values))}; otherwise use another engine."
        )
    return rule.values[value]


def _value_type(key: str, value: Any) -> str:
    if key in _FLOATS:
        return "float32"
    return {bool: "bool", str: "string"}.get(type(value), "uint32")


def _parameters(tensors: Iterable[TensorRecipe]) -> tuple[int, int, int]:
    """Weights in total, those that every token meets, and those of one expert in every layer."""
    shared = expert = total = 0
    # A tied embedding is in the file twice but is one.
    for tensor in {(tensor.matrices, tensor.vector, tensor.transform): tensor for tensor in tensors}.values():
        if tensor.transform == "llama3_factors":  # made of the config, no weights
            continue
        size = math.prod(tensor.shape)
        total += size
        if "_exps." in tensor.name:
            expert += size // tensor.shape[0]
        else:
            shared += size
    return total, shared, expert
