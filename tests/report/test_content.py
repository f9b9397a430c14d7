import base64
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaq.errors import AlphaQError, PlanError
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan, PlanTable
from alphaq.report.arrays import PackedArray, PackedNames, packed_names
from alphaq.report.content import MAX_DENSITIES, Sources, content_of, sampled
from alphaq.report.html import page_of, write_report
from alphaq.report.page import HeatMap
from alphaq.report.places import Place
from alphaq.report.runs import ComparedRow, Run, read_run


def unpacked(part: PackedArray) -> np.ndarray:
    return np.frombuffer(base64.b64decode(part.base64), f"<{part.type}")


def unpacked_names(found: PackedNames) -> list[str]:
    """As the page's script does it."""
    numbers = iter(unpacked(found.numbers).tolist())
    names = []
    for which in unpacked(found.which):
        template = found.templates[which]
        pieces = template.text.split("#") if template.numbers else [template.text]
        names.append("".join(f"{piece}{next(numbers)}" for piece in pieces[:-1]) + pieces[-1])
    return names


def small_plan(**changes: Any) -> Plan:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight" for layer in (0, 1) for expert in range(3)]
    losses = {name: (8.0 + number, 2.0 + number / 4, 0.5) for number, name in enumerate(names)}
    fields: dict[str, Any] = dict(
        assignment=dict.fromkeys(names, 3),
        choices=dict.fromkeys(names, "3g128"),
        alpha={name: 2.0 + number / 10 for number, name in enumerate(names)},
        expected_error=dict.fromkeys(names, 0.03),
        objective=sum(row[1] for row in losses.values()),
        lower_bound=10.0,
        price=0.1,
        budget_slack=0.0,
        size_bytes=1000,
        average_bits=3.0,
        budget_unit="bits",
        source={"name": "m", "fingerprint": "f" * 64},
        table=PlanTable(
            choices=("2g128", "3g128", "4g128"), losses=losses, costs=((20, 30, 40),), cost_of=(0,) * len(names)
        ),
    )
    return Plan(**(fields | changes))


@given(
    st.lists(
        st.one_of(
            st.text(alphabet="ab.#019٣", max_size=12),
            st.tuples(st.integers(0, 10**10), st.integers(0, 99)).map(lambda n: f"layers.{n[0]}.experts.{n[1]}.w"),
        ),
        max_size=8,
    )
)
@settings(deadline=None)
def test_names_survive_packing(names: list[str]) -> None:
    assert unpacked_names(packed_names(names)) == names


def test_seventy_thousand_names_take_a_few_bytes_each() -> None:
    names = [f"model.layers.{n // 1152}.mlp.experts.{n // 3 % 384}.{'abc'[n % 3]}_proj.weight" for n in range(70_000)]
    assert len(json.dumps(asdict(packed_names(names)))) < 8 * len(names)


def test_the_data_holds_the_plan_and_its_path() -> None:
    plan = small_plan()
    content = content_of(Run("run", plan), Sources())
    data, path = content.data, content.data.path
    assert path is not None and content.facts.path is not None
    assert unpacked_names(data.names) == list(plan.assignment)
    assert [data.choices[choice].name for choice in unpacked(data.choice)] == ["3g128"] * 6
    assert unpacked(data.alpha) == pytest.approx(list(plan.alpha.values()))
    assert path.plan_cost == 180
    assert path.plan_loss == pytest.approx(plan.objective)
    assert unpacked(path.climbs).tolist() == [2] * 6
    start, saved = unpacked(path.start_loss).sum(), unpacked(path.saved).sum()
    assert start - saved == pytest.approx(path.final_loss)
    assert content.facts.path.loss == pytest.approx(plan.objective)


def test_maps_have_a_row_for_each_layer_and_a_column_for_each_expert() -> None:
    data = content_of(Run("run", small_plan()), Sources()).data
    assert data.maps == [HeatMap("up", ["0", "1"], ["0", "1", "2"], experts=True)]
    cells = list(zip(unpacked(data.row).tolist(), unpacked(data.column).tolist(), strict=True))
    assert cells == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_two_matrices_that_names_do_not_tell_apart_get_cells_of_their_own() -> None:
    plan = small_plan()
    places = dict.fromkeys(plan.choices, Place(0, 0, "up", Role.EXPERT, 4))
    data = content_of(Run("run", plan), Sources(places, "x")).data
    assert sorted(unpacked(data.column).tolist()) == list(range(6))


def test_what_is_missing_is_said_with_its_remedy() -> None:
    missing = " ".join(content_of(Run("run", small_plan(alpha={}, table=None)), Sources()).missing)
    for remedy in ("--stats", "--reference", "alphaq plan", "alphaq quantize", "--compare"):
        assert remedy in missing
    everything = content_of(
        Run("run", small_plan(), dict.fromkeys(small_plan().assignment, 0.04)),
        Sources(
            {name: Place(0, n, "up", Role.EXPERT, 9) for n, name in enumerate(small_plan().choices)},
            "x",
            compared=[ComparedRow(method="auto", bits=3, size_bytes=1000, kl=0.1, mean_perplexity=7.0)],
        ),
    )
    assert [line for line in everything.missing if "densities" not in line] == []
    assert everything.facts.measured == pytest.approx(0.04)


def test_measured_figures_of_the_same_method_and_bytes_are_the_plans() -> None:
    plan = small_plan(config={"method": "auto", "budget": {"bits": 3.0}})
    rows = [
        ComparedRow(method="uniform", bits=3, size_bytes=1000, kl=0.9),
        ComparedRow(method="auto", bits=2, size_bytes=900, kl=0.8),
        ComparedRow(method="auto", bits=3, size_bytes=1000, kl=0.1),
    ]
    assert content_of(Run("r", plan), Sources(compared=rows)).facts.outcome == rows[2]
    assert content_of(Run("r", plan), Sources(compared=rows[:2])).facts.outcome is None
    near = rows[2].model_copy(update={"size_bytes": 1001})
    far = rows[2].model_copy(update={"size_bytes": 1002})
    assert content_of(Run("r", plan), Sources(compared=[far, near])).facts.outcome == near
    assert content_of(Run("r", plan), Sources(compared=[far])).facts.outcome is None


def test_an_edited_plan_is_refused() -> None:
    name = next(iter(small_plan().assignment))
    edited = small_plan(choices=small_plan().choices | {name: "5g128"}, assignment=small_plan().assignment | {name: 5})
    with pytest.raises(PlanError, match="edited since"):
        content_of(Run("run", edited), Sources())
    with pytest.raises(PlanError, match="lacks"):
        table = small_plan().table
        assert table is not None
        losses = {f"x.{unit}": row for unit, row in table.losses.items()}
        content_of(Run("run", small_plan(table=table.model_copy(update={"losses": losses}))), Sources())
    with pytest.raises(PlanError, match="no assignment"):
        content_of(Run("run", small_plan(assignment={})), Sources())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"config": {"budget": {"bits": 2.5}, "method": ["auto"]}}, "config"),
        ({"config": {"budget": {"bits": 2.5}, "pins": [{"pattern": "a"}]}}, "config"),
        ({"config": {"budget": "much"}}, "config"),
        ({"table": {"choices": ["3g128"], "losses": {"a.0": [1e300]}, "costs": [[1]], "cost_of": [0]}}, "beyond"),
        ({"table": {"choices": ["3g128"], "losses": {"a.0": [1.0]}, "costs": [[2**62]], "cost_of": [0]}}, "beyond"),
        ({"table": {"choices": ["3g128"], "losses": {"a.0": [None]}, "costs": [[1]], "cost_of": [0]}}, "no choice"),
        (
            {"table": {"choices": ["x"], "losses": {"a.0": [1.0]}, "costs": [[1]], "cost_of": [0]}},
            "no storage choice|not a",
        ),
    ],
)
def test_a_plan_from_a_stranger_is_refused_in_words(changes: dict[str, Any], fault: str) -> None:
    fields: dict[str, Any] = {"assignment": {"a.0": 3}, "choices": {"a.0": "3g128"}}
    with pytest.raises(AlphaQError, match=fault):
        page_of(content_of(Run("run", Plan.from_json(json.dumps(fields | changes), "p.json")), Sources()))


def test_a_plan_that_follows_an_order_says_what_the_path_would_save() -> None:
    names = list(small_plan().assignment)
    lifted = {name: ("4g128" if number < 3 else "2g128") for number, name in enumerate(names)}
    plan = small_plan(
        choices=lifted,
        assignment={name: int(choice[0]) for name, choice in lifted.items()},
        lower_bound=None,
        price=None,
    )
    facts = content_of(Run("run", plan), Sources()).facts.path
    assert facts is not None and facts.above is not None
    assert facts.bound_by_more
    assert facts.difference < 0
    assert 0 < facts.above < 1


def test_fractions_of_rates_are_shown_as_they_are() -> None:
    """In a colour between those of the whole bits."""
    names = list(small_plan().assignment)
    choices = dict.fromkeys(names, "t2.75") | {names[0]: "t1.5"}
    plan = small_plan(choices=choices, assignment={name: float(text[1:]) for name, text in choices.items()}, table=None)
    content = content_of(Run("run", plan), Sources())
    (row,) = content.facts.roles.rows
    assert (row.average, row.total) == ((1.5 + 5 * 2.75) / 6, 6)
    assert content.facts.histogram == [(1.5, 1, 1 / 6), (2.75, 5, 5 / 6)] == row.parts
    assert [(one.name, one.bits) for one in content.data.choices] == [("t1.5", 1.5), ("t2.75", 2.75)]
    page = page_of(content)
    mixed = "background:color-mix(in srgb, var(--b2) 25%, var(--b3))"
    assert f'<span class="chip b3" style="{mixed}">2.75 bits</span>' in page
    assert (
        f'<span class="b3" style="flex-grow:0.833333;{mixed}" title="2.75 bits: 5 matrices, 83.3 %">2.75</span>' in page
    )
    assert '<span class="chip b3">3 bits</span>' in page_of(content_of(Run("run", small_plan()), Sources()))


def test_names_cannot_end_the_script_or_become_markup() -> None:
    evil = "model.layers.0.mlp.experts.0.</script><img src=x onerror=alert(1)>.weight"
    plan = small_plan(
        assignment={evil: 3},
        choices={evil: "3g128"},
        alpha={},
        expected_error={},
        table=None,
        neutral={evil: "`</li><b>` because"},
        source={"name": "<i>&model", "fingerprint": "f"},
    )
    page = page_of(content_of(Run("run", plan), Sources()))
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert "<i>&model" not in page
    assert "<b>` because" not in page


def test_the_page_allows_its_own_script_only_and_names_no_address(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", Run("run", small_plan()), Sources())
    page = (tmp_path / "r.html").read_text()
    assert "default-src 'none'" in page
    assert "sha256-" in page
    for address in ("https://", "//cdn", "src=", "@import", "url("):
        assert address not in page, address
    assert page.count("http://") == page.count("http://www.w3.org/2000/svg")


def test_equal_runs_give_equal_pages(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(tmp_path / name, Run("run", small_plan()), Sources())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_spectra_are_sampled_evenly_and_hold_the_extremes() -> None:
    names = [f"layers.{n}.experts.0.up.weight" for n in range(3 * MAX_DENSITIES)]
    alpha = {name: 2 + (n * 7919 % 6007) / 1000 for n, name in enumerate(names)}
    plan = Plan(assignment=dict.fromkeys(names, 2), choices=dict.fromkeys(names, "2g128"), alpha=alpha)
    found = sampled(plan, 100)
    assert 90 <= len(found) <= 100
    assert {min(alpha, key=alpha.__getitem__), max(alpha, key=alpha.__getitem__)} <= set(found)
    positions = np.array([names.index(name) for name in found])
    assert np.diff(np.sort(positions)).max() < 3 * len(names) / 100
    assert sampled(plan, len(names)) == names
    assert sampled(plan, 0) == []


def test_a_quantized_folder_gives_plan_and_measured_errors(tiny_quantized: Path) -> None:
    run = read_run(tiny_quantized)
    facts = content_of(run, Sources()).facts
    assert set(run.plan.assignment) <= set(run.measured)
    assert facts.path is not None and facts.correlation is not None
    assert facts.measured == pytest.approx(facts.beside, rel=0.05)
    assert facts.path.loss >= facts.path.plan_loss * (1 - 1e-12)  # sums in another order
    assert facts.path.loss == pytest.approx(facts.path.plan_loss, rel=0.02)
    assert facts.path.plan_loss == pytest.approx(run.plan.objective, rel=1e-5)
    assert not math.isnan(facts.correlation)
    totals = {row.role: row.total for row in facts.roles.rows}
    assert totals["expert"] == len(run.plan.assignment)
    assert sum(totals.values()) == len(run.plan.choices)
