"""Experts are dropped where measured losses say that it pays, within limits, and plans say what and why."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alphaq import pipeline
from alphaq.checkpoint.families.routing import OWN_COUNTS, own_counts
from alphaq.checkpoint.pruned import without_experts
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.checkpoint.summary import summarize
from alphaq.checkpoint.writer import resumable_folder
from alphaq.cli import means
from alphaq.cli.planning import note_plan
from alphaq.engines.profiles import ENGINES
from alphaq.errors import BudgetError, PlanError, TooSmallError
from alphaq.measuring.resources import Resources
from alphaq.nouns.plan import Plan
from alphaq.nouns.rates import Rates
from alphaq.nouns.serving import Kept, Memory, Serving
from alphaq.nouns.settings import Budget, PlanConfig, Rule
from alphaq.planning import Measurements, checked_plan, fitting, make_plan, measure_for_plan, resolve
from alphaq.planning.costs import bytes_at
from alphaq.planning.dropping import _Trial, plan_with_drops
from alphaq.planning.outline import outline
from alphaq.report.explanation import explain_plan
from alphaq.work.workers import Workers
from conftest import Ran
from contents import contents
from families import ALIKE, DEAD, logits, save_layout, with_useless_experts

SETTINGS: dict[str, Any] = {
    "budget": Budget(bits=2), "group_size": 32, "choices": "1,2,3,4,8", "drop": True, "max_drop": 0.34,
    "max_drop_loss": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def useless(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_layout(with_useless_experts(), tmp_path_factory.mktemp("useless"), published=True))


@pytest.fixture(scope="module")
def measured(useless: Checkpoint) -> Measurements:
    return measure_for_plan(useless, resolve(PlanConfig(**SETTINGS)))


def planned(useless: Checkpoint, measured: Measurements, **settings: Any) -> tuple[Plan, Plan]:
    """With dropping and without."""
    request = resolve(PlanConfig(**{**SETTINGS, **settings}))
    return plan_with_drops(useless, request, measured), make_plan(useless, request, measured)


def test_dead_and_duplicated_experts_go_and_their_bytes_buy_bits(useless: Checkpoint, measured: Measurements) -> None:
    plan, whole = planned(useless, measured)
    assert plan.dropped is not None
    assert set(plan.dropped.experts) == {0, 1, 2}
    for experts in plan.dropped.experts.values():
        assert DEAD in experts
        assert len({*experts} & {*ALIKE}) == len(experts) - 1 == 1
    assert plan.objective + plan.dropped.bound < whole.objective
    assert plan.size_bytes <= whole.size_bytes
    assert plan.lower_bound == pytest.approx(plan.objective)
    assert len(plan.assignment) == len(whole.assignment) * 4 // 6
    assert plan.config == whole.config
    assert plan.original == whole.original == useless.fingerprint
    assert Plan.from_json(plan.to_json(), "plan") == plan
    assert "6 (2 in each layer)" in (explain_plan(plan, None).dropped or "")


@pytest.mark.parametrize("drop", [True, False])
def test_what_fits_is_the_plan_that_quantize_makes(
    useless: Checkpoint, measured: Measurements, drop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With experts dropped, or beside uniform bits, which plans for other machines are not tried with."""
    monkeypatch.setattr(fitting, "placed_plan", lambda checkpoint, config, memory, plan_of: plan_of(config))
    without = {name: value for name, value in SETTINGS.items() if "drop" not in name}
    request = resolve(PlanConfig(**SETTINGS if drop else without))
    kept = Kept(cache_bytes=0, buffer_bytes=0, engine_bytes=0)
    memories = [Memory(serving=Serving(memory_bytes=10**6), kept=kept)] * 2
    first, machine = fitting.fits(useless, request, measured, memories, Resources())
    made = checked_plan(useless, request, measured)
    assert first.plan == made and machine.plan is not None and machine.plan.check is None
    assert machine.plan.dropped == made.dropped
    assert made.check is not None if made.dropped is None else made.dropped.experts


def test_size_is_kept_and_the_files_can_be_verified_and_cut(
    useless: Checkpoint, measured: Measurements, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    _, whole = planned(useless, measured)
    assert whole.size_bytes is not None
    plan, _ = planned(useless, measured, budget=Budget(size_bytes=whole.size_bytes), roles="fixed")
    assert plan.dropped is not None
    assert plan.dropped.experts
    written = pipeline.quantize(useless, plan, tmp_path / "out")
    assert written.size_bytes == plan.size_bytes <= whole.size_bytes
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert useless.architecture.experts_per_layer(config) == 4
    assert alphaq("verify", tmp_path / "out", "--reference", useless.folder).code == 0
    settings = ("--bits", "1.5", "--method", "distortion", "--group-size", "32")
    ran = alphaq("slice", tmp_path / "out", *settings, "-o", tmp_path / "slice", "--json")
    assert ran.json["size_bytes"] < written.size_bytes
    assert len(ran.json["assignment"]) == len(plan.assignment)


USUAL = {name: PlanConfig.model_fields[name].default for name in ("max_drop", "max_drop_loss")}
OWN: dict[str, Any] = {"drop_counts": "own"}


@pytest.fixture(scope="module")
def differing(measured: Measurements) -> Measurements:
    """The same, as if the first layer missed its second useless expert more than bits can make up for."""
    assert measured.drops is not None
    first = measured.drops.layers[0]
    dear = replace(first, bounds=(first.bounds[0], 0.9, 1.8))
    return replace(measured, drops=replace(measured.drops, layers={**measured.drops.layers, 0: dear}))


def test_layers_lose_as_many_as_pay(useless: Checkpoint, differing: Measurements) -> None:
    equal, whole = planned(useless, differing)
    plan, _ = planned(useless, differing, **OWN)
    assert plan.dropped is not None and equal.dropped is not None
    assert [len(experts) for experts in plan.dropped.experts.values()] == [1, 2, 2]
    assert plan.objective + plan.dropped.bound == plan.dropped.total < equal.dropped.total < whole.objective
    assert plan.dropped.gap < 1e-9
    assert plan.size_bytes <= whole.size_bytes
    assert Plan.from_json(plan.to_json(), "plan") == plan
    assert "5 (up to 2 in a layer), at " in (explain_plan(plan, None).dropped or "")
    limit = plan.dropped.bound * 0.9
    plan, _ = planned(useless, differing, **OWN | {"max_drop_loss": limit})
    assert plan.dropped is not None
    assert plan.dropped.count == 4 and plan.dropped.bound <= limit


def test_where_counts_of_their_own_do_not_fit_fewer_bytes_are_tried_then_equal_ones(
    useless: Checkpoint, differing: Measurements, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, failing = _Trial.without, ["once"]

    def without(trial: _Trial, counts: Any) -> Plan:
        if failing and len(set(counts.values())) > 1:
            failing.remove("once")
            raise TooSmallError("by headers")
        return real(trial, counts)

    monkeypatch.setattr(_Trial, "without", without)
    plan, _ = planned(useless, differing, **OWN)
    assert not failing and plan.dropped is not None
    assert plan.dropped.lower_bound is not None and not plan.equal_instead
    failing += ["once", "once"]
    plan, _ = planned(useless, differing, **OWN)
    assert not failing and plan.dropped is not None and plan.equal_instead
    assert len({len(experts) for experts in plan.dropped.experts.values()}) == 1
    note_plan(plan)
    assert "every layer loses as many experts" in capsys.readouterr().err


def test_bits_that_were_bytes_are_these_bytes() -> None:
    """Of models of a hundred million weights to a trillion."""
    draw = random.Random(0)
    for _ in range(2000):
        limit, parameters = draw.randrange(10**7, 10**11), draw.randrange(10**8, 10**12)
        assert bytes_at(8 * limit / parameters, parameters) == limit


def test_files_of_layers_with_counts_of_their_own_are_like_all_others(
    useless: Checkpoint, differing: Measurements, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    """Of the size that is promised, the same after an interruption; they can be verified, cut, and cut again."""
    _, whole = planned(useless, differing, **OWN)
    size = Budget(size_bytes=whole.size_bytes)
    plan, _ = planned(useless, differing, **OWN | {"budget": size, "roles": "fixed"})
    assert plan.dropped is not None and plan.dropped.gap < 1e-4
    written = pipeline.quantize(useless, plan, tmp_path / "out")
    assert written.size_bytes == plan.size_bytes <= whole.size_bytes

    def interrupted(items: Any, total: int, what: str) -> Any:
        for number, item in enumerate(items):
            if number == total // 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(useless, plan, tmp_path / "again", resources=Resources(wrap=interrupted))
    with Workers(1, useless) as workers:  # which share the whole model
        pipeline.quantize(useless, plan, tmp_path / "again", resources=Resources(workers))
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert own_counts(useless.architecture, described) == {1: 4, 2: 4}
    assert useless.architecture.experts_per_layer(described) == 5
    assert described["quantization_config"]["uneven_experts"]
    assert pipeline.verify(tmp_path / "out", useless).against_source
    assert pipeline.verify_run(tmp_path / "out", useless).difference < 0.01
    cut = ("--bits", "1.5", "--method", "distortion", "--group-size", "32", "--json")
    ran = alphaq("slice", tmp_path / "out", *cut, "-o", tmp_path / "slice")
    assert ran.json["size_bytes"] < written.size_bytes
    assert json.loads((tmp_path / "slice" / "config.json").read_text())[OWN_COUNTS] == described[OWN_COUNTS]
    assert alphaq("verify", tmp_path / "slice").code == 0
    assert logits(tmp_path / "slice").isfinite().all()
    for engine in ("mlx", "llama.cpp"):
        ran = alphaq("slice", tmp_path / "out", "--engine", engine, "--bits", "4", "-o", tmp_path / "other")
        assert ran.code == 2 and not (tmp_path / "other").exists()
        assert f"({OWN_COUNTS}) layers have 4 to 5 experts, and {engine} has one number" in ran.err


@pytest.mark.parametrize("engine", [name for name, one in ENGINES.items() if not one.uneven])
def test_engines_with_one_number_of_experts_take_no_layers_that_differ(
    useless: Checkpoint, engine: str, tmp_path: Path
) -> None:
    """Whether they are planned for, outlined, or written by a plan from elsewhere."""
    uneven = without_experts(useless, {1: (DEAD,)}, uneven=True)
    assert (summarize(uneven).fewest_experts_per_layer, summarize(uneven).experts_per_layer) == (5, 6)
    request = resolve(PlanConfig(budget=Budget(bits=4), engine=engine))
    by_hand = Plan(engine=engine, choices=dict.fromkeys((one.name for one in uneven.planned), "16"))
    for use in (
        lambda: outline(uneven, request),
        lambda: measure_for_plan(uneven, request),
        lambda: pipeline.quantize(uneven, by_hand, tmp_path / "out"),
    ):
        with pytest.raises(PlanError, match=r"have 5 to 6 experts, .* Use --engine native, or start from the original"):
            use()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("counts", ["equal", "own"])
def test_a_budget_that_holds_only_fewer_experts_is_enough(
    useless: Checkpoint, measured: Measurements, counts: str
) -> None:
    narrow = {"budget": Budget(bits=0.7), "drop_counts": counts}
    request = resolve(PlanConfig(**SETTINGS | narrow))
    plan = plan_with_drops(useless, request, measured)
    assert plan.dropped is not None and plan.size_bytes is not None
    assert plan.dropped.count == 6 and 0 not in plan.dropped.totals
    assert (plan.config, plan.budget_unit) == (request.config, "bits")
    assert "nats; expected loss" in (explain_plan(plan, None).dropped or "")
    fits = PlanConfig(**SETTINGS | narrow | {"budget": Budget(size_bytes=plan.size_bytes), "roles": "fixed"})
    assert plan_with_drops(useless, resolve(fits), measured).size_bytes == plan.size_bytes
    with pytest.raises(TooSmallError, match="as many experts as --max-drop and --max-drop-loss allow"):
        plan_with_drops(useless, resolve(PlanConfig(**SETTINGS | narrow | {"max_drop": 0.2})), measured)
    for budget in (Budget(bits=0.4), Budget(size_bytes=10_000)):
        with pytest.raises(TooSmallError, match="does not fit either"):  # before anything is measured
            measure_for_plan(useless, resolve(PlanConfig(**SETTINGS | narrow | {"budget": budget})))
    with pytest.raises(TooSmallError, match=r"is below --bits 1, the narrowest usual width of native\. Raise it"):
        make_plan(
            useless, resolve(PlanConfig(**SETTINGS | {"budget": Budget(bits=0.7), "drop": False, **USUAL})), measured
        )


def test_nothing_goes_beyond_the_limits(useless: Checkpoint, measured: Measurements) -> None:
    plan, whole = planned(useless, measured, max_drop_loss=1e-12)
    assert plan.dropped is not None
    assert plan.dropped.experts == {}
    assert plan.dropped.refused == (1, 2)
    assert plan.choices == whole.choices
    plan, _ = planned(useless, measured, max_drop=0.2)
    assert plan.dropped is not None
    assert plan.dropped.count == 3


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "distortion"}, "--drop weighs experts against bits in nats"),
        ({"drop": False, "max_drop": 0.5}, "--max-drop limits what --drop may do"),
        ({"drop": False, "max_drop": 0.25}, "--max-drop-loss limits what --drop may do"),
        ({"per_layer": True}, r"--drop needs one budget for all experts, of plain bytes\. Drop --per-layer"),
        ({"drop": False, "drop_counts": "own"}, "--drop-counts limits what --drop may do"),
        ({"drop_counts": "own", "engine": "vllm", "choices": None}, "vllm has one number of experts for all layers"),
        (
            {"drop_counts": "own", "min_speed": 1.0, "bandwidth": Rates(memory=10**9)},
            "--drop-counts own and --min-speed are not solved together",
        ),
        ({"min_bits": (Rule(pattern="*.experts.3.*", value="2"),)}, "numbers experts anew"),
    ],
)
def test_what_does_not_go_with_dropping_is_said(
    useless: Checkpoint, measured: Measurements, settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(BudgetError, match=match):
        planned(useless, measured, **settings)


@pytest.mark.slow
def test_balanced_model_loses_none(tiny: Path) -> None:
    checkpoint, settings = open_checkpoint(tiny), SETTINGS | {"group_size": 128, "max_drop": 0.5}
    request = resolve(PlanConfig(**settings))
    measured = measure_for_plan(checkpoint, request)
    plan = plan_with_drops(checkpoint, request, measured)
    assert plan.dropped is not None
    assert plan.dropped.experts == {}
    assert len(plan.dropped.totals) == 5
    own = plan_with_drops(checkpoint, resolve(PlanConfig(**settings | OWN)), measured)
    assert own.dropped is not None and own.dropped.experts == {}
    assert own.choices == plan.choices


def test_commands_prune_and_refuse(
    useless: Checkpoint, tmp_path: Path, alphaq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(means, "progress", lambda items, total, what: shown.append(what) or items)
    with suppress(KeyboardInterrupt), resumable_folder(tmp_path / "out", {"checkpoint": "another"}):
        raise KeyboardInterrupt
    ran = alphaq("prune", str(useless.folder), "--experts", "4", "-o", str(tmp_path / "out"), "--json", "--restart")
    assert "prune" in shown  # the writing too
    dropped = ran.json["dropped"]
    assert all(DEAD in experts and len(experts) == 2 for experts in dropped.values())
    left = open_checkpoint(tmp_path / "out")
    assert left.architecture.experts_per_layer(left.config) == 4
    ran = alphaq("prune", str(useless.folder), "--experts", "1", "-o", str(tmp_path / "other"))
    assert ran.code == 2
    assert "6 experts, of which 3 to 5 can be kept" in ran.err
    assert not (tmp_path / "other").exists()


def test_a_plan_without_experts_needs_the_model_that_has_them(
    useless: Checkpoint, measured: Measurements, tmp_path: Path
) -> None:
    plan, _ = planned(useless, measured)
    other = open_checkpoint(save_layout(with_useless_experts(), tmp_path / "fused", published=False))
    with pytest.raises(PlanError, match="other weight files"):
        pipeline.quantize(other, plan, tmp_path / "out")
