"""Experts that hardly count for a token are left out, by the family's own way to weigh the rest."""

from __future__ import annotations

import copy
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alphaq  # noqa: F401 - registers the plug-in
from alphaq import pipeline
from alphaq.checkpoint.families.architecture import architecture_of
from alphaq.checkpoint.families.routing import renormalises
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import AlphaQError
from alphaq.nouns.plan import Plan
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.skipping import Decoding
from alphaq.runtime import modules
from alphaq.runtime.modules import PackedExperts
from alphaq.runtime.skipping import CALL, skip_experts
from families import FAMILIES, SMALL, random_family, save_layout

THREE = dict(num_experts_per_tok=3, num_experts_per_token=3, moe_topk=3, moe_k=3, top_k_experts=3)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    found: Tensor = model(torch.arange(3, 35)[None]).logits
    return found


def native(family: str, folder: Path, **settings: Any) -> Path:
    """A random model of a family whose experts have 4 bits."""
    source = open_checkpoint(save_layout(random_family(family, SMALL | settings), folder / "source", True))
    wanted = {one.name: "4g32" for one in source.matrices if one.role == source.planned_role}
    pipeline.quantize(source, Plan(engine="native", choices=wanted), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native("mixtral", tmp_path_factory.mktemp("mixtral"), **THREE)


def by_hand(module: PackedExperts, share: float, renormalise: bool) -> None:
    """The same layer, one token after the other, with the experts that are left."""
    original = module.forward

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for token, (chosen, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            kept = weights >= share * weights.max()
            rest = weights[kept] * (weights.sum() / weights[kept].sum() if renormalise else 1)
            out[token] = original(hidden_states[token : token + 1], chosen[kept][None], rest[None])
        return out

    module.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_the_rest_weighs_what_the_family_makes_of_it(family: str, tmp_path: Path) -> None:
    folder = native(family, tmp_path, **THREE)
    model, other = load(folder), load(folder)
    before = logits(model)
    skip_experts(model, 0.9)
    for module in other.modules():
        if isinstance(module, PackedExperts):
            by_hand(module, 0.9, family == "mixtral")
    assert float((logits(model) - logits(other)).abs().max()) < 1e-5
    assert float((logits(model) - before).abs().max()) > 1e-4


def test_threshold_0_and_undoing_it_change_no_bit(mixtral: Path) -> None:
    model = load(mixtral, torch.bfloat16)
    before = logits(model)
    skip_experts(model, 0)
    assert torch.equal(logits(model), before)
    skip_experts(model, 0.9)
    skip_experts(model, 1.0)  # replaces the other
    assert not torch.equal(logits(model), before)
    skip_experts(model, 0)
    assert torch.equal(logits(model), before)
    skip_experts(model, 1e-9)  # leaves out none
    assert torch.equal(logits(model), before)


def test_experts_that_are_left_out_are_not_multiplied(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = load(mixtral), []
    real = modules.multiply

    def multiply_seen(inputs: Tensor, weights: Any, experts: Tensor, tokens: Tensor) -> Tensor:
        if len(weights.names[0]) > 1:
            asked.append(experts)
        return real(inputs, weights, experts, tokens)

    monkeypatch.setattr(modules, "multiply", multiply_seen)
    skip_experts(model, 1.0)
    logits(model)
    assert asked and all(int((one >= 0).view(-1, 3).sum(1).max()) == 1 for one in asked)


def test_copies_leave_out_the_same_and_an_ordinary_model_none(mixtral: Path) -> None:
    model = load(mixtral)
    whole = logits(model)
    skip_experts(model, 0.9)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), whole)
    skip_experts(again, 0)
    assert torch.equal(logits(again), whole) and not torch.equal(logits(model), whole)
    assert float((logits(model.dequantize()) - whole).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("llama", {}, "no experts that a router chooses"),
        ("mixtral", dict(num_experts_per_tok=1), "sends each token to one expert"),
        ("dbrx", {}, "multiplies with them itself"),
    ],
)
def test_models_whose_routing_cannot_be_changed_are_refused(family: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(AlphaQError, match=reason):
        skip_experts(random_family(family, SMALL | settings), 0.5)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_that_are_none_are_refused(share: float) -> None:
    with pytest.raises(AlphaQError, match="not between 0 and 1"):
        skip_experts(None, share)


def test_a_model_that_another_program_runs_is_refused() -> None:
    with pytest.raises(AlphaQError, match="AlphaQ's own kernels"):
        skip_experts(object(), 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [False, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_s_file_says_whether_weights_are_divided_by_their_sum(family: str, norm: bool | None) -> None:
    settings = {} if norm is None else {"norm_topk_prob": norm, "moe_renormalize": norm}
    model = random_family(family, SMALL | THREE | settings)
    sums: list[Tensor] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sums.append((dict(zip(CALL, args, strict=False)) | kwargs)["top_k_weights"].sum(-1))

    for module in model.modules():
        if hasattr(module, "is_concatenated") or tuple(signature(type(module).forward).parameters)[1:] == CALL:
            module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.inference_mode():
        model(input_ids=torch.arange(3, 19)[None])
    if not sums or family == "zaya":  # experts that no router weighs, or one for each token
        return
    config = model.config.to_dict()
    same = all(float(one.max() - one.min()) < 1e-3 * float(one.max()) for one in sums)
    assert same == renormalises(architecture_of(config), config)


def test_the_curve_starts_at_the_reference_and_counts_what_is_left_out(tiny_quantized: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def main():\n    return [x for x in range(10)]\n" * 12)
    scoring = Scoring(texts=(text,), window=64, max_tokens=128, device="cpu")
    curve = pipeline.skip_curve(tiny_quantized, scoring, [1.0, 0.5], decoding=Decoding(prompt=4, steps=2, rounds=1))
    whole, half, all_but_one = curve.points
    assert [one.share for one in curve.points] == [0, 0.5, 1]
    assert (whole.left_out, whole.kl, whole.top1, whole.speedup) == (0, 0, 1, 1)
    assert 0 < half.left_out < all_but_one.left_out and 0 < half.kl < all_but_one.kl
    scored = pipeline.evaluate(tiny_quantized, scoring, tiny_quantized, skipped_share=0.5)
    assert scored.mean_kl == pytest.approx(half.kl, rel=1e-4)
    with pytest.raises(AlphaQError, match="fewer --steps"):
        pipeline.skip_curve(tiny_quantized, scoring, [0.5], decoding=Decoding(steps=10**4))
