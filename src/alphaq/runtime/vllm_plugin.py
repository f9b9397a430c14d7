"""Plug-in that lets `vllm serve` run native checkpoints from their packed blocks, each expert at its own bits.

Imported by vLLM through the entry point `vllm.general_plugins` in each of its processes, never by AlphaQ itself. Most
of them build no model, so the layers are a module apart.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding.ffi
import torch
from torch import nn
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from alphaq.errors import CheckpointError
from alphaq.formats.versions import CODECS, NATIVE_FORMAT_VERSION, UNEVEN, check_native_format
from alphaq.work.untrusted import JsonObject

QUANT_METHOD = "alphaq"


def register() -> None:
    """What vLLM calls in each of its processes, more than once in some."""
    _shield_llvmlite()
    register_quantization_config(QUANT_METHOD)(AlphaQConfig)


class AlphaQConfig(QuantizationConfig):
    """`quantization_config` of a native checkpoint: which blocks there are, the files say.

    Every process that builds the model makes or unpickles one before.
    """

    def __init__(self) -> None:
        super().__init__()
        _restore_embeddings()

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        _restore_embeddings()

    def get_name(self) -> str:
        """As in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Turing, the oldest that Triton compiles for."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None but config.json."""
        return []

    @classmethod
    def from_config(cls, config: JsonObject) -> AlphaQConfig:
        """Raises CheckpointError if the checkpoint's format is newer, or vLLM cannot run it."""
        check_native_format(config.get("format_version", NATIVE_FORMAT_VERSION))
        if (codec := config.get("codec")) not in (None, CODECS[0]):
            raise CheckpointError(
                f"vLLM cannot load tensors coded with {codec}. Decode them: alphaq recode OUT --codec none -o DECODED"
            )
        if config.get(UNEVEN):
            raise CheckpointError(
                "vLLM has one number of experts for all layers, and this model has others in some. Run it in "
                "transformers, or plan again with --drop-counts equal."
            )
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How a layer loads and runs; None for kinds that have no weights of their own."""
        from alphaq.runtime.vllm_layers import method_of

        return method_of(layer, prefix, self.packed_modules_mapping.get(prefix.rpartition(".")[2]))


def _restore_embeddings() -> None:
    """Let vLLM's embeddings and heads load blocks, as matrices.

    Their class is told so, not a method of each layer: several models do not ask how their embedding is stored.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    load = VocabParallelEmbedding.weight_loader
    if load.__module__ == __name__:
        return

    def weight_loader(self: Any, param: torch.Tensor, loaded_weight: torch.Tensor, *others: Any, **options: Any) -> Any:
        from alphaq.formats.blocks import decode, dequantize, is_block  # kernels, which not every process needs

        if is_block(loaded_weight):
            matrix = decode(loaded_weight.cpu(), "The embedding or head")
            loaded_weight = dequantize(matrix, param.dtype).to(loaded_weight.device)
        return load(self, param, loaded_weight, *others, **options)

    VocabParallelEmbedding.weight_loader = weight_loader


def _shield_llvmlite() -> None:
    """Let vLLM's workers start on CPUs where numba is loaded.

    vLLM 0.32 asks whatever any module holds for its `__dict__`. llvmlite's library takes that for the name of one of
    its functions and answers with an object that is no dictionary.
    """
    library = type(llvmlite.binding.ffi.lib)
    look_up = library.__getattr__
    if look_up.__module__ == __name__:
        return

    def attribute(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return look_up(self, name)

    library.__getattr__ = attribute
