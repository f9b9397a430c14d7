from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import PassError
from alphaq.nouns.matrix import Role
from alphaq.runtime.loading import load_model
from alphaq.trials.held import HeldModel
from conftest import random_model

IDS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize(("family", "fused"), [("qwen2_moe", True), ("mixtral", False), ("deepseek_v2", False)])
def test_a_held_model_computes_what_transformers_does(
    save_family: Callable[..., Path], family: str, fused: bool
) -> None:
    checkpoint = open_checkpoint(save_family(family, fused))
    held = HeldModel(checkpoint)
    with torch.no_grad():
        expected = random_model(family).to(torch.bfloat16).float()(IDS).logits
        torch.testing.assert_close(held(IDS).logits, expected, atol=1e-4, rtol=1e-4)
        matrices = [matrix for matrix in checkpoint.matrices if matrix.role is not Role.ROUTER]
        assert {matrix.name for matrix in matrices} <= held.exchangeable
        for matrix in matrices:  # nothing changes where what is put is what was there
            held.put(matrix.name, checkpoint.read(matrix).float())
        torch.testing.assert_close(held(IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", ["experts.1.down_proj", "self_attn.k_proj", "embed_tokens", "lm_head"])
def test_gradients_are_the_slopes_of_the_divergence(save_family: Callable[..., Path], part: str) -> None:
    checkpoint = open_checkpoint(save_family("qwen2_moe"))
    held, reference = HeldModel(checkpoint), HeldModel(checkpoint)
    noise = torch.Generator().manual_seed(0)
    for matrix in checkpoint.planned:
        weight = checkpoint.read(matrix).float()
        held.put(matrix.name, weight + 0.1 * weight.std() * torch.randn(weight.shape, generator=noise))
    matrix = next(one for one in checkpoint.matrices if part in one.name)
    at = checkpoint.read(matrix).float()
    held.put(matrix.name, at)
    gradient = held.gradients(IDS, reference, 1, [matrix.name])[matrix.name]
    step = 1e-4 * gradient * at.norm() / gradient.norm()  # so short that no token changes its expert

    def divergence(values: torch.Tensor) -> float:
        held.put(matrix.name, values)
        with torch.no_grad():
            log_p, log_q = (one(IDS).logits[:, :-1].double().log_softmax(-1) for one in (reference, held))
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    assert float((gradient * step).sum()) == pytest.approx(
        (divergence(at + step) - divergence(at - step)) / 2, rel=0.02
    )


def test_a_matrix_that_no_token_reached_has_no_slope(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("mixtral"))
    held, reference = HeldModel(checkpoint), HeldModel(checkpoint)
    names = [matrix.name for matrix in checkpoint.planned]
    few = held.gradients(IDS[:1, :2], reference, 1, names)
    assert any(not one.any() for one in few.values()) and all(one.shape for one in few.values())


def test_a_class_without_a_gradient_is_named(save_family: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(save_family("qwen2_moe"))
    held, reference = HeldModel(checkpoint), HeldModel(checkpoint)
    forward = held.model.forward
    monkeypatch.setattr(held.model, "forward", torch.no_grad()(forward))
    with pytest.raises(PassError, match=r"Qwen2MoeForCausalLM of .* gives no gradient"):
        held.gradients(IDS, reference, 1, [checkpoint.planned[0].name])


def test_the_bundled_model_is_held_as_it_is_loaded(tiny: Path) -> None:
    with torch.no_grad():
        loaded, _ = load_model(tiny, "float32")
        torch.testing.assert_close(
            HeldModel(open_checkpoint(tiny))(IDS).logits, loaded(IDS).logits, atol=1e-3, rtol=1e-4
        )
