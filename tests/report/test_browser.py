"""The report in a real browser: Chromium loads it, a user's hands move it, and its numbers are the plan's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.formats.table import parse_choice
from alphaq.nouns.plan import Plan
from alphaq.report.content import Sources
from alphaq.report.html import write_report
from alphaq.report.path import BudgetPath, budget_path, tables_of
from alphaq.report.places import places_of_matrices
from alphaq.report.runs import ComparedRow, read_run

CHROMIUM = next((path for path in map(Path, ("/usr/bin/chromium", "/usr/bin/chromium-browser")) if path.exists()), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]


@dataclass
class Seen:
    """A page, and what it complained of and asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def value(self, selector: str) -> float:
        return float(self.page.locator(selector).get_attribute("data-value"))

    def settle(self) -> None:
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def slide(self, position: int) -> None:
        self.page.locator("#slider").fill(str(position))
        self.settle()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with driver.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def made(tiny_quantized: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """A report with everything in it."""
    run, checkpoint = read_run(tiny_quantized), open_checkpoint(tiny)
    path = tmp_path_factory.mktemp("report") / "report.html"
    compared = [ComparedRow(method="reference", bits=16, size_bytes=20_000_000, kl=0.0, mean_perplexity=30.0)]
    for method, worse in (("uniform", 2.0), ("auto", 1.0)):
        for bits in (2.0, 3.0, 4.0):
            figures = {"kl": worse * 4.0**-bits, "mean_perplexity": 30 + worse}
            compared.append(ComparedRow(method=method, bits=bits, size_bytes=int(2e6 * bits), **figures))
    write_report(
        path,
        run,
        Sources(
            places_of_matrices(checkpoint.matrices),
            "the model",
            densities=dict(pipeline.densities(checkpoint, run.plan)),
            compared=compared,
        ),
    )
    return path, run.plan


@pytest.fixture
def seen(browser: Any, made: tuple[Path, Plan]) -> Iterator[Seen]:
    yield from opened(browser, made[0])


def opened(browser: Any, path: Path, **context: Any) -> Iterator[Seen]:
    page = browser.new_context(**({"viewport": {"width": 1360, "height": 900}} | context)).new_page()
    found = Seen(page)
    page.on("console", lambda message: found.complaints.append(message.text))
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    yield found
    found.page.wait_for_timeout(200)  # what was put off is drawn
    assert found.complaints == []
    assert found.requests == [path.as_uri()]
    page.context.close()


def path_of(plan: Plan) -> BudgetPath:
    assert plan.table is not None
    return budget_path(*tables_of(plan.table))


def test_it_opens_with_the_plans_own_numbers(seen: Seen, made: tuple[Path, Plan]) -> None:
    plan = made[1]
    assert seen.value("#at-loss") == pytest.approx(plan.objective, rel=1e-5)
    assert seen.value("#at-size") == plan.size_bytes
    assert seen.value("#at-bits") == pytest.approx(plan.bits_per_weight, rel=1e-3)
    for bits, count in plan.histogram.items():
        planned = sum(value == bits for value in plan.assignment.values())
        assert count >= planned
        assert seen.page.locator(f"#bars [data-bits='{bits}']").inner_text() == str(planned)


def test_machines_are_marked_on_the_curve(browser: Any, tiny_quantized: Path, tmp_path: Path) -> None:
    run = read_run(tiny_quantized)
    table, size, times = run.plan.table, run.plan.size_bytes, 2200
    assert table is not None and size is not None
    costs = tuple(tuple(cost * times for cost in row) for row in table.costs)
    larger = {"table": table.model_copy(update={"costs": costs}), "size_bytes": size * times}
    write_report(tmp_path / "report.html", replace(run, plan=run.plan.model_copy(update=larger)), Sources())
    for seen in opened(browser, tmp_path / "report.html"):
        assert seen.page.locator("#curve .machine").all_text_contents() == ["16 GB", "24 GB"]


def test_the_slider_replays_the_path(seen: Seen, made: tuple[Path, Plan]) -> None:
    plan, path = made[1], path_of(made[1])
    assert plan.table is not None
    for position in (0, 400, 1100, 1600, 2000, 700):
        seen.slide(position)
        step = int(seen.page.locator("#state").get_attribute("data-step"))
        assert abs(path.costs[step] - (path.costs[0] + position / 2000 * (path.costs[-1] - path.costs[0]))) <= max(
            path.added
        )
        assert seen.value("#at-loss") == pytest.approx(path.losses[step], rel=1e-5)
        chosen = [parse_choice(plan.table.choices[column]).bits for column in path.columns_after(step)]
        for bits in set(chosen):
            assert seen.page.locator(f"#bars [data-bits='{bits}']").inner_text() == str(chosen.count(bits))


def test_at_the_plans_budget_path_and_plan_differ_by_less_than_a_step(seen: Seen, made: tuple[Path, Plan]) -> None:
    plan, path = made[1], path_of(made[1])
    seen.page.locator("#more").click()
    seen.settle()
    step = int(seen.page.locator("#state").get_attribute("data-step"))
    assert seen.value("#at-loss") == pytest.approx(seen.value("#path-loss"), rel=1e-5)
    assert path.losses[step + 1] <= (plan.objective or 0) * (1 + 1e-5)
    assert (plan.objective or 0) <= path.losses[step] * (1 + 1e-5)
    seen.page.locator("#reset").click()
    seen.settle()
    assert seen.value("#at-loss") == pytest.approx(plan.objective, rel=1e-5)


def test_one_step_buttons_move_one_step(seen: Seen) -> None:
    seen.slide(1000)
    before = int(seen.page.locator("#state").get_attribute("data-step"))
    for button, by in (("#more", 1), ("#less", -1)):
        seen.page.locator(button).click()
        seen.settle()
        assert int(seen.page.locator("#state").get_attribute("data-step")) == before + max(by, 0)


def test_the_slider_obeys_the_keyboard(seen: Seen) -> None:
    before = seen.value("#at-size")
    seen.page.locator("#slider").focus()
    for _ in range(40):
        seen.page.keyboard.press("ArrowRight")
    seen.settle()
    assert seen.value("#at-size") > before
    assert "predicted loss" in seen.page.locator("#slider").get_attribute("aria-valuetext")


def click_cell(seen: Seen, canvas: int, row: int, column: int, rows: int, columns: int) -> None:
    place = seen.page.locator("#maps canvas").nth(canvas)
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    width, height = (box["width"] - 32) / columns, (box["height"] - 18) / rows
    place.click(position={"x": 30 + (column + 0.5) * width, "y": (row + 0.5) * height})


def test_a_clicked_cell_shows_that_matrix(seen: Seen, made: tuple[Path, Plan]) -> None:
    plan = made[1]
    layers, experts = 1 + max(int(n.split(".")[2]) for n in plan.assignment), 8
    click_cell(seen, 3, 1, 5, layers, experts)  # the second map's bits: projection up
    panel = seen.page.locator("#panel")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    assert panel.get_attribute("data-matrix") == name
    assert seen.page.locator("#panel-plan").inner_text() == plan.choices[name]
    assert seen.page.locator("#panel-alpha").inner_text().startswith(f"{plan.alpha[name]:.3f} ")
    assert f"α {plan.alpha[name]:.3f}" in panel.locator("svg").first.get_attribute("aria-label")
    chosen = panel.locator("tr.now td").first.inner_text() if panel.locator("tr.now").count() else ""
    assert plan.choices[name] in chosen or plan.choices[name] in panel.locator("p.small").inner_text()


def test_maps_obey_the_keyboard(seen: Seen) -> None:
    canvas = seen.page.locator("#maps canvas").first
    canvas.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        seen.page.keyboard.press(key)
    assert seen.page.locator("#panel").get_attribute("data-matrix") == "model.layers.1.mlp.experts.2.gate_proj.weight"


def test_the_theme_button_changes_the_colours(seen: Seen) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    before = seen.page.evaluate(background)
    seen.page.locator("#theme").click()
    assert seen.page.evaluate(background) != before
    seen.page.locator("#theme").click()
    assert seen.page.evaluate(background) == before


def test_methods_can_be_switched_off_and_figures_chosen(seen: Seen) -> None:
    lines = seen.page.locator("#methods svg path[fill='none']")
    assert lines.count() == 2
    seen.page.locator("#methods-legend button").first.click()
    assert lines.count() == 1
    seen.page.locator("#metric").select_option(index=1)
    assert "perplexity" in seen.page.locator("#methods svg").get_attribute("aria-label")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1360])
def test_nothing_is_wider_than_the_screen(
    scheme: str, width: int, browser: Any, made: tuple[Path, Plan], tmp_path: Path
) -> None:
    for found in opened(browser, made[0], viewport={"width": width, "height": 800}, color_scheme=scheme):
        assert found.page.evaluate("document.documentElement.scrollWidth") <= width
        dark = found.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 24)"
        assert dark is (scheme == "dark")
        found.page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert (tmp_path / "page.png").stat().st_size > 20_000


def test_every_control_has_a_name(seen: Seen) -> None:
    unnamed = seen.page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, canvas[tabindex], svg[role=img]")]
            .filter((one) => !(one.getAttribute("aria-label") || one.textContent.trim() || (one.labels || []).length))
            .map((one) => one.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []


def test_a_plan_alone_opens_too(browser: Any, made: tuple[Path, Plan], tmp_path: Path) -> None:
    for number, changes in enumerate(({"table": None}, {"alpha": {}, "expected_error": {}}, {"size_bytes": None})):
        plan = made[1].model_copy(update=changes)
        (tmp_path / "plan.json").write_text(plan.to_json())
        path = tmp_path / f"{number}.html"
        write_report(path, read_run(tmp_path / "plan.json"), Sources())
        for found in opened(browser, path):
            click_cell(found, 0, 0, 0, 1 + max(int(n.split(".")[2]) for n in plan.assignment), 8)
            assert "--reference" in found.page.locator("#panel").inner_text()


def test_units_that_share_a_choice_move_together(browser: Any, made: tuple[Path, Plan], tmp_path: Path) -> None:
    plan = made[1]
    assert plan.table is not None
    names = list(plan.table.losses)
    layers = sorted({name.split(".experts")[0] for name in names})
    members = {layer: tuple(name for name in names if name.startswith(f"{layer}.")) for layer in layers}
    losses, costs = tables_of(plan.table)
    rows = {layer: [names.index(name) for name in group] for layer, group in members.items()}
    table = plan.table.model_copy(
        update={
            "losses": {layer: tuple(losses[at].sum(axis=0).tolist()) for layer, at in rows.items()},
            "costs": (tuple(int(cost) for cost in costs[rows[layers[0]]].sum(axis=0)),),
            "cost_of": (0,) * len(layers),
            "members": members,
        }
    )
    column = table.choices.index("3g128")
    shared = plan.model_copy(
        update={
            "table": table,
            "assignment": dict.fromkeys(names, 3),
            "choices": plan.choices | dict.fromkeys(names, "3g128"),
        }
    )
    (tmp_path / "plan.json").write_text(json.dumps(shared.model_dump(mode="json")))
    write_report(tmp_path / "r.html", read_run(tmp_path / "plan.json"), Sources())
    for found in opened(browser, tmp_path / "r.html"):
        assert found.value("#at-loss") == pytest.approx(losses[:, column].sum(), rel=1e-6)
        found.slide(1000)
        counts = [int(text) for text in found.page.locator("#bars [data-bits]").all_inner_texts()]
        assert sum(counts) == len(names)
        assert all(count % (len(names) // len(layers)) == 0 for count in counts)
        assert not math.isnan(found.value("#at-loss"))
