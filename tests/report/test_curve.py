"""Size against what is lost: of a plan, of a fit, in characters and as a figure."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from alphaq.errors import PlanError
from alphaq.nouns.plan import Plan
from alphaq.report.curve import Curve, CurvePoint, Mark, curve_lines, curve_of_plan, machine_marks, read_curve
from conftest import Ran

GIB = 2**30
POINTS = tuple(CurvePoint(size_bytes=size * GIB, lost=4.0**-size) for size in range(4, 20, 2))
CURVE = Curve(
    model="m", unit="predicted KL", points=POINTS, marks=tuple(Mark(gib=n, weights_bytes=n * GIB) for n in (2, 8, 16))
)


def test_the_curve_of_a_plan_goes_by_it(tiny_quantized: Path) -> None:
    plan = Plan.read(tiny_quantized / "plan.json")
    curve = curve_of_plan(plan)
    assert all(a.size_bytes < b.size_bytes and a.lost > b.lost for a, b in pairwise(curve.points))
    assert plan.size_bytes is not None and plan.objective is not None
    below = [point.lost for point in curve.points if point.size_bytes <= plan.size_bytes]
    above = [point.lost for point in curve.points if point.size_bytes > plan.size_bytes]
    assert max(above) < plan.objective <= min(below) * 1.001  # the plan fills the room that the path leaves
    with pytest.raises(PlanError, match="no curve"):
        curve_of_plan(plan.model_copy(update={"table": None}))


def test_in_characters_it_falls_to_the_right_with_machines_below() -> None:
    lines = curve_lines(CURVE).splitlines()
    assert lines[1].split("│")[1].startswith("●") and lines[-4].rstrip().endswith("●")
    assert lines[-1].split() == ["machine", "8", "16", "GiB"]
    assert sum("┊" in line for line in lines) > 10


def test_labels_of_machines_cover_no_other() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from alphaq.report.plots import curve_figure

    points = tuple(CurvePoint(size_bytes=2 * GIB * 2**step, lost=4.0**-step) for step in range(8))
    figure = curve_figure(CURVE.model_copy(update={"points": points, "marks": tuple(machine_marks())}))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    labels = [text for text in figure.axes[0].texts if text.get_text().endswith(" GB")]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in (*labels, figure.axes[0]._left_title)]
    assert len(labels) == 7
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_a_fit_is_drawn_and_a_damaged_one_refused(
    tiny_quantized: Path, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "fit.json"
    file.write_text(json.dumps({"curve": CURVE.model_dump(mode="json")}))
    told = alphaq("plot", "curve", file, "-o", tmp_path / "f.svg", "--json").json
    assert told["points"] == len(POINTS) and told["machines"] == [8, 16]
    drawn = (tmp_path / "f.svg").read_text(encoding="utf-8")
    assert "16 GB" in drawn and "weight files (GiB)" in drawn and ">2 GB" not in drawn
    assert read_curve(file) == CURVE
    file.write_text((tiny_quantized / "plan.json").read_text().replace('"tiny"', '"curve"'))
    assert alphaq("plot", "curve", file, "-o", tmp_path / "of-plan.svg", "--json").json["points"] > 2
    file.write_text('{"curve": {"points": []}}')
    failed = alphaq("plot", "curve", file, "-o", tmp_path / "g.svg")
    assert failed.code and "holds no curve" in failed.err
