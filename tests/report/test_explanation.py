"""What `alphaq explain` says is what the plan was decided by."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import PlanError
from alphaq.measuring.cache import Cache
from alphaq.measuring.resources import Resources
from alphaq.nouns.plan import Dropping, Plan
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import make_plan, measure_for_plan, resolve
from alphaq.report.explanation import ExplainedUnit, explain_plan
from alphaq.report.tables import dropped_words
from conftest import Ran

Run = Callable[..., Ran]


def plan_of(
    tiny: Path, engine: str = "native", method: str = "distortion", bits: float = 2.5, known: Path | None = None
) -> Plan:
    """known: the folder of a cache."""
    checkpoint = open_checkpoint(tiny)
    noise = "analytic" if engine == "llama.cpp" else None  # its quantizers take a minute
    request = resolve(PlanConfig(budget=Budget(bits=bits), engine=engine, method=method, noise=noise))
    with Cache(known, {}) if known else nullcontext() as cache:
        return make_plan(checkpoint, request, measure_for_plan(checkpoint, request, resources=Resources(cache=cache)))


@pytest.fixture(scope="module")
def plan(tiny: Path, known_tiny: Path) -> Plan:
    return plan_of(tiny, known=known_tiny)


@pytest.fixture(scope="module")
def plan_file(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(plan.to_json())
    return path


def table_of(plan: Plan) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Units, and their losses and costs [units, choices]; forbidden choices lose infinitely much."""
    assert plan.table is not None
    losses = [[np.inf if loss is None else loss for loss in row] for row in plan.table.losses.values()]
    costs = [plan.table.costs[kind] for kind in plan.table.cost_of]
    return list(plan.table.losses), np.array(losses), np.array(costs)


@pytest.mark.parametrize(
    ("engine", "bits"), [("native", 2.5), pytest.param("mlx", 3.3, marks=pytest.mark.slow), ("llama.cpp", 3.3)]
)
def test_what_would_move_a_unit_does_and_less_does_not(tiny: Path, known_tiny: Path, engine: str, bits: float) -> None:
    """At the plan's price, by the choice of least loss + price · cost."""
    plan = plan_of(tiny, engine, bits=bits, known=known_tiny)
    units, losses, costs = table_of(plan)
    explained = {unit.unit: unit for unit in explain_plan(plan, "*", limit=1000).units}
    assert plan.price is not None and plan.price > 0

    def taken(unit: int, factor: float) -> int:
        """Cost of what the unit would take if its losses were `factor` times as large."""
        return int(costs[unit, (factor * losses[unit] + plan.price * costs[unit]).argmin()])

    ups = downs = 0
    for number, name in enumerate(units):
        one = explained[name]
        if taken(number, 1.0) != one.cost:
            continue  # one of the few that the last bytes went to
        if up := one.moves_up_at:
            assert taken(number, up * 1.0001) > one.cost == taken(number, up * 0.9999)
            ups += 1
        if down := one.moves_down_at:
            assert taken(number, down * 0.9999) < one.cost == taken(number, down * 1.0001)
            downs += 1
    assert ups >= len(units) - 5
    assert downs >= len(units) // 2


def test_figures_are_the_table_s(plan: Plan) -> None:
    units, losses, costs = table_of(plan)
    assert plan.table is not None
    explained = explain_plan(plan, None, limit=1000)
    assert explained.matched == len(units) == len(explained.units)
    assert explained.cost_unit == "bytes"
    for one in explained.units:
        number = units.index(one.unit)
        assert one.choice == plan.choices[one.unit]
        assert [row.loss for row in one.choices] == losses[number].tolist()
        assert [row.cost for row in one.choices] == costs[number].tolist()
        at = plan.table.choices.index(one.choice)
        for row in one.choices:
            if row.cost != one.cost:
                rate = (losses[number, at] - row.loss) / (row.cost - costs[number, at])
                assert row.gain_per_cost == pytest.approx(rate)
    ranks = sorted(one.alpha_rank for one in explained.units)
    assert ranks == list(range(1, len(units) + 1))


def test_without_a_pattern_the_units_nearest_to_moving_come_first(plan: Plan) -> None:
    shown = explain_plan(plan, None, limit=5).units
    every = explain_plan(plan, None, limit=1000).units
    assert shown == every[:5]

    def distance(one: ExplainedUnit) -> float:
        return min(abs(np.log(at)) for at in (one.moves_up_at, one.moves_down_at) if at)

    distances = [distance(one) for one in every]
    assert distances == sorted(distances)


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("layers.0.*down_proj", 8),
        ("layers.0.mlp.experts.3.", 3),
        ("model.layers.2.mlp.experts.1.up_proj.weight", 1),
        ("experts.1.up_proj", 4),
        ("*", 96),
    ],
)
def test_patterns_name_units(plan: Plan, pattern: str, matched: int) -> None:
    explained = explain_plan(plan, pattern, limit=2)
    assert explained.matched == matched
    assert len(explained.units) == min(2, matched)


def test_a_unit_is_found_by_any_of_its_matrices(tiny: Path) -> None:
    plan = plan_of(tiny, "mlx", bits=3.0)
    (unit,) = explain_plan(plan, "layers.2.mlp.experts.5.up_proj").units
    assert (unit.unit, unit.matrices) == ("layers.2.experts.up", 8)
    assert explain_plan(plan, "layers.2.experts.up").units == [unit]
    members = [name for name in plan.alpha if "layers.2." in name and "up_proj" in name]
    assert unit.alpha == pytest.approx(np.mean([plan.alpha[name] for name in members]))


def test_a_pattern_without_match_shows_what_names_look_like(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"No planned matrix matches 'layers\.9'.*model\.layers\.0"):
        explain_plan(plan, "layers.9")


def test_a_plan_without_table_says_so(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"no table\).*alphaq plan"):
        explain_plan(plan.model_copy(update={"table": None}), None)


def test_an_edited_plan_is_not_explained_by_its_old_table(plan: Plan) -> None:
    name = next(iter(plan.assignment))
    edited = plan.model_copy(update={"choices": plan.choices | {name: "7g32s"}})
    with pytest.raises(PlanError, match=rf"does not offer '{name}' its choice '7g32s'.*edited"):
        explain_plan(edited, None)


def test_the_command_explains_a_file_or_its_folder(alphaq: Run, plan: Plan, plan_file: Path) -> None:
    ran = alphaq("explain", plan_file, "layers.0.*down_proj", "--limit", "3", "--json")
    explained = asdict(explain_plan(plan, "layers.0.*down_proj", 3))
    assert plan.config is not None
    explained["budget"] = plan.config.budget.model_dump()
    assert ran.json == json.loads(json.dumps(explained))
    assert alphaq("explain", plan_file.parent, "layers.0.*down_proj", "--limit", "3", "--json").json == ran.json
    shown = alphaq("explain", plan_file, "--limit", "2").out
    assert f"one more byte would save {plan.price:.4g}" in shown
    assert "96 units match; showing 2" in shown
    assert "chosen" in shown
    assert "× as large" in shown


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["absent.json"], ["No plan file absent.json", "alphaq plan"]),
        (["{plan}", "layers.9"], ["No planned matrix matches 'layers.9'"]),
    ],
)
def test_the_command_s_errors_are_one_line(
    alphaq: Run, plan_file: Path, arguments: list[str], parts: list[str]
) -> None:
    ran = alphaq("explain", *[argument.replace("{plan}", str(plan_file)) for argument in arguments])
    assert (ran.code, ran.out) == (2, "")
    assert len(ran.err.strip().splitlines()) == 1
    for part in parts:
        assert part in ran.err


@pytest.mark.usefixtures("knows_tiny")
def test_a_plan_by_an_order_has_no_price_to_explain(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    alphaq("plan", tiny, "--bits", "2.5", "--method", "uniform", "-o", tmp_path / "p.json")
    ran = alphaq("explain", tmp_path / "p.json", "--json").json
    assert ran["price"] is None
    assert all(unit["moves_up_at"] is None and unit["moves_down_at"] is None for unit in ran["units"])
    assert "by uniform: it follows an order" in alphaq("explain", tmp_path / "p.json").out


def test_code_bits_are_not_called_bytes(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    alphaq("plan", tiny, "--bits", "2.5", "--method", "paper", "-o", tmp_path / "p.json")
    assert "one more code bit would save" in alphaq("explain", tmp_path / "p.json").out


def test_words_about_dropped_experts_say_what_is_known_alone() -> None:
    some = {"experts": {0: (1,), 1: (0, 2)}, "loss": 0.01, "bound": 0.02}
    proven = "; no other numbers are better by more than 0.05, relative"
    for dropped, words in (
        (Dropping(totals={0: 1.0}, refused=(1, 2)), "none, as their losses are above the limit"),
        (Dropping(totals={0: 1.0}, refused=(2,), total=1.0, lower_bound=1.0), "none, as none paid for its bytes"),
        (Dropping(**some), "3 (up to 2 in a layer), at 0.01 (at most 0.02) nats"),
        (
            Dropping(**some, total=1.0, totals={0: 2.0}, lower_bound=0.95),
            f"3 (up to 2 in a layer), at 0.01 (at most 0.02) nats; expected loss 1 in all instead of 2{proven}",
        ),
    ):
        assert dropped_words(dropped) == words
