"""Which modules of a transformers model can stay packed, and their exchange.

Where a stored tensor belongs is what transformers' own conversions say of its name, so that whatever loads can be
packed, too. Linear layers and experts multiply packed; parameters that something else reads are restored while it runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
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

from alphaq.checkpoint.safetensors_format import TORCH_DTYPES, TensorInfo, read_header
from alphaq.errors import CheckpointError
from alphaq.quantizers.packing import decode, dequantize, read_block_header
from alphaq.records import Shape
from alphaq.runtime.modules import PackedLinear, RestoredParameter, packed_class
from alphaq.runtime.packed import KEPT, PackedWeights

EXPERTS_CALL = ("hidden_states", "top_k_index", "top_k_weights")
CPU = torch.device("cpu")


class DequantizeBlocks(ConversionOps):
    """Blocks (uint8, one-dimensional) become matrices in the parameter's dtype; the rest is only cast."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **_: Any
    ) -> dict[str, Any]:
        """{pattern: tensor or list of tensors} → the same with blocks dequantized."""
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype

        def restore(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.uint8 and tensor.ndim == 1:
                return dequantize(decode(tensor.cpu(), full_layer_name), dtype).to(tensor.device)
            return tensor.to(dtype)

        return {
            pattern: [restore(tensor) for tensor in value] if isinstance(value, list) else restore(value)
            for pattern, value in input_dict.items()
        }


class Refold(ConversionOps):
    """[experts, rows, columns] takes the parameter's own shape, which may be [experts · rows, columns]."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **_: Any
    ) -> dict[str, Any]:
        """{target: fused tensor} → the same, reshaped."""
        shape = model.get_parameter_or_buffer(full_layer_name).shape
        return {target: tensor.reshape(shape) for target, tensor in input_dict.items()}


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
    def operations(self) -> list[ConversionOps]:
        """What makes the parameter of restored matrices, but for its shape."""
        every = self.converter.operations if self.converter else []
        return [one for one in every if not isinstance(one, (DequantizeBlocks, Refold))]

    @property
    def names(self) -> list[list[str]]:
        """Stored tensors, [projections][experts]."""
        patterns = self.converter.source_patterns if self.converter else self.sources
        return [self.sources[pattern] for pattern in patterns if pattern in self.sources]

    def restored(self, weights: PackedWeights, dtype: torch.dtype) -> Tensor:
        """The parameter, made as transformers makes it."""
        matrices = [[weights.dequantized(p, e, dtype) for e in range(len(row))] for p, row in enumerate(weights.names)]
        if self.converter is None:
            return matrices[0][0]
        patterns = [pattern for pattern in self.converter.source_patterns if pattern in self.sources]
        found: dict[str, Any] = dict(zip(patterns, matrices, strict=True))
        targets = self.converter.target_patterns
        for operation in self.operations:
            found = operation.convert(found, source_patterns=self.converter.source_patterns, target_patterns=targets)
        return next(iter(found.values())).reshape(self.parameter.shape)


def stored_tensors(files: Sequence[str]) -> dict[str, tuple[Path, TensorInfo]]:
    """What the checkpoint's files hold, by name. Raises CheckpointError if a file is damaged."""
    return {name: (Path(file), info) for file in files for name, info in read_header(Path(file))[0].items()}


def is_block(info: TensorInfo) -> bool:
    """Whether a stored tensor is a native block."""
    return info.dtype == "U8" and len(info.shape) == 1


def find_targets(model: Any, stored: Mapping[str, object], conversions: Sequence[Any]) -> list[Target]:
    """The model's parameters that the checkpoint stores."""
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = model.state_dict()
    found: dict[str, Target] = {}
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if renamed not in parameters and name in parameters:
            renamed, pattern = name, None
        if renamed in parameters:
            converter = by_pattern[pattern] if pattern is not None else None
            target = found.setdefault(renamed, Target(renamed, parameters[renamed], converter))
            target.sources.setdefault(pattern or "", []).append(name)
    return list(found.values())


class Packer:
    """Exchanges modules of a model that has no weights yet, and fills them when it has the others.

    unpacked: parameters whose blocks cannot stay packed; they are dequantized while they are loaded.
    """

    def __init__(self, stored: Mapping[str, tuple[Path, TensorInfo]]) -> None:
        self.stored = stored
        self.unpacked: list[str] = []
        self._undo: list[Callable[[torch.dtype], None]] = []
        self._files: dict[Path, Tensor] = {}

    def pack(self, model: Any, conversions: Sequence[Any]) -> list[str]:
        """Exchange what can be. Returns the parameters that the model no longer has."""
        modules: dict[str, Any] = dict(model.named_modules())
        owners: dict[str, list[Target]] = {}
        for target in find_targets(model, self.stored, conversions):
            owners.setdefault(target.owner, []).append(target)
        gone: list[str] = []
        for owner, own in owners.items():
            module = modules[owner]
            coded = [target for target in own if self._is_coded(target)]
            if not coded:
                continue
            if type(module) is nn.Linear and coded[0].converter is None:
                self._pack_linear(model, module, coded[0])
            elif (pair := _first_and_down(module, own)) is not None:
                self._pack_experts(module, *pair)
                _around(modules, owner)._is_hf_initialized = True  # it may draw random numbers for its experts
                coded = list(pair)
            else:
                coded = [target for target in coded if self._pack_restored(_around(modules, owner), module, target)]
            gone += [target.name for target in coded]
        return gone

    def fill(self, model: Any) -> None:
        """Give the packed modules their blocks: mapped from the files, or copied to where their layer is."""
        for name, module in model.named_modules():
            if isinstance(module, PackedWeights):
                device = _device_of(model, name)
                module.fill([[self._tensor(one).to(device) for one in names] for names in module.names])
        self._files.clear()

    def restore(self, dtype: torch.dtype) -> None:
        """Give the model ordinary parameters again."""
        while self._undo:
            self._undo.pop()(dtype)

    def _is_coded(self, target: Target) -> bool:
        return any(is_block(self.stored[name][1]) for names in target.names for name in names)

    def _tensor(self, name: str) -> Tensor:
        """A stored tensor as a view of the mapped file."""
        path, info = self.stored[name]
        if path not in self._files:
            self._files[path] = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        held = self._files[path][info.begin : info.end]
        if is_block(info):
            return held
        kind = TORCH_DTYPES[info.dtype]
        values = (held.clone() if info.begin % kind.itemsize else held).view(kind).view(info.shape)
        return values if kind in KEPT else values.bfloat16()

    def _weights(self, names: list[list[str]], shape: Shape) -> PackedWeights:
        weights = PackedWeights(names, shape)
        weights.reserve(sum(self.stored[name][1].nbytes for row in names for name in row))
        return weights

    def _pack_linear(self, model: Any, module: nn.Linear, target: Target) -> None:
        weights = self._weights(target.names, (module.out_features, module.in_features))
        packed = PackedLinear(weights, module.bias, module.weight.dtype)
        model.set_submodule(target.owner, packed)

        def undo(dtype: torch.dtype) -> None:
            linear = nn.Linear(module.in_features, module.out_features, packed.bias is not None, device="meta")
            linear.weight, linear.bias = nn.Parameter(target.restored(weights, dtype)), packed.bias  # type: ignore
            model.set_submodule(target.owner, linear)

        self._undo.append(undo)

    def _pack_experts(self, module: Any, first: Target, down: Target) -> None:
        original: type[nn.Module] = type(module)
        places = {"packed_first": first, "packed_down": down}
        for place, target in places.items():
            rows, columns = target.parameter.shape[1:][:: -1 if getattr(module, "is_transposed", False) else 1]
            setattr(module, place, self._weights(target.names, (rows // len(target.names), columns)))
            delattr(module, target.short)
        module.__class__ = packed_class(original)  # type: ignore[arg-type] # types are hashable
        module._is_hf_initialized = True

        def undo(dtype: torch.dtype) -> None:
            module.__class__ = original
            for place, target in places.items():
                setattr(module, target.short, nn.Parameter(target.restored(getattr(module, place), dtype)))
                delattr(module, place)

        self._undo.append(undo)

    def _pack_restored(self, around: nn.Module, module: Any, target: Target) -> bool:
        """Exchange a parameter for matrices that are restored while `around` runs; False if it cannot be."""
        if any(getattr(one, "check_dims", False) or type(one).__name__ not in _KNOWN for one in target.operations):
            return False
        shapes = {self._shape(name) for row in target.names for name in row}
        if len({len(row) for row in target.names}) != 1 or len(shapes) != 1:
            return False
        weights, place, known = self._weights(target.names, shapes.pop()), f"packed_{target.short}", target.parameter
        setattr(module, place, weights)
        delattr(module, target.short)
        restored = RestoredParameter(
            around, module, target.short, lambda: target.restored(getattr(module, place), known.dtype)
        )
        module._is_hf_initialized = True

        def undo(dtype: torch.dtype) -> None:
            restored.remove()
            setattr(module, target.short, nn.Parameter(target.restored(weights, dtype)))
            delattr(module, place)

        self._undo.append(undo)
        return True

    def _shape(self, name: str) -> Shape:
        info = self.stored[name][1]
        return read_block_header(self._tensor(name), name)[1] if is_block(info) else (info.shape[0], info.shape[1])


_KNOWN = ("MergeModulelist", "Concatenate", "Transpose", "Interleave")


def _first_and_down(module: Any, targets: Sequence[Target]) -> tuple[Target, Target] | None:
    """The parameters of a module that computes down(gate(first(x))) with the experts that a router chose, or None."""
    found = {target.short: target for target in targets}
    first, down = found.get("gate_up_proj") or found.get("up_proj"), found.get("down_proj")
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
        if not merged or transposed != turned or any(type(one).__name__ == "Interleave" for one in operations):
            return None
        if len(target.names) > 1 and not getattr(module, "is_concatenated", True):
            return None
        if missing := next((row for row in target.names if len(row) != len(down.names[0])), None):
            raise CheckpointError(
                f"{target.owner} has {len(down.names[0])} matrices for down_proj and {len(missing)} like {missing[0]}. "
                "Complete the download or quantize the model again."
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
        if (found := next((one.device for one in around.parameters() if one.device.type != "meta"), None)) is not None:
            return found
    return CPU
