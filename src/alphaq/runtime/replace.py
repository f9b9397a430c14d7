"""Which modules of a transformers model can stay packed, and their exchange.

Where a stored tensor belongs is what transformers' own conversions say of its name, so that whatever loads can be
packed, too. Linear layers and experts multiply packed, embeddings look rows up; parameters that something else reads
are restored while it runs.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from alphaq.checkpoint.files import PlainFile
from alphaq.checkpoint.safetensors_format import ITEM_BYTES, TORCH_DTYPES, read_header
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import CheckpointError
from alphaq.formats.blocks import read_block_header
from alphaq.formats.coding import PREFIX_BYTES, check_claims, decode_tensor, decoded_info, is_coded
from alphaq.nouns.matrix import Shape
from alphaq.runtime.conversions import DequantizeBlocks, Refold
from alphaq.runtime.modules import PackedExperts, RestoredParameter, packed_class
from alphaq.runtime.packed import KEPT, PackedWeights
from alphaq.runtime.ties import Tied, packable
from alphaq.simd.sums import in_threads

EXPERTS_CALL = ("hidden_states", "top_k_index", "top_k_weights")
CPU = torch.device("cpu")


@dataclass
class Target:
    """A parameter of the model and the stored tensors that it is made of.

    sources: pattern of the converter → names of tensors, in the order of experts; without a converter one name.
    """

    name: str
    parameter: Tensor
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """The module's name."""
        return self.name.rpartition(".")[0]

    @property
    def short(self) -> str:
        """The parameter's name in its module."""
        return self.name.rpartition(".")[2]

    @property
    def every_name(self) -> list[str]:
        """This parameter and those that the same tensors make besides."""
        patterns = self.converter.target_patterns if self.converter else [self.name]
        return [self.name.replace(patterns[0], pattern) for pattern in patterns]

    @property
    def operations(self) -> list[ConversionOps]:
        """What makes the parameter of restored matrices, but for its shape."""
        every = self.converter.operations if self.converter else []
        return [one for one in every if not isinstance(one, (DequantizeBlocks, Refold))]

    @property
    def stacked(self) -> bool:
        """Whether it is nothing but its stored matrices, one after the other."""
        plain = all(isinstance(one, MergeModulelist) and one.dim == 0 for one in self.operations)
        return bool(self.operations) and plain and len(self.names) == 1 and len(self.parameter) == len(self.names[0])

    @property
    def names(self) -> list[list[str]]:
        """Stored tensors, [projections][experts]."""
        patterns = self.converter.source_patterns if self.converter else self.sources
        return [self.sources[pattern] for pattern in patterns if pattern in self.sources]

    def restored(self, weights: PackedWeights, dtype: torch.dtype | None = None) -> Tensor:
        """The parameter, made as transformers makes it."""
        matrices = [[weights.dequantized(p, e, dtype) for e in range(len(row))] for p, row in enumerate(weights.names)]
        if self.converter is None:
            return matrices[0][0]
        patterns = [pattern for pattern in self.converter.source_patterns if pattern in self.sources]
        made: Any = dict(zip(patterns, matrices, strict=True))
        targets = self.converter.target_patterns
        for operation in self.operations:
            made = operation.convert(made, source_patterns=self.converter.source_patterns, target_patterns=targets)
        (parameter, *_) = made.values()
        return parameter.reshape(self.parameter.shape)


def stored_tensors(files: Sequence[str]) -> dict[str, tuple[Path, TensorInfo]]:
    """What the checkpoint's files hold, by name, as it is once decoded. Raises CheckpointError if a file is damaged."""
    tensors, stored, decoded = {}, 0, 0
    for path in map(Path, files):
        opened = PlainFile(path)
        for name, info in read_header(path)[0].items():
            prefix = opened.read(info.begin, min(info.nbytes, PREFIX_BYTES)) if is_block(info) else torch.empty(0)
            tensors[name] = path, decoded_info(info, prefix)
            stored, decoded = stored + info.nbytes, decoded + _bytes_of(tensors[name][1])
    check_claims(decoded, stored, "The checkpoint")
    return tensors


def is_block(info: TensorInfo) -> bool:
    """Whether a stored tensor is a native block."""
    return info.dtype == "U8" and len(info.shape) == 1


@dataclass
class Placing:
    """Where transformers puts stored tensors, by its own conversions."""

    model: Any
    conversions: Sequence[Any]

    def __post_init__(self) -> None:
        self.renamings = [entry for entry in self.conversions if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in self.conversions if isinstance(entry, WeightConverter)]
        self.parameters = self.model.state_dict()

    def place(self, name: str) -> tuple[str, str | None]:
        """Parameter and pattern of the converter that makes it, if any; the parameter may not be the model's."""
        prefix = self.model.base_model_prefix
        renamed, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.parameters)
        return (name, None) if renamed not in self.parameters and name in self.parameters else (renamed, pattern)

    def targets(self, stored: Iterable[str]) -> dict[str, Target]:
        """The model's parameters that are stored."""
        by_pattern = {pattern: converter for converter in self.converters for pattern in converter.source_patterns}
        by_parameter: dict[str, Target] = {}
        for name in sorted(stored, key=dot_natural_key):
            renamed, pattern = self.place(name)
            if renamed in self.parameters:
                converter = by_pattern[pattern] if pattern is not None else None
                target = by_parameter.setdefault(renamed, Target(renamed, self.parameters[renamed], converter))
                target.sources.setdefault(pattern or "", []).append(name)
        return by_parameter


class Packer:
    """Exchanges modules of a model that has no weights yet, and fills them when it has the others.

    names: the stored name of each parameter that is stored as it is. slices: those of a stack's matrices, where other
    parameters of its module are packed: transformers would make one tensor of both, and has but one.
    """

    def __init__(self, stored: Mapping[str, tuple[Path, TensorInfo]]) -> None:
        self.stored = stored
        self.names: dict[str, str] = {}
        self.slices: dict[str, list[str]] = {}
        self._packed: list[Target] = []
        self._tied: dict[str, Tied] = {}
        self._files: dict[Path, Tensor] = {}

    def pack(self, model: Any, conversions: Sequence[Any]) -> set[str]:
        """Exchange what can be. Returns the names that transformers will say it did not expect.

        Raises CheckpointError if nothing is stored for some experts.
        """
        targets = Placing(model, conversions).targets(self.stored)
        made = {name for target in targets.values() for name in target.every_name}
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3 and name not in made:
                raise CheckpointError(
                    f"{type(model).__name__} has experts in {name}, for which the checkpoint stores nothing. "
                    "Complete the download, or load it with the class that its config.json names."
                )
        self.names = {name: one.names[0][0] for name, one in targets.items() if one.converter is None}
        modules = dict(model.named_modules())
        owners: dict[str, list[Target]] = {}
        for target in targets.values():
            owners.setdefault(target.owner, []).append(target)
        for owner, own in owners.items():
            module, around = modules[owner], _around(modules, owner)
            coded = [target for target in own if self._is_coded(target)]
            if not coded:
                continue
            if packable(module) and coded[0].converter is None:
                coded = coded if self._pack_plain(model, coded[0]) else []
            elif (pair := _first_and_down(module, own)) is not None:
                self._pack_experts(module, *pair)
                around._is_hf_initialized = True  # it may draw random numbers for its experts
                coded = list(pair)
            else:
                coded = [target for target in coded if self._pack_restored(around, module, target)]
            self._packed += coded
            self.slices |= {one.name: one.names[0] for one in own if one not in coded and one.stacked}
        packed = [name for target in self._packed for row in target.names for name in row]
        left = Placing(model, conversions)
        return {left.place(name)[0] for name in packed}

    def fill(self, model: Any) -> None:
        """Give the packed modules their blocks: mapped from the files, decoded, or copied to where their layer is."""
        for name, module in model.named_modules():
            if isinstance(module, PackedWeights):
                device = _device_of(model, name)
                flat = iter(in_threads(self._tensor, [one for names in module.names for one in names]))
                module.fill([[next(flat).to(device) for _ in names] for names in module.names])
        self._files.clear()

    def restore(self, model: Any, dtype: torch.dtype) -> None:
        """Give a filled model ordinary parameters again."""
        for target in self._packed:
            module = model.get_submodule(target.owner)
            if target.name in self._tied:
                self._tied[target.name].restore(model, nn.Parameter(target.restored(module.packed, dtype)))
                continue
            place = _place(target)
            if isinstance(module, PackedExperts):
                place = "packed_down" if target.short == "down_proj" else "packed_first"
            else:
                module.__dict__.pop(f"restored_{target.short}").remove()
            setattr(module, target.short, nn.Parameter(target.restored(getattr(module, place), dtype)))
            delattr(module, place)
            if isinstance(module, PackedExperts) and not any(
                isinstance(one, PackedWeights) for one in module.children()
            ):
                module.__class__ = type(module).__bases__[1]

    def _is_coded(self, target: Target) -> bool:
        return any(is_block(self.stored[name][1]) for names in target.names for name in names)

    def _tensor(self, name: str) -> Tensor:
        """A stored tensor as a view of the mapped file, or decoded."""
        path, info = self.stored[name]
        if path not in self._files:
            self._files[path] = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        raw = self._files[path][info.begin : info.end]
        if is_coded(raw):
            values = decode_tensor(raw, name)
        elif is_block(info):
            return raw
        else:
            kind = TORCH_DTYPES[info.dtype]
            values = (raw.clone() if info.begin % kind.itemsize else raw).view(kind).view(info.shape)
        return values if is_block(info) or values.dtype in KEPT else values.bfloat16()

    def _weights(self, target: Target, shape: Shape) -> PackedWeights:
        weights = PackedWeights(target.names, shape, target.parameter.dtype)
        weights.reserve(sum(_bytes_of(self.stored[name][1]) for row in target.names for name in row))
        return weights

    def _pack_plain(self, model: Any, target: Target) -> bool:
        """Exchange an embedding or a linear layer, with what is tied to it; False if that cannot be."""
        tied = Tied.of(model, target.name, self.names)
        if tied is None:
            return False
        rows, columns = target.parameter.shape
        tied.pack(model, self._weights(target, (rows, columns)))
        self._tied[target.name] = tied
        return True

    def _pack_experts(self, module: Any, first: Target, down: Target) -> None:
        for place, target in {"packed_first": first, "packed_down": down}.items():
            rows, columns = target.parameter.shape[1:][:: -1 if getattr(module, "is_transposed", False) else 1]
            setattr(module, place, self._weights(target, (rows // len(target.names), columns)))
            delattr(module, target.short)
        module.__class__ = packed_class(type(module))  # type: ignore[arg-type] # types are hashable
        module._is_hf_initialized = True

    def _pack_restored(self, around: nn.Module, module: Any, target: Target) -> bool:
        """Exchange a parameter for matrices that are restored while `around` runs; False if it cannot be."""
        if any(getattr(one, "check_dims", False) or type(one).__name__ not in _KNOWN for one in target.operations):
            return False
        shapes = {self._shape(name) for row in target.names for name in row}
        if len({len(row) for row in target.names}) != 1 or len(shapes) != 1:
            return False
        setattr(module, _place(target), self._weights(target, shapes.pop()))
        delattr(module, target.short)
        hooks = RestoredParameter(around, module, target.short, _place(target), target.restored)
        module.__dict__[f"restored_{target.short}"] = hooks
        module._is_hf_initialized = True
        return True

    def _shape(self, name: str) -> Shape:
        info = self.stored[name][1]
        return read_block_header(self._tensor(name), name)[1] if is_block(info) else (info.shape[0], info.shape[1])


_KNOWN = ("MergeModulelist", "Concatenate", "Transpose", "Interleave")


def _bytes_of(info: TensorInfo) -> int:
    """Bytes of a tensor once it is decoded."""
    return math.prod(info.shape) * ITEM_BYTES[info.dtype]


def _place(target: Target) -> str:
    """Where a module holds the packed matrices of a parameter that is restored."""
    return f"packed_{target.short}"


def _expert_numbers(names: Sequence[str]) -> list[int]:
    """What tells the names of one projection's experts apart."""
    numbers = [re.findall(r"\d+", name) for name in names]
    places = [place for place, column in enumerate(zip(*numbers, strict=False)) if len(set(column)) > 1]
    return [int(one[places[-1]]) for one in numbers] if places else list(range(len(names)))


def _first_and_down(module: Any, targets: Sequence[Target]) -> tuple[Target, Target] | None:
    """The parameters of a module that computes down(gate(first(x))) with the experts that a router chose, or None."""
    by_name = {target.short: target for target in targets}
    first, down = by_name.get("gate_up_proj") or by_name.get("up_proj"), by_name.get("down_proj")
    if first is None or down is None or first.parameter.ndim != 3 or down.parameter.ndim != 3:
        return None
    call = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if not hasattr(module, "is_concatenated") and call != EXPERTS_CALL:
        return None
    turned = bool(getattr(module, "is_transposed", False))
    for target in (first, down):
        operations = target.operations
        merged = any(isinstance(one, MergeModulelist) for one in operations)
        transposed = any(isinstance(one, Transpose) for one in operations)
        if not merged or transposed != turned or len(target.every_name) > 1:
            return None
        if not {type(one).__name__ for one in operations} <= {"MergeModulelist", "Concatenate", "Transpose"}:
            return None
        if len(target.names) > 1 and not getattr(module, "is_concatenated", True):
            return None
        for row in target.names:
            numbers = _expert_numbers(row)
            if numbers != _expert_numbers(down.names[0]) or numbers != list(range(numbers[0], numbers[0] + len(row))):
                raise CheckpointError(
                    f"{target.owner} has {len(down.names[0])} matrices for down_proj and {len(row)} like {row[0]}, or "
                    "of other experts. Complete the download or quantize the model again."
                )
    if len(down.names[0]) != len(down.parameter):
        raise CheckpointError(
            f"{down.owner} has {len(down.names[0])} experts in the checkpoint, {len(down.parameter)} in the model's "
            "class. Complete the download or quantize the model again."
        )
    return first, down


def _around(modules: Mapping[str, Any], name: str) -> Any:
    """The nearest module around one that is run itself."""
    while name:
        name = name.rpartition(".")[0]
        if not isinstance(modules[name], (nn.ModuleList, nn.ModuleDict)):
            break
    return modules[name]


def _device_of(model: nn.Module, name: str) -> torch.device:
    """Where the layer of a module is: the device of the nearest parameters around it."""
    while name:
        name = name.rpartition(".")[0]
        around = model.get_submodule(name)
        if (device := next((one.device for one in around.parameters() if one.device.type != "meta"), None)) is not None:
            return device
    return CPU
