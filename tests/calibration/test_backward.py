"""The backward pass layer by layer against autograd on the model that transformers loads as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_every_family import NOT_RUN, OFTEN

from alphaq.calibration import backward, text
from alphaq.calibration.backward import Drawn, stream_scores
from alphaq.calibration.fisher import FISHER_VERSION, Fisher, gather_fisher
from alphaq.calibration.gradients import Seen
from alphaq.calibration.inputs import stored_matrices
from alphaq.calibration.prior import routing_prior
from alphaq.calibration.stream import HollowModel, model_class
from alphaq.calibration.text import own_text
from alphaq.calibration.tokens import random_windows
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import CheckpointError, PassError, StatsError
from conftest import COMMON
from conftest import FAMILIES as COMMON_FAMILIES
from dense_models import dense_model
from families import FAMILIES, random_family, save_layout

SEVERAL_STREAMS = {"gemma4", "gemma4_text", "inkling2", "inkling2_text"}
"""Families whose layers hand on more than one stream."""
NO_HEAD = {"openai_privacy_filter"}
WINDOWS, LENGTH = 3, 24
IDS = random_windows(COMMON["vocab_size"], WINDOWS, LENGTH)


def scores(folder: Path, ids: torch.Tensor = IDS) -> tuple[dict[str, torch.Tensor], Drawn]:
    """Σ over the windows of G = gᵀ·x of every matrix, [windows, rows, columns]."""
    found: dict[str, torch.Tensor] = {}

    def see(seen: Seen) -> None:
        if seen.inputs.ndim == 1:
            return
        whole = found.setdefault(seen.matrix.name, torch.zeros(len(ids), *seen.matrix.shape))
        for window in range(len(ids)):
            inside = seen.positions // ids.shape[1] == window
            whole[window] += seen.gradients[inside].T @ seen.inputs[inside]

    return found, stream_scores(open_checkpoint(folder), ids, see)


def loaded(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def summed_log_chance(model: torch.nn.Module, ids: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.log_softmax(-1).gather(-1, drawn[..., None]).sum()


@pytest.mark.parametrize("family", COMMON_FAMILIES)
def test_gradients_are_those_of_the_loaded_model(save_family: Callable[..., Path], family: str) -> None:
    folder = save_family(family)
    found, drawn = scores(folder)
    model = loaded(folder)
    summed_log_chance(model, IDS, drawn.tokens).backward()
    parameters = dict(model.named_parameters())
    compared = 0
    for matrix in open_checkpoint(folder).matrices:
        if matrix.name not in found or matrix.role.value == "embedding":
            continue
        parameter = parameters.get(matrix.tensor)
        if parameter is None:  # experts are stacked once they are loaded
            end = f".experts.{'down_proj' if matrix.projection == 'down' else 'gate_up_proj'}"
            (stack,) = (name for name in parameters if f"layers.{matrix.layer}." in name and name.endswith(end))
            whole = parameters[stack].grad[matrix.expert]
            rows = matrix.shape[0]
            expected = whole[rows:] if matrix.projection == "up" else whole[:rows]
        else:
            expected = parameter.grad
        torch.testing.assert_close(found[matrix.name].sum(0), expected, atol=2e-4, rtol=2e-3)
        compared += 1
    assert compared > 20


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in OFTEN else pytest.mark.slow) for family in FAMILIES]
)
def test_gradient_passes_through_every_family_or_is_refused(family: str, tmp_path: Path) -> None:
    model = random_family(family)
    source = open_checkpoint(save_layout(model, tmp_path, published=True))
    ids = torch.arange(3, 27)[None]
    if family in NOT_RUN | SEVERAL_STREAMS | NO_HEAD:
        with pytest.raises(PassError if family in SEVERAL_STREAMS else CheckpointError, match="--method"):
            stream_scores(source, ids, lambda seen: None)
        return
    at_embedding: list[torch.Tensor] = []
    drawn = stream_scores(
        source, ids, lambda seen: at_embedding.append(seen.gradients) if seen.inputs.ndim == 1 else None
    )
    whole = (
        model_class(model.config).from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager").eval()
    )
    hollow = HollowModel(source)
    name = next(name for name, one in hollow.model.named_modules() if one is hollow.base)
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    embedding = whole.get_submodule(name).get_input_embeddings()
    embedding.register_forward_hook(keep)
    summed_log_chance(whole, ids, drawn.tokens).backward()
    expected, (gradient, *_) = kept[0].grad.flatten(0, -2), at_embedding
    scale = float(gradient.norm() / expected.norm())  # of an embedding that is scaled: its matrix' gradient is meant
    torch.testing.assert_close(gradient / scale, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


def test_the_factor_of_an_embedding_is_measured_however_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no one matrix is its weight, so that all of it is read and no row alone."""
    dense_model("gemma2").save_pretrained(tmp_path)
    source = open_checkpoint(tmp_path)
    found: list[torch.Tensor] = []

    def see(seen: Seen) -> None:
        if seen.inputs.ndim == 1:
            found.append(seen.gradients)

    stream_scores(source, IDS, see)
    (whole,) = found
    monkeypatch.setattr(backward, "stored_matrices", lambda *given: 2 * stored_matrices(*given))
    monkeypatch.setattr(HollowModel, "whole_matrix", lambda *given: None)
    stream_scores(source, IDS, see)
    assert len(found) == 3 and all(torch.equal(whole, one) for one in found[1:])


def test_fisher_information_of_a_window_is_that_of_its_gradient(save_family: Callable[..., Path]) -> None:
    folder = save_family("qwen2_moe")
    checkpoint = open_checkpoint(folder)
    found, _ = scores(folder)
    fisher = gather_fisher(checkpoint, IDS, routing_prior(checkpoint))
    for matrix in checkpoint.matrices:
        if matrix.role.value not in ("attention", "shared_expert"):
            continue
        one, squares = fisher.matrices[matrix.name], found[matrix.name].square()
        assert one.mean == pytest.approx(float(squares.sum()) / (WINDOWS * LENGTH) / squares[0].numel(), rel=1e-4)
        by_window = squares.sum((1, 2)).numpy()
        np.testing.assert_allclose(one.windows, by_window / by_window.mean(), rtol=1e-4)
        assert one.rows.mean() == pytest.approx(1, abs=1e-3) and one.columns.mean() == pytest.approx(1, abs=1e-3)


def test_experts_without_tokens_are_drawn_to_what_the_layer_has_in_common(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("mixtral"))
    one_token = torch.tensor([[5, 6]])
    fisher = gather_fisher(checkpoint, one_token, routing_prior(checkpoint))
    assert fisher.matrices.keys() >= {matrix.name for matrix in checkpoint.planned}
    assert all(one.mean >= 0 and np.isfinite(one.mean) for one in fisher.matrices.values())


def test_what_was_found_survives_a_file(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("mixtral"))
    fisher = gather_fisher(checkpoint, IDS, {})
    again = Fisher.from_json(fisher.to_json())
    assert again.to_json() == fisher.to_json() and again.tokens == fisher.tokens
    for name, one in fisher.matrices.items():
        np.testing.assert_allclose(again.matrices[name].rows, one.rows, rtol=1e-3, atol=1e-3)
    for damaged in ("{}", "nonsense", fisher.to_json().replace(f'"version": {FISHER_VERSION}', '"version": 99')):
        with pytest.raises(StatsError, match="holds no Fisher information"):
            Fisher.from_json(damaged)


def test_what_a_model_writes_is_as_likely_as_it_says(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    ids = own_text(checkpoint, 4, 64)
    assert ids.shape == (4, 64) and torch.equal(ids, own_text(checkpoint, 4, 64))
    with torch.no_grad():
        log_p = loaded(tiny)(ids).logits[:, :-1].log_softmax(-1)
    surprise = -float(log_p.gather(-1, ids[:, 1:, None]).mean())
    entropy = -float((log_p.exp() * log_p).sum(-1).mean())
    assert surprise == pytest.approx(entropy, rel=0.1)
    assert entropy < 4.5  # of random tokens that it rewrites once: 4.7


def test_a_model_too_large_to_be_held_rewrites(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MOST_HELD", 1)
    monkeypatch.setattr(text, "written", lambda *_: pytest.fail("held"))
    assert own_text(open_checkpoint(tiny), 2, 16).shape == (2, 16)
