"""Plug-in that lets `AutoModelForCausalLM.from_pretrained` load native checkpoints.

Every quantized matrix keeps its original tensor name, so transformers' own conversion (merging a
layer's experts into fused parameters) applies unchanged; blocks are dequantized just before it.
Imported by the hook in `alphaq/__init__.py` when transformers loads its quantizers.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from alphaq.checkpoint.architecture import architecture_of
from alphaq.errors import ArchitectureError, CheckpointError
from alphaq.quantizers.packing import decode, dequantize

FORMAT_VERSION = 1


@register_quantization_config("alphaq")
class AlphaQConfig(QuantizationConfigMixin):
    """`quantization_config` of a native checkpoint's config.json."""

    def __init__(self, format_version: int = FORMAT_VERSION, **figures: Any) -> None:
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"The checkpoint has native format {format_version}; this alphaq reads {FORMAT_VERSION}. Update alphaq."
            )
        self.quant_method = "alphaq"  # type: ignore[assignment]
        self.format_version = format_version
        self.average_bits = figures.get("average_bits")
        self.bits_per_weight = figures.get("bits_per_weight")
        self.dequantize = True


class DequantizeBlocks(ConversionOps):
    """Blocks (uint8, one-dimensional) become matrices in the parameter's dtype; the rest is only cast."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **_: Any
    ) -> dict[str, Any]:
        """{pattern: tensor or list of tensors} → the same with blocks dequantized."""
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype

        def restore(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dtype == torch.uint8 and tensor.ndim == 1:
                values = dequantize(decode(tensor.cpu(), full_layer_name), dtype)
                return values.to(tensor.device)
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


def fusions(model: Any, known: list[Any]) -> list[WeightConverter]:
    """How the experts' own matrices become the model's fused parameters, where no known conversion says so."""
    try:
        architecture = architecture_of(model.config.to_dict())
    except ArchitectureError:  # it may be an older or newer alphaq's
        return []
    stored_names = {role: stored for stored, role in architecture.projections.items()}
    fused = dict.fromkeys(architecture.first_match(name)[0] for name, _ in model.named_parameters())
    suffix = architecture.expert_name.partition("{layer}")[2]
    merged = [pattern for entry in known if isinstance(entry, WeightConverter) for pattern in entry.source_patterns]
    found = []
    for rule in fused:
        if rule is None or not rule.stacked:
            continue
        sources = [suffix.format(expert="*", projection=stored_names[part]) for part in rule.stacked]
        if any(re.search(pattern.replace("*", "0"), sources[0].replace("*", "0")) for pattern in merged):
            continue
        operations: list[ConversionOps] = [MergeModulelist(dim=0)]
        operations += [Concatenate(dim=1)] * (len(sources) > 1) + [Transpose(1, 2)] * rule.transposed
        operations += [Refold()] * rule.folded
        target = rule.template.partition("{layer}")[2]
        found.append(WeightConverter(source_patterns=sources, target_patterns=target, operations=operations))
    return found


@register_quantizer("alphaq")
class AlphaQQuantizer(HfQuantizer):
    """Loads native checkpoints by dequantizing; the model is then an ordinary 16- or 32-bit one."""

    requires_calibration = False
    serialized_names = {"weight": ["weight"]}  # noqa: RUF012 - the attribute transformers reads

    def __init__(self, quantization_config: AlphaQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise CheckpointError("transformers cannot quantize with alphaq on the fly. Use `alphaq quantize` first.")

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Dequantize before the model's own conversions."""
        return {"dequantize": DequantizeBlocks}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Add what transformers lacks for families that it keeps fused: putting their experts together."""
        merging = fusions(model, weight_conversions)
        return super().update_weight_conversions([*weight_conversions, *merging], model)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Called for every tensor: restores one that no converter takes, because its name is the parameter's own."""
        if isinstance(converter, WeightRenaming):
            converter.quantization_operation = DequantizeBlocks(self)
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # Nothing is quantized any more: saving must not look for the inverse of dequantizing.
        model._weight_conversions = None
        return model

    def is_serializable(self, **_: Any) -> bool:
        """A loaded model saves as an ordinary one."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Ordinary weights train."""
        return True
