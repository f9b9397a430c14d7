"""What norms put out, for families that store their weights in different ways."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alphaq.calibration.proxy import Proxy
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import CheckpointError
from families import random_family, save_layout


def changed_norms(family: str, folder: Path) -> tuple[Path, dict[int, torch.Tensor]]:
    """A tiny model whose norms differ by column, and the mean squares of what those before its experts put out."""
    model = random_family(family)
    generator = torch.Generator().manual_seed(1)
    expected = {}
    for number, layer in enumerate(model.get_decoder().layers):
        norm = getattr(layer, "post_attention_layernorm", None) or layer.input_layernorm
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
                parameter.copy_(parameter.bfloat16())
            samples = torch.randn(1 << 16, norm.weight.numel(), generator=generator)
            expected[number] = norm(samples).square().mean(0)
    return save_layout(model, folder, True), expected


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_next", "phimoe", "cohere2_moe"])
def test_moments_are_those_of_the_norms_output(family: str, tmp_path: Path) -> None:
    """Weights g; stored as g − 1; a norm that takes the mean away, with a bias; and without."""
    folder, expected = changed_norms(family, tmp_path / "model")
    checkpoint = open_checkpoint(folder)
    proxy = Proxy("norm")
    known = proxy.diagonals(checkpoint)
    assert known
    for matrix in checkpoint.planned:
        found = proxy.diagonal(known, matrix)
        if matrix.projection == "down":
            assert torch.equal(found, torch.ones(matrix.shape[1]))
        else:
            assert matrix.layer is not None
            assert torch.allclose(found, expected[matrix.layer], rtol=0.2, atol=0.02)  # of so few samples
            assert float((found / expected[matrix.layer]).mean()) == pytest.approx(1, abs=0.03)


def test_latent_experts_do_not_see_the_norm(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_layout(random_family("nemotron_h", moe_latent_size=32), tmp_path / "model", True))
    proxy = Proxy("norm")
    known = proxy.diagonals(checkpoint)
    for matrix in checkpoint.planned:
        assert torch.equal(proxy.diagonal(known, matrix), torch.ones(matrix.shape[1]))


def test_identity_needs_no_model(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("mixtral"))
    proxy = Proxy("identity")
    assert proxy.diagonals(checkpoint) == {}
    assert torch.equal(proxy.diagonal({}, checkpoint.planned[0]), torch.ones(checkpoint.planned[0].shape[1]))


def test_a_family_whose_norm_is_not_known_is_refused(tmp_path: Path) -> None:
    folder = save_layout(random_family("gemma4_text"), tmp_path / "model", True)
    with pytest.raises(CheckpointError, match="norm before its router"):
        Proxy("norm").diagonals(open_checkpoint(folder))
