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
from alphaq.runtime.skipping import CALL, NOBODY, Skipping, skip_experts
from families import FAMILIES, SMALL, random_family, save_layout

UNCALLED = ("jetmoe", "llama4", "llama4_text", "gemma2", "glm4", "llama", "qwen3")  # nothing to hook: see CALL
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


def test_a_scale_of_each_expert_changes_neither_the_choice_nor_the_sum(tmp_path: Path) -> None:
    """Gemma 4's: with the favourite alone a model is what its own router makes of it when it chooses one expert."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    folder, found = native("gemma4_text", tmp_path, **THREE), []
    for share, chosen in ((0.0, 3), (1.0, 3), (0.0, 1)):
        model = load(folder)
        for router in (one for one in model.modules() if isinstance(one, Gemma4TextRouter)):
            router.per_expert_scale.data.uniform_(-1, 3, generator=torch.Generator().manual_seed(0))
            router.config.top_k_experts = chosen
        skip_experts(model, share)
        found.append(logits(model))
    whole, favourite, wanted = found
    assert float((favourite - wanted).abs().max()) < 1e-5
    assert float((favourite - whole).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("weights", "share", "wanted"),
    [
        ([0.0, 0.0, 0.0], 0.5, [0.0, 0.0, 0.0]),
        ([-0.2, -0.1, -0.7], 0.5, [0.0, -1.0, 0.0]),
        ([0.5, 0.375, 0.125], 0.5, [4 / 7, 3 / 7, 0.0]),
    ],
)
def test_weights_that_are_all_0_or_below_keep_an_expert(
    weights: list[float], share: float, wanted: list[float]
) -> None:
    call = dict(top_k_index=torch.arange(3)[None], top_k_weights=torch.tensor([weights]))
    _, made = Skipping(share, True)(torch.nn.Module(), (torch.zeros(1, 4),), call)
    assert torch.allclose(made["top_k_weights"], torch.tensor([wanted]))
    assert int((made["top_k_index"] != NOBODY).sum()) >= 1


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
    ],
)
def test_models_whose_routing_cannot_be_changed_are_refused(family: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(AlphaQError, match=reason):
        skip_experts(random_family(family, SMALL | settings), 0.5)


def test_classes_that_multiply_with_experts_themselves_are_refused(tmp_path: Path) -> None:
    model = load(native("dbrx", tmp_path))
    with pytest.raises(AlphaQError, match=r"multiplies with them itself \(dbrx\)"):
        skip_experts(model, 0.5)


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
    assert bool(sums) != (family in UNCALLED)
    if not sums or family == "zaya":
        pytest.skip("no router weighs its experts, or one for each token")
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
    with pytest.raises(AlphaQError, match="no share above 0"):
        pipeline.skip_curve(tiny_quantized, scoring, [0.0])
    with pytest.raises(AlphaQError, match="fewer --steps"):
        pipeline.skip_curve(tiny_quantized, scoring, [0.5], decoding=Decoding(steps=10**4))
