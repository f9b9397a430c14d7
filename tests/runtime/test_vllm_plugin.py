"""The plug-in for vLLM, as far as it shows without vLLM: stand-ins take the place of the classes that it extends."""

from __future__ import annotations

import importlib
import pickle
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from alphaq.errors import CheckpointError
from alphaq.formats.blocks import decode, dequantize, encode
from alphaq.formats.table import parse_choice
from alphaq.quantizers.base import rounder_of


class Embedding:
    """What vLLM's class does with a tensor of the checkpoint."""

    def weight_loader(self, param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
        assert loaded_weight.shape[0] == param.shape[0]
        param.copy_(loaded_weight)


class Config:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with stand-ins for vLLM's."""
    layers = "vllm.model_executor.layers"
    contents: dict[str, dict[str, Any]] = {
        f"{layers}.quantization": {"register_quantization_config": lambda name: lambda cls: cls},
        f"{layers}.quantization.base_config": {"QuantizationConfig": Config},
        f"{layers}.vocab_parallel_embedding": {
            "VocabParallelEmbedding": type("Embedding", (), {"weight_loader": Embedding.weight_loader})
        },
    }
    for name in ("vllm", "vllm.model_executor", layers, *contents):
        module = ModuleType(name)
        module.__dict__.update(contents.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "alphaq.runtime.vllm_plugin", raising=False)
    found = importlib.import_module("alphaq.runtime.vllm_plugin")
    monkeypatch.setitem(sys.modules, "alphaq.runtime.vllm_plugin", found)  # and taken away again afterwards
    return found


def embedding_class() -> Any:
    return sys.modules["vllm.model_executor.layers.vocab_parallel_embedding"].VocabParallelEmbedding


@pytest.mark.parametrize("arrives", ["made", "pickled"])
@pytest.mark.parametrize("choice", ["4g32", "t3.5"])
def test_embeddings_take_blocks_as_the_matrices_that_they_are(plugin: Any, choice: str, arrives: str) -> None:
    config = plugin.AlphaQConfig.from_config({"format_version": 1})
    if arrives == "pickled":  # to a process that has not made one
        sent = pickle.dumps(config)
        embedding_class().weight_loader = Embedding.weight_loader
        assert pickle.loads(sent).packed_modules_mapping == {}
    weight = torch.randn(12, 64)
    block = encode(rounder_of("debiased")(weight, parse_choice(choice), "table"))
    parameter = torch.zeros(12, 64)
    embedding_class()().weight_loader(parameter, block)
    assert torch.equal(parameter, dequantize(decode(block)))
    embedding_class()().weight_loader(parameter, weight)  # one that was kept
    assert torch.equal(parameter, weight)


def test_several_configs_change_the_class_once(plugin: Any) -> None:
    plugin.AlphaQConfig.from_config({})
    first = embedding_class().weight_loader
    plugin.AlphaQConfig.from_config({})
    assert embedding_class().weight_loader is first


def test_models_whose_layers_differ_in_experts_are_refused(plugin: Any) -> None:
    with pytest.raises(CheckpointError, match=r"one number of experts for all layers.*--drop-counts equal"):
        plugin.AlphaQConfig.from_config({"uneven_experts": True})
