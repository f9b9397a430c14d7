"""Steps of transformers' conversions that stored blocks need beside its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.utils import logging

from alphaq.formats.blocks import decode, dequantize
from alphaq.formats.coding import decode_tensor, is_coded

logger = logging.get_logger(__name__)
ByPattern = dict[str, Tensor | list[Tensor]]
"""What a step of transformers' conversions takes: a tensor, or one to each expert, by the pattern of its name."""


class DequantizeBlocks(ConversionOps):
    """Blocks (uint8, one-dimensional) become matrices in the parameter's dtype; the rest is only cast."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self, input_dict: ByPattern, full_layer_name: str = "", model: Any = None, **_: Any
    ) -> ByPattern:
        """The same with blocks dequantized."""
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype

        def restore(tensor: Tensor) -> Tensor:
            if is_coded(tensor):
                tensor = decode_tensor(tensor.cpu(), full_layer_name).to(tensor.device)
            if tensor.dtype == torch.uint8 and tensor.ndim == 1:
                logger.warning_once(
                    f"{full_layer_name} and others do not stay packed: transformers' class or a `key_mapping` has no "
                    "place for blocks. They take the memory of 16-bit weights."
                )
                return dequantize(decode(tensor.cpu(), full_layer_name), dtype).to(tensor.device)
            return tensor.to(dtype)

        return {
            pattern: [restore(tensor) for tensor in value] if isinstance(value, list) else restore(value)
            for pattern, value in input_dict.items()
        }


class Refold(ConversionOps):
    """[experts, rows, columns] takes the parameter's own shape, which may be [experts · rows, columns]."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Tensor], full_layer_name: str = "", model: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        """{target: fused tensor} → the same, reshaped."""
        shape = model.get_parameter_or_buffer(full_layer_name).shape
        return {target: tensor.reshape(shape) for target, tensor in input_dict.items()}
