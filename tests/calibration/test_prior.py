import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from changed_checkpoint import biased_to_first_two, changed

from alphaq.calibration import stream
from alphaq.calibration.prior import SAMPLES, routing_prior
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import CheckpointError
from conftest import COMMON, EXPERTS, FAMILIES


def samples(layer: int) -> torch.Tensor:
    """The directions that the prior draws for a layer, [samples, hidden]."""
    seed = int.from_bytes(hashlib.sha256(f"model.layers.{layer}.mlp".encode()).digest()[:8], "little")
    random = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(random.standard_normal((SAMPLES, COMMON["hidden_size"]), np.float32))


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_prior_equals_softmax_and_top_k_of_the_router(save_family: Callable[..., Path]) -> None:
    folder = save_family("qwen2_moe")
    found = routing_prior(open_checkpoint(folder))
    for number, layer in enumerate(load(folder).model.layers):
        states = samples(number) * layer.post_attention_layernorm.weight.detach()
        probabilities, chosen = (states @ layer.mlp.gate.weight.detach().T).softmax(-1).topk(2)
        for expert in range(EXPERTS):
            of_expert = torch.where(chosen == expert, probabilities, 0)
            use = found[number, expert]
            assert use.tokens == pytest.approx(int((chosen == expert).sum()), abs=3)  # ties within rounding
            assert use.frequency == pytest.approx(use.tokens / (2 * SAMPLES))
            assert use.mean_square_weight == pytest.approx(float(of_expert.square().sum()) / SAMPLES, rel=1e-3)
            assert use.mean_weight == pytest.approx(float(of_expert.sum()) / use.tokens, rel=1e-3)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_prior_equals_the_loaded_block_on_the_same_samples(
    save_family: Callable[..., Path], family: str, fused: bool
) -> None:
    folder = save_family(family, fused)
    found = routing_prior(open_checkpoint(folder))
    model = load(folder)
    seen: list[tuple[torch.Tensor, ...]] = []
    for number, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "experts"):
            assert (number, 0) not in found
            continue
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
        with torch.no_grad():
            layer.mlp((samples(number)[:4096] * layer.post_attention_layernorm.weight)[None])
        _, experts, weights = seen.pop()
        uses = [found[number, expert] for expert in range(EXPERTS)]
        assert math.isclose(sum(use.frequency for use in uses), 1)
        shares = torch.bincount(experts.flatten(), minlength=EXPERTS) / experts.numel()
        assert [use.frequency for use in uses] == pytest.approx(shares.tolist(), abs=0.03)  # a quarter of the samples
        total = sum(use.mean_square_weight for use in uses)
        assert total == pytest.approx(float(weights.square().sum(1).mean()), rel=0.03)


def test_prior_heeds_the_selection_bias(save_family: Callable[..., Path], tmp_path: Path) -> None:
    found = routing_prior(open_checkpoint(changed(save_family("deepseek_v3"), tmp_path / "out", biased_to_first_two)))
    for layer in (1, 2):
        assert [found[layer, expert].frequency for expert in range(EXPERTS)] == [0.5, 0.5, 0, 0]


def test_prior_reads_no_expert(save_family: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = stream.HollowModel._stored
    monkeypatch.setattr(stream.HollowModel, "_stored", lambda self, name: (read.append(name), original(self, name))[1])
    routing_prior(open_checkpoint(save_family("qwen2_moe")))
    assert read and not [name for name in read if "expert." in name or "experts." in name]
    assert not [name for name in read if "attn" in name or "embed" in name]


def test_prior_leaves_no_weight_behind_and_repeats(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("deepseek_v3"))
    assert routing_prior(checkpoint) == routing_prior(checkpoint)


def test_layer_without_the_norm_is_refused(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("mixtral"))
    other = replace(checkpoint.architecture, router_norm="pre_feedforward_layernorm")
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.0\.pre_feedforward_layernorm, so what"):
        routing_prior(replace(checkpoint, architecture=other))


def test_block_that_never_calls_its_experts_is_refused(
    save_family: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    monkeypatch.setattr(MixtralSparseMoeBlock, "forward", lambda self, hidden_states: hidden_states)
    with pytest.raises(CheckpointError, match="does not lead from hidden states straight to its experts"):
        routing_prior(open_checkpoint(save_family("mixtral")))
