"""A model without some experts computes what the whole one does with a router that may not choose them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from alphaq import pipeline
from alphaq.calibration.rerouting import Banning, counting
from alphaq.calibration.stream import HollowModel, model_class
from alphaq.checkpoint.pruned import without_experts
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.errors import PlanError
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Dropping, Plan
from alphaq.writing.planned import as_planned
from alphaq.writing.pruning import PRUNED_NAME, Pruning, prune
from conftest import EXPERTS as FEW
from families import EXPERTS, FAMILIES, logits, random_family, save_layout

DENSE = {"gemma2", "glm4", "llama", "qwen3"}
REFUSED = {
    "dbrx": "its files hold a layer's experts as one matrix",
    "deepseek_v4": "a table says",
    "jetmoe": "its attention has as many experts",
    **dict.fromkeys(DENSE, "it has no routed experts"),
}
NOT_RUN = {"llama4", "llama4_text", "muse_spark", "zaya"}
"""Families whose layers the passes cannot run; their experts can be taken out, not ranked."""
OFTEN = {"qwen2_moe", "deepseek_v3", "gpt_oss", "jetmoe", "longcat_flash", "mixtral"}


def some_experts(source: Checkpoint) -> dict[int, tuple[int, ...]]:
    """Two of each layer, others in each."""
    layers = source.architecture.moe_layers(source.config)
    return {layer: (layer % EXPERTS, (layer + 2) % EXPERTS) for layer in layers}


def masked_logits(source: Checkpoint, dropped: dict[int, tuple[int, ...]], folder: Path | None = None) -> torch.Tensor:
    """Of the whole model, or of what it was quantized to, whose routers do not choose these experts."""
    hollow, folder = HollowModel(source), folder or source.folder
    cls = model_class(AutoConfig.from_pretrained(folder))
    model = cls.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    state = model.state_dict(keep_vars=True)
    ids = torch.arange(3, 19)[None]
    with ExitStack() as stack, torch.no_grad():
        for layer, experts in dropped.items():
            banned = torch.zeros(ids.numel(), EXPERTS, dtype=torch.bool)
            banned[:, list(experts)] = True
            stack.enter_context(Banning([state[name] for name in counting(hollow, layer)], banned))
        torch.manual_seed(0)
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=() if one in OFTEN else pytest.mark.slow) for one in FAMILIES]
)
def test_pruned_model_is_the_one_with_masked_routers(family: str, tmp_path: Path) -> None:
    model = random_family(family)
    with torch.no_grad():  # biases of routers are zeros in a new model, whichever of them is cut
        for one in model.state_dict().values():
            if one.numel() == EXPERTS and one.is_floating_point():
                one.copy_(torch.linspace(-0.1, 0.1, EXPERTS).flip(0).view_as(one))
    source = open_checkpoint(save_layout(model, tmp_path / "source", published=True))
    dropped = some_experts(source)
    if family in REFUSED:
        with pytest.raises(PlanError, match=REFUSED[family]):
            prune(source, Pruning(dropped or {0: (0,)}), tmp_path / "out")
        return
    prune(source, Pruning(dropped), tmp_path / "out")
    told = json.loads((tmp_path / "out" / PRUNED_NAME).read_text())
    assert told["experts"] == EXPERTS - 2
    found = logits(tmp_path / "out")
    if family in NOT_RUN:
        return
    expected, before = masked_logits(source, dropped), logits(source.folder)
    assert float((expected - before).abs().max()) > 1e-4
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(one, marks=() if one in ("qwen2_moe", "gemma4") else pytest.mark.slow)
        for one in sorted(FAMILIES.keys() - REFUSED.keys() - NOT_RUN)
    ],
)
def test_layers_may_have_counts_of_their_own_in_native_files(family: str, tmp_path: Path) -> None:
    source = open_checkpoint(save_layout(random_family(family), tmp_path / "source", published=True))
    layers = source.architecture.moe_layers(source.config)
    dropped = {layer: tuple(range(1 + number % 3)) for number, layer in enumerate(layers) if number % 4 != 3}
    dropped[layers[-1]] = (1, 4)
    whole = Plan(choices=dict.fromkeys((one.name for one in source.with_role(Role.EXPERT)), "4g32"))
    pipeline.quantize(source, whole, tmp_path / "whole")
    left = without_experts(source, dropped, uneven=True)
    choices = dict.fromkeys((one.name for one in left.with_role(Role.EXPERT)), "4g32")
    pipeline.quantize(source, Plan(choices=choices, dropped=Dropping(experts=dropped)), tmp_path / "out")
    expected, before = masked_logits(source, dropped, tmp_path / "whole"), logits(tmp_path / "whole")
    assert float((expected - before).abs().max()) > 1e-4
    torch.testing.assert_close(logits(tmp_path / "out"), expected, atol=2e-5, rtol=1e-4)
    assert HollowModel(left).experts.keys() == set(layers)


def test_the_class_for_text_alone_loads_layers_with_counts_of_their_own(tmp_path: Path) -> None:
    """It is given only a part of config.json; router logits, which cannot be joined, are off."""
    model = random_family("qwen3_5_moe")
    model.config.text_config.output_router_logits = True
    source = open_checkpoint(save_layout(model, tmp_path / "source", published=True))
    dropped = {source.architecture.moe_layers(source.config)[0]: (1, 2)}
    choices = dict.fromkeys((one.name for one in without_experts(source, dropped, uneven=True).planned), "16")
    pipeline.quantize(source, Plan(choices=choices, dropped=Dropping(experts=dropped)), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model).__name__ == "Qwen3_5MoeForCausalLM" and not model.config.output_router_logits
    with torch.no_grad():
        found = model(input_ids=torch.arange(3, 19)[None]).logits
    torch.testing.assert_close(found, logits(tmp_path / "out"), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("uneven", [False, True])
def test_groups_that_lose_as_many_are_chosen_as_with_masked_routers(uneven: bool, tmp_path: Path) -> None:
    """A router of DeepSeek-V3 rates each group by its best two, and chooses within the best groups alone."""
    model = random_family("deepseek_v3", n_group=2, topk_group=1, num_experts_per_tok=2)
    with torch.no_grad():
        for name, one in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                one.copy_(torch.linspace(-0.1, 0.1, EXPERTS).flip(0))
    source = open_checkpoint(save_layout(model, tmp_path / "source", published=True))
    layers = source.architecture.moe_layers(source.config)
    dropped = {layer: (layer % 3, 3 + (layer + 1) % 3) for layer in layers[: 1 if uneven else None]}
    if uneven:
        left = without_experts(source, dropped, uneven=True)
        choices = dict.fromkeys((one.name for one in left.planned), "16")
        plan = Plan(choices=choices, dropped=Dropping(experts=dropped))
        pipeline.quantize(source, plan, tmp_path / "out")
    else:
        prune(source, Pruning(dropped), tmp_path / "out")
    expected = masked_logits(source, dropped)
    assert float((expected - logits(source.folder)).abs().max()) > 1e-4
    torch.testing.assert_close(logits(tmp_path / "out"), expected, atol=2e-5, rtol=1e-4)
    for gone in ((0, 1), (0,), (0, 1, 3, 4)):
        with pytest.raises(PlanError, match=r"2 groups of experts, which would differ|too few for its router"):
            without_experts(source, dict.fromkeys(layers, gone), uneven)


def test_layers_and_groups_lose_as_many(save_family: Callable[..., Path]) -> None:
    source = open_checkpoint(save_family("qwen2_moe"))
    with pytest.raises(PlanError, match=r"would keep 3 experts, layer 0 2\. Drop as many in every layer"):
        without_experts(source, {0: (0, 1), 1: (1,), 2: (0, 3)})
    by_hand = Plan(engine="mlx", choices={"x": "16"}, dropped=Dropping(experts={0: (0,)}))
    with pytest.raises(PlanError, match="or plan with --engine native"):
        as_planned(source, by_hand)
    left = as_planned(source, by_hand.model_copy(update={"engine": "native"}))
    with pytest.raises(PlanError, match="its layers differ in how many experts they have already"):
        without_experts(left, {1: (0,)})
    with pytest.raises(PlanError, match=rf"has no expert {FEW} to drop: it has {FEW}"):
        without_experts(source, dict.fromkeys(range(3), (FEW,)))
    with pytest.raises(PlanError, match=r"Layer 7 of .* has no routed experts"):
        without_experts(source, {7: (0,)})
    assert without_experts(source, {0: ()}) is source


def test_what_is_left_is_run_by_a_config_with_infinities(tmp_path: Path) -> None:
    source = open_checkpoint(save_layout(random_family("nemotron_h"), tmp_path, published=True))
    left = without_experts(source, some_experts(source))
    assert "Infinity" in json.dumps(left.config)
    assert left.architecture.experts_per_layer(HollowModel(left).model.config.to_dict()) == EXPERTS - 2


def test_experts_of_other_models_stay_and_layers_that_guess_words_go(tmp_path: Path) -> None:
    """The first have a config of their own; the second would count experts by one that no longer does."""
    text = dict(num_hidden_layers=1, num_experts=FEW, num_experts_per_tok=2, num_nextn_predict_layers=2)
    config = {"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": text}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    own, talker = "thinker.model.layers.0", "talker.model.layers.0"
    shapes = {
        f"{layer}.mlp.experts.{one}.{part}_proj.weight": (64, 32) if part == "down" else (32, 64)
        for layer in (own, talker, "mtp.layers.0", "thinker.model.layers.1")
        for one in range(FEW)
        for part in ("gate", "up", "down")
    }
    shapes |= {f"{layer}.mlp.gate.weight": (FEW, 64) for layer in (own, talker, "mtp.layers.0")}
    tensors = {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}
    save_file(tensors | {"mtp.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    left = without_experts(open_checkpoint(tmp_path), {0: (0,)})
    last = f".mlp.experts.{FEW - 1}."
    assert set(left.shard_of) == {n for n in shapes if n.startswith((own, talker)) and not n.startswith(own + last)}
    assert all(torch.equal(left.tensor(name), tensors[name]) for name in left.shard_of if name.startswith(talker))
    renamed = f"{own}.mlp.experts.0.up_proj.weight", f"{own}.mlp.experts.1.up_proj.weight"
    assert torch.equal(left.tensor(renamed[0]), tensors[renamed[1]])
    settings = left.architecture.text_config(left.config)
    assert (settings["num_nextn_predict_layers"], settings["num_experts"]) == (0, FEW - 1)


@pytest.mark.parametrize(("family", "gone", "fewest"), [("qwen2_moe", FEW, 2), ("deepseek_v3", FEW - 1, 2)])
def test_too_few_for_a_router_are_refused(
    save_family: Callable[..., Path], family: str, gone: int, fewest: int
) -> None:
    source = open_checkpoint(save_family(family))
    layers = source.architecture.moe_layers(source.config)
    with pytest.raises(PlanError, match=f"too few for its router to choose from. Keep at least {fewest}"):
        without_experts(source, dict.fromkeys(layers, range(gone)))


def test_views_of_the_same_files_are_told_apart(save_family: Callable[..., Path]) -> None:
    source = open_checkpoint(save_family("qwen2_moe", fused=True))
    one, other = (without_experts(source, dict.fromkeys(range(3), (gone,))) for gone in (0, 1))
    assert len({source.fingerprint, one.fingerprint, other.fingerprint}) == 3
    (first,) = (each for each in one.planned if (each.layer, each.expert, each.projection) == (1, 0, "down"))
    (second,) = (each for each in source.planned if (each.layer, each.expert, each.projection) == (1, 1, "down"))
    assert torch.equal(one.read(first), source.read(second))
    assert torch.equal(one.tensor(first.tensor), source.tensor(second.tensor)[1:])
