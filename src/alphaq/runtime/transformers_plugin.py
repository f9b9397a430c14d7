"""Plug-in that lets `AutoModelForCausalLM.from_pretrained` load native checkpoints, which stay packed.

Every quantized matrix keeps its original tensor name, so transformers' own conversions say where it belongs. What
they would fuse stays apart; the rest of the model is loaded as ever.
Imported by the hook in `alphaq/__init__.py` when transformers loads its quantizers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from alphaq.calibration.uneven import take_own_counts
from alphaq.checkpoint.families.architecture import architecture_of
from alphaq.errors import ArchitectureError, CheckpointError
from alphaq.formats.versions import NATIVE_FORMAT_VERSION, UNEVEN, check_native_format
from alphaq.runtime.conversions import DequantizeBlocks, Refold
from alphaq.runtime.decoding import forget_tokens
from alphaq.runtime.packed import PackedWeights
from alphaq.runtime.replace import Packer, stored_tensors
from alphaq.runtime.skipping import skip_experts


@register_quantization_config("alphaq")
class AlphaQConfig(QuantizationConfigMixin):
    """`quantization_config` of a native checkpoint's config.json."""

    def __init__(self, format_version: int = NATIVE_FORMAT_VERSION, **figures: Any) -> None:
        check_native_format(format_version)
        self.quant_method = "alphaq"  # type: ignore[assignment]
        self.format_version = format_version
        self.average_bits = figures.get("average_bits")
        self.bits_per_weight = figures.get("bits_per_weight")
        if figures.get(UNEVEN):
            setattr(self, UNEVEN, True)


def fusions(model: Any, known: list[Any]) -> list[WeightConverter]:
    """How the experts' own matrices become the model's fused parameters, where no known conversion says so."""
    try:
        architecture = architecture_of(model.config.to_dict())
    except ArchitectureError:  # it may be an older or newer alphaq's
        return []
    stored_names = {role: stored for stored, role in architecture.projections.items()}
    prefix = model.base_model_prefix  # which a model without a head lacks
    fused = dict.fromkeys(
        architecture.first_match(name)[0] or architecture.first_match(f"{prefix}.{name}")[0]
        for name, _ in model.named_parameters()
    )
    merged = [pattern for entry in known if isinstance(entry, WeightConverter) for pattern in entry.source_patterns]
    converters = []
    for rule in fused:
        if rule is None or not rule.stacked:
            continue
        suffix = (rule.name or architecture.expert_name).partition("{layer}")[2]
        sources = [suffix.format(expert="*", projection=stored_names[part]) for part in rule.stacked]
        if any(re.search(pattern.replace("*", "0"), sources[0].replace("*", "0")) for pattern in merged):
            continue
        operations: list[ConversionOps] = [MergeModulelist(dim=0)]
        operations += [Concatenate(dim=1)] * (len(sources) > 1) + [Transpose(1, 2)] * rule.transposed
        operations += [Refold()] * rule.folded
        target = rule.template.partition("{layer}")[2]
        converters.append(WeightConverter(source_patterns=sources, target_patterns=target, operations=operations))
    return converters


@register_quantizer("alphaq")
class AlphaQQuantizer(HfQuantizer):
    """Loads native checkpoints packed; `model.dequantize()` makes ordinary models of them."""

    requires_calibration = False
    serialized_names = {"weight": ["weight"]}  # noqa: RUF012 - the attribute transformers reads

    def __init__(self, quantization_config: AlphaQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise CheckpointError("transformers cannot quantize with alphaq on the fly. Use `alphaq quantize` first.")
        self.packer: Packer | None = None
        self._merging: list[WeightConverter] | None = None

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Dequantize what cannot stay packed before the model's own conversions."""
        return {"dequantize": DequantizeBlocks}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Add what transformers lacks for families that it keeps fused: putting their experts together."""
        if self._merging is None:  # later the model has no parameters any more to tell by
            self._merging = fusions(model, weight_conversions)
        return super().update_weight_conversions([*weight_conversions, *self._merging], model)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Called for every tensor: restores one that no converter takes, because its name is the parameter's own."""
        if isinstance(converter, WeightRenaming):
            converter.quantization_operation = DequantizeBlocks(self)
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise CheckpointError(
                "A native checkpoint is loaded from its safetensors files, not from a state_dict or other files. "
                "Give from_pretrained its folder or hub id."
            )
        take_own_counts(model)
        self.packer = Packer(stored_tensors(checkpoint_files))
        elsewhere = self.packer.pack(model, get_model_conversion_mapping(model, None, self))
        ignored = {rf"^{re.escape(name)}$" for name in elsewhere}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        assert self.packer is not None  # transformers calls the two in this order
        self.packer.fill(model)
        model._weight_conversions = []  # names are put back in `get_state_dict_and_metadata`, once
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` writes: a native checkpoint again, under the names that it had."""
        assert self.packer is not None
        names, slices, state = self.packer.names, self.packer.slices, model.state_dict()
        model._weight_conversions = None
        saved = revert_weight_conversion(
            model, {name: one for name, one in state.items() if name not in names.keys() | slices.keys()}
        )
        model._weight_conversions = []
        saved |= {names[name]: one for name, one in state.items() if name in names}
        for name, own in slices.items():
            saved |= dict(zip(own, map(torch.clone, state[name]), strict=True))  # files want no shared memory
        for module in model.modules():
            if isinstance(module, PackedWeights):
                saved |= module.tensors()
        return saved, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        assert self.packer is not None
        forget_tokens(model)
        skip_experts(model, 0)  # an ordinary model runs all of its experts
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype  # a saved config has names
        if dtype != model.dtype:
            model.to(dtype)
        self.packer.restore(model, dtype)
        model._weight_conversions = None
        return model

    def is_serializable(self, **_: Any) -> bool:
        """A loaded model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False
