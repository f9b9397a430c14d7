import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaq.calibration.text import own_writing
from alphaq.checkpoint import writer
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.errors import OutputError, PassError, PlanError, UnknownNameError
from alphaq.formats.versions import CODECS
from alphaq.measuring.resources import Resources
from alphaq.nouns.plan import Plan
from alphaq.nouns.rates import Rates
from alphaq.nouns.settings import Budget, PlanConfig, Rule
from alphaq.planning import make_plan, measure_for_plan, resolve
from alphaq.planning.kept import kept_shares
from alphaq.planning.reading import Reading
from alphaq.report import runs
from alphaq.report.content import Sources, content_of
from alphaq.report.explanation import explain_plan, explanation_tables
from alphaq.report.html import page_of
from alphaq.trials import bench as benches
from alphaq.trials import refine as refining
from alphaq.trials.bench import Bench
from alphaq.trials.held import HeldModel
from alphaq.trials.refine import Refining, refine, way
from alphaq.writing import observing
from alphaq.writing.quantizing import quantize
from conftest import Ran
from runnable import save_runnable

Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short windows: what is tested is not how well."""
    monkeypatch.setattr(refining, "LENGTH", 24)
    monkeypatch.setattr(refining, "TRAINING_WINDOWS", 8)
    monkeypatch.setattr(refining, "JUDGING_WINDOWS", 16)


@pytest.fixture
def checkpoint(save_family: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(save_family("qwen2_moe"))


def planned(checkpoint: Checkpoint, **settings: Any) -> Plan:
    budget = settings.pop("budget", Budget(bits=5))
    usual = {"method": "random", "choices": "2g32,8g32"}  # much can be gained
    config = PlanConfig(budget=budget, **{**usual, **settings})
    request = resolve(config)
    return make_plan(checkpoint, request, measure_for_plan(checkpoint, request))


FEW = Refining(samples=8, tokens=192)


def test_a_refined_plan_is_no_larger_and_no_worse_and_can_be_written(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(checkpoint)
    refined = refine(checkpoint, plan, FEW, tmp_path / "state")
    record = refined.refined
    assert record is not None and record.moved > 0 and record.rounds > 0
    assert record.after < record.before and record.tokens == 16 * 23
    assert refined.size_bytes is not None and plan.size_bytes is not None and refined.size_bytes <= plan.size_bytes
    changed = {name for name, choice in refined.choices.items() if choice != plan.choices[name]}
    assert len(changed) == record.moved and changed <= plan.assignment.keys()
    assert refined.prediction is None and refined.lower_bound is None
    assert refined.expected_error.keys() == plan.expected_error.keys()
    assert all(refined.expected_error[name] != plan.expected_error[name] for name in changed)
    assert Plan.from_json(refined.to_json(), "it") == refined
    monkeypatch.setattr(HeldModel, "gradients", None)
    assert refine(checkpoint, plan, FEW, tmp_path / "state") == refined  # of what is kept until the plan is written
    quantize(checkpoint, refined, tmp_path / "out")  # refuses files that are not as large as promised


def better_and_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan that is judged has less KL than those before."""
    left = iter(range(1000, 0, -1))
    monkeypatch.setattr(Bench, "divergence", lambda self, columns: [float(next(left))] * 4)


def test_a_refined_plan_says_nothing_that_held_for_the_given_one_alone(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(checkpoint, method="distortion", choices="2g32,16", budget=Budget(bits=9))
    assert plan.price is not None and plan.lower_bound is not None and plan.kept
    better_and_better(monkeypatch)
    refined = refine(checkpoint, plan, FEW, tmp_path / "state")
    assert refined.refined is not None and refined.refined.changed and refined.price is None
    choices = refined.every_choice()
    assert {name for name, one in choices.items() if one.kept} != {
        name for name, one in plan.every_choice().items() if one.kept
    }
    assert refined.kept == kept_shares(checkpoint, choices)
    lines = [str(line) for line in explanation_tables(explain_plan(refined, None))]
    assert "choices were exchanged by measured KL" in lines[0] and "order" not in lines[0]
    assert all(unit.moves_up_at is unit.moves_down_at is None for unit in explain_plan(refined, None).units)
    page = page_of(content_of(runs.Run("it", refined), Sources()))
    assert "no bound: choices were exchanged by measured KL" in page and "follows an order" not in page
    assert "the plan was refined by measured KL" in page and "a method's order or limits" not in page


def test_the_same_seed_gives_the_same_plan_and_another_tries_others(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = planned(checkpoint)
    one, same = (refine(checkpoint, plan, FEW, tmp_path / name) for name in ("one", "same"))
    assert one == same
    other = refine(checkpoint, plan, replace(FEW, seed=1), tmp_path / "other")
    assert other.refined is not None and one.refined is not None and other.refined.before != one.refined.before


@dataclass
class Killed:
    """Stops a run after so many steps, and counts them."""

    after: int
    steps: int = 0

    def __call__(self, items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
        for item in items:
            if self.steps == self.after:
                raise KeyboardInterrupt
            self.steps += 1
            yield item


@pytest.mark.parametrize("after", [1, 6])
def test_a_killed_run_goes_on_and_comes_to_the_same_plan(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    plan, taken = planned(checkpoint), []
    gradients = HeldModel.gradients

    def counted(self: HeldModel, *arguments: Any) -> Any:
        taken.append(1)
        return gradients(self, *arguments)

    monkeypatch.setattr(HeldModel, "gradients", counted)
    whole = refine(checkpoint, plan, FEW, tmp_path / "whole")
    needed = len(taken)
    taken.clear()
    with pytest.raises(KeyboardInterrupt):
        refine(checkpoint, plan, FEW, tmp_path / "state", Resources(wrap=Killed(after)))
    before = len(taken)
    assert before == after - 1
    with (tmp_path / "state").open("a") as file:
        file.write('{"key": "torn')
    assert refine(checkpoint, plan, FEW, tmp_path / "state") == whole
    assert len(taken) == needed  # none twice


def test_an_unfinished_run_of_another_plan_is_refused_and_can_be_dropped(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    plan, other = planned(checkpoint), planned(checkpoint, budget=Budget(bits=4.5))
    with pytest.raises(KeyboardInterrupt):
        refine(checkpoint, plan, FEW, tmp_path / "state", Resources(wrap=Killed(2)))
    with pytest.raises(OutputError, match=r"state holds an unfinished run of another plan, .*--restart"):
        refine(checkpoint, other, FEW, tmp_path / "state")
    assert refine(checkpoint, other, replace(FEW, restart=True), tmp_path / "state").refined is not None


def test_a_plan_that_nothing_betters_is_handed_back(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, asked = planned(checkpoint), []

    def worse_and_worse(self: Bench, columns: Any) -> list[float]:
        asked.append(columns)
        return [float(len(asked))] * 4

    monkeypatch.setattr(Bench, "divergence", worse_and_worse)
    told: list[str] = []
    refined = refine(checkpoint, plan, replace(FEW, told=told.append), tmp_path / "state")
    assert len(asked) > 1 and refined.refined is not None
    assert refined.refined.moved == 0 and refined.refined.after == refined.refined.before == 1.0
    assert refined.model_copy(update={"refined": None}) == plan
    assert told[-1] == "round 1: nothing better found"


@pytest.mark.parametrize(("better", "taken"), [([0.9, 0.9, 0.9, 0.95], True), ([0.1, 0.2, 1.5, 1.5], False)])
def test_a_gain_that_may_be_chance_is_not_taken(
    better: list[float], taken: bool, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = iter([[1.0] * 4])
    monkeypatch.setattr(Bench, "divergence", lambda self, columns: next(judged, better))
    refined = refine(checkpoint, planned(checkpoint), FEW, tmp_path / "state")
    assert refined.refined is not None and refined.refined.changed is taken
    assert refined.refined.after == (float(f"{sum(better) / 4:.4g}") if taken else 1.0)


def test_pinned_matrices_and_those_outside_the_budget_keep_their_choices(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(checkpoint, pins=(Rule(pattern="down", value="8g32"),))
    better_and_better(monkeypatch)
    refined = refine(checkpoint, plan, FEW, tmp_path / "state")
    assert refined.refined is not None and refined.refined.moved > 0
    for name, choice in plan.choices.items():
        if "down_proj" in name or name not in plan.assignment:
            assert refined.choices[name] == choice


def test_what_an_engine_stores_alike_moves_together(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = planned(checkpoint, engine="mlx", choices="2g32,3g32,4g32,6g32,8g32")
    assert plan.table is not None and plan.table.members
    refined = refine(checkpoint, plan, FEW, tmp_path / "state")
    for members in plan.table.members.values():
        assert len({refined.choices[name] for name in members}) == 1
    assert refined.size_bytes is not None and plan.size_bytes is not None and refined.size_bytes <= plan.size_bytes


def test_without_gradients_exchanges_go_by_the_measured_divergence_of_groups(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, told = planned(checkpoint), []
    better_and_better(monkeypatch)
    by_groups = refine(checkpoint, plan, replace(FEW, by="groups"), tmp_path / "state")

    def none(*arguments: Any) -> Any:
        raise PassError("The class gives no gradient.")

    monkeypatch.setattr(HeldModel, "gradients", none)
    refined = refine(checkpoint, plan, replace(FEW, told=told.append), tmp_path / "other")
    assert refined.choices == by_groups.choices
    assert any("gives no gradient. Exchanges go by the measured KL of groups instead." in line for line in told)
    assert by_groups.refined is not None and by_groups.refined.by == "groups"
    assert by_groups.refined.changed and by_groups.refined.after < by_groups.refined.before


@pytest.mark.parametrize("by", ["gradients", "groups"])
def test_plans_are_judged_on_windows_that_nothing_else_looked_at(
    by: Any, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = torch.randint(20, (24, 24), generator=torch.Generator().manual_seed(0))
    windows = torch.cat([words[:8], 20 + words[8:]])
    monkeypatch.setattr(refining, "own_tokens", lambda *given: windows)
    seen: dict[str, set[int]] = {"gradients": set(), "_divergence": set()}

    def watch(owner: Any, name: str) -> None:
        make = getattr(owner, name)

        def watched(self: Any, ids: torch.Tensor, *rest: Any) -> Any:
            seen[name].update((ids // 20).flatten().tolist())
            return make(self, ids, *rest)

        monkeypatch.setattr(owner, name, watched)

    watch(HeldModel, "gradients")
    watch(Bench, "_divergence")
    if by == "groups":
        better_and_better(monkeypatch)  # so that groups alone are run
    refine(checkpoint, planned(checkpoint), replace(FEW, by=by), tmp_path / "state")
    by_gradients = {"gradients": {0}, "_divergence": {1}}
    assert seen == (by_gradients if by == "gradients" else {"gradients": set(), "_divergence": {0}})


def test_a_solution_whose_files_are_larger_is_solved_again_with_less(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, sizes, budgets = planned(checkpoint), iter([0, 1000]), []
    size, best = refining.size_of, refining.best_columns

    def solved(units: Any, columns: Any, moves: Any, caution: float, budget: int) -> Any:
        found = best(units, columns, moves, caution, budget)
        budgets.append((budget, units.cost(found)))
        return found

    monkeypatch.setattr(refining, "size_of", lambda *given: size(*given) + next(sizes, 0))
    monkeypatch.setattr(refining, "best_columns", solved)
    refined = refine(checkpoint, plan, FEW, tmp_path / "state")
    assert next(sizes, None) is None
    assert budgets[1][0] < budgets[0][1] and budgets[2][0] == budgets[0][0]
    assert refined.size_bytes is not None and plan.size_bytes is not None and refined.size_bytes <= plan.size_bytes


def test_the_plan_that_is_handed_out_is_the_one_that_was_judged(checkpoint: Checkpoint, tmp_path: Path) -> None:
    refined = refine(checkpoint, planned(checkpoint), FEW, tmp_path / "state")
    assert refined.refined is not None and refined.refined.changed
    again = refine(checkpoint, refined.model_copy(update={"refined": None}), FEW, tmp_path / "again").refined
    assert again is not None and again.before == pytest.approx(refined.refined.after, rel=1e-3)


def test_plans_that_cannot_be_refined_are_refused_with_the_way_out(
    checkpoint: Checkpoint, tmp_path: Path, save_family: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, state = planned(checkpoint), tmp_path / "state"
    cases = {
        r"no table .* `alphaq plan`": plan.model_copy(update={"table": None}),
        r"budget for each layer \(--per-layer\)": planned(checkpoint, per_layer=True, method="distortion"),
        r"not those of its table.*--pin": plan.model_copy(
            update={"choices": plan.choices | {checkpoint.planned[0].name: "5g32"}}
        ),
        r"counts bits without scales.*--size or --bits": planned(checkpoint, unweighted=True),
        r"without --min-speed and --vram": plan.model_copy(
            update={"config": plan.config.model_copy(update={"min_speed": 1.0, "bandwidth": Rates(memory=10**12)})}
        ),
        r"without --codec.*alphaq recode": plan.coded_by(CODECS[-1]),
    }
    for message, one in cases.items():
        with pytest.raises(PlanError, match=message):
            refine(checkpoint, one, FEW, state)
    with pytest.raises(PlanError, match=r"made for .* with other weight files"):
        refine(open_checkpoint(save_family("mixtral")), plan, FEW, state)
    monkeypatch.setattr(benches, "memory_bytes", lambda: 1 << 30)
    with pytest.raises(PlanError, match=r"about 1\.0 GiB, and this process may use 1\.0 GiB\. .*with more"):
        refine(checkpoint, plan, FEW, state)
    assert not state.exists()


def test_a_run_that_cannot_end_leaves_nothing_behind(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, state = planned(checkpoint), tmp_path / "state"
    monkeypatch.setattr(Bench, "divergence", lambda self, columns: [1.0, float("nan"), 1.0, 1.0])
    with pytest.raises(PlanError, match="computes NaN or infinity"):
        refine(checkpoint, plan, FEW, state)
    assert not state.exists()

    def unable(*arguments: Any) -> Any:
        raise PassError("The class cannot be run.")

    monkeypatch.setattr(HeldModel, "__init__", unable)
    with pytest.raises(PlanError, match="cannot be refined here"):
        refine(checkpoint, plan, FEW, state)
    assert not state.exists()


def test_what_was_measured_outlives_a_plan_that_cannot_be_written(
    alphaq: Run, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, out = tmp_path / "plan.json", tmp_path / "refined.json"
    given.write_text(planned(checkpoint).to_json())
    command = ("refine", checkpoint.folder, "--plan", given, "-o", out, "--gradients", 8)

    def full(path: Path) -> Any:
        raise OutputError("No space left on the device.")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "atomic_file", full)
        assert alphaq(*command).code == 2
    assert not out.exists() and (tmp_path / "refined.json.state").exists()
    monkeypatch.setattr(HeldModel, "gradients", None)
    assert alphaq(*command).code == 0
    assert sorted(one.name for one in tmp_path.iterdir()) == ["plan.json", "refined.json"]


def test_ways_are_named() -> None:
    assert way("groups") == "groups"
    with pytest.raises(UnknownNameError, match="Did you mean 'groups'"):
        way("group")


def test_the_command_writes_a_plan_that_explain_and_quantize_take(
    alphaq: Run, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    given, out = tmp_path / "plan.json", tmp_path / "refined.json"
    given.write_text(planned(checkpoint).to_json())
    ran = alphaq("refine", checkpoint.folder, "--plan", given, "-o", out, "--gradients", 8, "--json")
    assert ran.code == 0, ran.err
    assert "KL of the given plan" in ran.err and f"Plan written to {out}" in ran.err
    record = ran.json["refined"]
    assert record["gradients"] == 8
    assert sorted(one.name for one in tmp_path.iterdir()) == ["plan.json", "refined.json"]
    explained = alphaq("explain", out)
    assert f"refined: KL on {record['tokens']} tokens of its own writing: {record['before']:.4g}" in explained.out
    assert json.loads(out.read_text())["refined"] == record
    assert alphaq("quantize", checkpoint.folder, "--plan", out, "-o", tmp_path / "model").code == 0
    missing = alphaq("refine", checkpoint.folder, "--plan", tmp_path / "none.json", "-o", out)
    assert missing.code == 2 and "Make one with `alphaq plan" in missing.err


def test_a_plan_by_the_models_own_importance_is_refined_by_the_same(
    alphaq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_runnable(tmp_path / "model", "qwen2_moe")
    given, out = tmp_path / "plan.json", tmp_path / "refined.json"
    make, caches = observing.importance_by_losses, []

    def made(checkpoint: Checkpoint, bos: bool, resources: Resources) -> Any:
        caches.append(resources.cache)
        return make(checkpoint, bos, resources)

    monkeypatch.setattr(observing, "importance_by_losses", made)
    settings = ("--engine", "llama.cpp", "--bits", "4", "--method", "random", "--choices", "Q4_0,Q8_0")
    assert alphaq("plan", folder, *settings, "--imatrix", "self", "-o", given).code == 0
    without = alphaq("refine", folder, "--plan", given, "--imatrix", "none", "-o", out)
    assert without.code == 2 and "Give --imatrix self" in without.err
    ran = alphaq("refine", folder, "--plan", given, "-o", out, "--gradients", 8)
    assert ran.code == 0, ran.err
    assert len(caches) == 2 and None not in caches
    assert Plan.read(out).imatrix == Plan.read(given).imatrix


@pytest.mark.slow
def test_all_roles_that_share_a_budget_are_exchanged(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    request = resolve(PlanConfig(budget=Budget(size_bytes=5_400_000), engine="llama.cpp", fast=True))
    plan = make_plan(checkpoint, request, measure_for_plan(checkpoint, request))
    told: list[str] = []
    refined = refine(checkpoint, plan, replace(FEW, told=told.append), tmp_path / "state")
    assert refined.refined is not None and refined.refined.hidden == 0
    assert refined.size_bytes is not None and plan.size_bytes is not None and refined.size_bytes <= plan.size_bytes
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= plan.assignment.keys()
    reading, writer = Reading.of(checkpoint), request.profile.writer
    before, after = (reading.reads(writer.layout(checkpoint, one.every_choice())).total for one in (plan, refined))
    assert plan.read_bytes is not None and refined.read_bytes == plan.read_bytes + after - before != plan.read_bytes
    quantize(checkpoint, refined, tmp_path / "out")


def test_a_state_file_of_something_else_and_of_other_tokens_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan, state = planned(checkpoint), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        refine(checkpoint, plan, FEW, state, Resources(wrap=Killed(1)))
    with pytest.raises(OutputError, match=r"state holds an unfinished run"):
        refine(checkpoint, plan, replace(FEW, tokens=200), state)
    with state.open("a") as file:
        file.write('{"name": 1}\n')
    with pytest.raises(OutputError, match=r"state holds lines that no run .* wrote\. Add --restart"):
        refine(checkpoint, plan, FEW, state)


def test_too_few_gradients_are_refused() -> None:
    with pytest.raises(PlanError, match=r"4 gradients a round measure no exchange\. Take at least 8"):
        Refining(samples=4)


@pytest.mark.parametrize("by", ["gradients", "groups"])
def test_in_every_round_no_more_is_held_than_plans_near_its_own_need(
    by: Any, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    hold = Bench.hold

    def counted(self: Bench, columns: Any) -> None:
        hold(self, columns)
        held.append(len(self._held))

    monkeypatch.setattr(Bench, "hold", counted)
    better_and_better(monkeypatch)
    plan = planned(checkpoint)
    record = refine(checkpoint, plan, replace(FEW, by=by), tmp_path / "state").refined
    assert record is not None and record.rounds and len(held) >= record.rounds
    assert max(held) <= 3 * len(plan.assignment)


def test_a_class_that_keeps_nothing_of_earlier_tokens_writes_by_the_seed_too(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*given: Any) -> Any:
        raise PassError("It keeps nothing.")

    monkeypatch.setattr(benches, "written", unable)
    one, same, other = (benches.own_tokens(checkpoint, 2, 8, False, seed) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert not torch.equal(one, own_writing(checkpoint, 2, 8, False))
