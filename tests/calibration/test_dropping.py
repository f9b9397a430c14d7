"""What layers lose without some of their experts: held against models in which they are dead, alike, or dear."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch

from alphaq.calibration import rerouting
from alphaq.calibration.dropping import DROPS_VERSION, Drops, gather_drops
from alphaq.calibration.rerouting import Banning, Router
from alphaq.calibration.tokens import random_windows
from alphaq.checkpoint.pruned import without_experts
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import PlanError, StatsError
from alphaq.measuring.resources import Resources
from alphaq.planning.dropping import measured_drops
from families import ALIKE, DEAD, random_family, save_layout, with_useless_experts

IDS = random_windows(340, 8, 32)


@pytest.fixture(scope="module")
def drops(tmp_path_factory: pytest.TempPathFactory) -> Drops:
    """Of a model with an expert that no token goes to, and two that are the same."""
    folder = save_layout(with_useless_experts(), tmp_path_factory.mktemp("drops"), published=True)
    return gather_drops(open_checkpoint(folder), IDS)


def test_the_dead_and_one_of_two_alike_go_first_and_cost_nothing(drops: Drops) -> None:
    for layer in drops.layers.values():
        assert DEAD in layer.order[:2]
        assert len({*ALIKE} & {*layer.order[:2]}) == 1
        assert layer.losses[1] < 1e-4 * layer.losses[2]
        assert dict(zip(layer.order, layer.tokens, strict=True))[DEAD] == 0


def test_bounds_hold_what_few_tokens_leave_open(drops: Drops) -> None:
    for layer in drops.layers.values():
        assert all(loss <= bound for loss, bound in zip(layer.losses, layer.bounds, strict=True))
        assert layer.bounds[0] > 0  # even where no token was seen
        assert list(layer.bounds) == sorted(layer.bounds)


def test_no_more_go_than_the_groups_that_are_chosen_from_can_spare(tmp_path: Path) -> None:
    settings = dict(n_routed_experts=12, n_group=3, topk_group=1, num_experts_per_tok=3, num_hidden_layers=2)
    folder = save_layout(random_family("deepseek_v3", **settings), tmp_path, published=True)
    checkpoint = open_checkpoint(folder)
    found = gather_drops(checkpoint, IDS[:2])
    assert found.most == 3  # of four in each group: one must hold the three of a token
    assert without_experts(checkpoint, found.first(found.evenly(found.most))).dropped


def test_shared_experts_are_not_run_to_ask_where_tokens_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(save_layout(random_family("qwen2_moe"), tmp_path, published=True))
    bypassed, asked = rerouting._bypassed, set[str]()

    def noted(modules: list[torch.nn.Module]) -> AbstractContextManager[None]:
        asked.update(type(one).__name__ for one in modules)
        return bypassed(modules)

    monkeypatch.setattr(rerouting, "_bypassed", noted)
    found = gather_drops(checkpoint, IDS[:2])
    assert asked == {"Qwen2MoeMLP"}
    monkeypatch.setattr(rerouting, "_bypassed", lambda modules: nullcontext())
    assert gather_drops(checkpoint, IDS[:2]) == found


def test_no_input_of_a_layer_outlives_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together are as much again as the pass keeps."""
    routers: list[Router] = []
    held: list[int] = []
    made, ask = Router.__init__, Router.ask

    def make(router: Router, *args: object) -> None:
        made(router, *args)
        routers.append(router)

    def count(router: Router, *args: object) -> object:
        held.append(sum(one.inputs is not None for one in routers))
        return ask(router, *args)

    monkeypatch.setattr(Router, "__init__", make)
    monkeypatch.setattr(Router, "ask", count)
    gather_drops(open_checkpoint(save_layout(random_family("qwen3_moe"), tmp_path, published=True)), IDS[:2])
    assert set(held) == {1}
    assert all(one.inputs is None for one in routers)


def test_families_whose_losses_are_not_foretold_are_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_layout(random_family("axk1"), tmp_path, published=True))
    with pytest.raises(PlanError, match="a norm follows its experts"):
        measured_drops(checkpoint, True, Resources())


def test_json_brings_back_what_was_found_and_names_what_it_is_not(drops: Drops) -> None:
    assert Drops.from_json(drops.to_json()) == drops
    with pytest.raises(StatsError, match="holds no losses of experts"):
        Drops.from_json(drops.to_json().replace(f'"version": {DROPS_VERSION}', '"version": 0'))


def test_losses_foretell_the_measured_kl(save_family: Callable[..., Path], tmp_path: Path) -> None:
    """Of one expert in the last layer, where what is lost is next to nothing but what the pass sees."""
    from transformers import AutoModelForCausalLM

    folder = save_layout(random_family("qwen2_moe"), tmp_path, published=True)
    ids = random_windows(340, 16, 64)
    found = gather_drops(open_checkpoint(folder), ids)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    layer, one = max(found.layers.items())
    banned = torch.zeros(ids.numel(), 6, dtype=torch.bool)
    banned[:, one.order[0]] = True
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        with Banning([model.model.layers[layer].mlp.gate.weight], banned):
            after = model(ids).logits.log_softmax(-1)
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0.5 * measured < one.losses[0] < 2 * measured
