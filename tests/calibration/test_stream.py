import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_checkpoint import changed

from alphaq.calibration import stream
from alphaq.calibration.stream import LayerTraffic, stream_forward
from alphaq.calibration.text import Text
from alphaq.calibration.tokens import random_windows, read_windows, rewritten
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import AlphaQError, CheckpointError
from conftest import COMMON, FAMILIES, random_model

IDS = random_windows(COMMON["vocab_size"], windows=3, length=24)


def streamed(folder: Path, ids: torch.Tensor = IDS) -> list[LayerTraffic]:
    found: list[LayerTraffic] = []
    stream_forward(open_checkpoint(folder), ids, found.append)
    return found


def loaded_traffic(folder: Path, ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, ...]]:
    """What hooks see on the model that transformers loads as a whole."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[int, tuple[torch.Tensor, ...]] = {}
    for number, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if name.endswith(".experts"):
                module.register_forward_pre_hook(lambda _, args, number=number: seen.update({number: args}))
    with torch.inference_mode():
        model(ids)
    return seen


def assert_same_traffic(found: list[LayerTraffic], expected: dict[int, tuple[torch.Tensor, ...]]) -> None:
    assert [traffic.layer for traffic in found] == sorted(expected)
    for traffic in found:
        inputs, experts, weights = expected[traffic.layer]
        assert traffic.inputs.dtype == traffic.weights.dtype == torch.float32 and traffic.experts.dtype == torch.int64
        torch.testing.assert_close(traffic.inputs, inputs, atol=1e-4, rtol=1e-4)
        # Slots have no order: routers sort them by score, or not at all.
        order, expected_order = traffic.experts.argsort(1), experts.argsort(1)
        assert torch.equal(traffic.experts.gather(1, order), experts.gather(1, expected_order))
        torch.testing.assert_close(
            traffic.weights.gather(1, order), weights.float().gather(1, expected_order), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_traffic_equals_that_of_the_loaded_model(
    save_family: Callable[..., Path], family: str, fused: bool
) -> None:
    folder = save_family(family, fused)
    assert_same_traffic(streamed(folder), loaded_traffic(folder, IDS))


def test_trained_model_streams_as_it_loads(tiny: Path) -> None:
    ids = read_windows(tiny, "The router decides which experts see a token. " * 40, length=64, max_tokens=256)
    assert_same_traffic(streamed(tiny, ids), loaded_traffic(tiny, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_at_most_one_layer_is_in_memory(
    save_family: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    materialised: list[set[str]] = []

    class Watched(stream.HollowModel):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            kept.append(self)

        def fill(self, *args: Any, **kwargs: Any) -> None:
            super().fill(*args, **kwargs)
            parts = [name for name, value in self.model.state_dict().items() if not value.is_meta]
            assert not any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in parts)
            materialised.append({next(part for part in self.parts if name.startswith(f"{part}.")) for name in parts})

    monkeypatch.setattr(stream, "HollowModel", Watched)
    streamed(save_family(family))
    assert all(len(parts) <= 1 for parts in materialised)
    assert {part for parts in materialised for part in parts} >= set(kept[0].layers)
    assert all(value.is_meta for value in kept[0].model.state_dict().values())


def test_missing_tensor_is_named(save_family: Callable[..., Path], tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    folder = changed(save_family("qwen2_moe"), tmp_path / "out", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"stores no tensor for {name} .*Complete the download"):
        streamed(folder)


def test_tensor_of_another_shape_is_named(save_family: Callable[..., Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.shared_expert_gate.weight"
    folder = changed(
        save_family("qwen2_moe"), tmp_path / "out", lambda tensors: tensors.update({name: torch.zeros(1, 60)})
    )
    with pytest.raises(CheckpointError, match=rf"{name} cannot be made of .*\[1, 60\] is not \[1, 64\]"):
        streamed(folder)


def test_experts_that_cannot_be_merged_are_named(save_family: Callable[..., Path], tmp_path: Path) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for expert in range(4):
            tensors[f"model.layers.1.mlp.experts.{expert}.gate_proj.weight"] = torch.zeros(32, 60)

    folder = changed(save_family("qwen2_moe"), tmp_path / "out", shrink)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.0\.gate_proj\.weight has shape \[32, 60\]"):
        streamed(folder)


def test_model_without_experts_is_refused(save_family: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    dense = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
    monkeypatch.setattr(type(dense), "_from_config", lambda *_, **__: dense)
    monkeypatch.setattr(stream, "model_class", lambda config: type(dense))
    with pytest.raises(CheckpointError, match=r"LlamaModel has no module in its layers whose experts"):
        streamed(save_family("mixtral"))


def test_config_that_transformers_refuses_is_reported(save_family: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(save_family("mixtral"), tmp_path / "out", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "no such function"}))
    with pytest.raises(CheckpointError, match="transformers cannot build the model"):
        streamed(folder)


@pytest.mark.parametrize("ids", [torch.zeros(4, dtype=torch.int64), torch.full((1, 4), 128), torch.zeros(0, 4).long()])
def test_ids_that_are_no_windows_are_refused(save_family: Callable[..., Path], ids: torch.Tensor) -> None:
    with pytest.raises(AlphaQError, match=r"are no windows over the 128 tokens"):
        streamed(save_family("mixtral"), ids)


def test_windows_are_whole_and_in_order(tiny: Path) -> None:
    from transformers import AutoTokenizer

    text = "One window after another, and a rest that is left out. " * 20
    ids = AutoTokenizer.from_pretrained(tiny)(text)["input_ids"]
    found = read_windows(tiny, text, length=32, max_tokens=100)
    assert found.dtype == torch.int64 and found.shape == (3, 32)
    assert found.flatten().tolist() == ids[:96]


def test_text_shorter_than_a_window_is_refused(tiny: Path) -> None:
    with pytest.raises(AlphaQError, match=r"fewer than one window of 64\. Give a longer text"):
        read_windows(tiny, "too short", length=64, max_tokens=1000)


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        read_windows(tmp_path, "text", length=2, max_tokens=10)


def test_random_windows_depend_on_the_seed_only() -> None:
    first = random_windows(1000, 4, 16)
    assert torch.equal(first, random_windows(1000, 4, 16)) and not torch.equal(first, random_windows(1000, 4, 16, 1))
    assert 0 <= int(first.min()) <= int(first.max()) < 1000 and first.unique().numel() > 50


@pytest.mark.parametrize("tied", [False, True])
def test_rewritten_tokens_are_samples_of_the_model_s_own_predictions(tmp_path: Path, tied: bool) -> None:
    model = random_model("qwen2_moe", tie_word_embeddings=tied)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1000)  # all but certain, so that a sample is the likeliest token
    model.save_pretrained(tmp_path / "model")
    found = rewritten(open_checkpoint(tmp_path / "model"), IDS)
    with torch.inference_mode():
        expected = model.float()(IDS).logits[:, :-1].argmax(-1)
    assert torch.equal(found[:, :1], IDS[:, :1])
    assert (found[:, 1:] == expected).float().mean() > 0.95
    assert torch.equal(found, rewritten(open_checkpoint(tmp_path / "model"), IDS))


def test_a_text_with_a_token_that_has_no_row_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder, text = Path(shutil.copytree(tiny, tmp_path / "m")), tmp_path / "t.txt"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 4096, "content": "[PAD]", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    checkpoint = open_checkpoint(folder)
    text.write_text("one two three " * 20)
    Text(text, 16).windows(checkpoint)
    text.write_text("[PAD] " + text.read_text())
    with pytest.raises(AlphaQError, match=r"t\.txt has a token with the id 4096"):
        Text(text, 16).windows(checkpoint)
