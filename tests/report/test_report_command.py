import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alphaq.nouns.plan import Plan
from conftest import Ran

Run = Callable[..., Ran]


def test_a_report_is_made_of_a_folder_a_model_and_a_comparison(
    alphaq: Run, tiny_quantized: Path, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "results").mkdir()
    rows = [{"method": "uniform", "bits": 2.5, "size_bytes": 5_000_000, "kl": 0.2, "mean_perplexity": 9.0}]
    (tmp_path / "results" / "comparison.json").write_text(json.dumps({"rows": rows}))
    out = tmp_path / "r.html"
    ran = alphaq(
        *("report", tiny_quantized, "--reference", tiny, "--spectra", "12", "--compare", tmp_path / "results"),
        *("-o", out, "--json"),
    )
    found = ran.json
    assert found["output"] == str(out)
    assert found["bytes"] == out.stat().st_size < 400_000
    assert (found["matrices"], found["units"]) == (96, 96)
    assert 9 <= found["spectra"] <= 12
    assert found["methods"] == 1
    assert found["path_loss"] == pytest.approx(found["plan_loss"], rel=0.02)
    assert len(found["missing"]) == 1  # of most spectra


def test_a_plan_from_stats_alone_has_a_report(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    assert alphaq("analyze", tiny, "-o", tmp_path / "s.csv").code == 0
    assert alphaq("plan", "--stats", tmp_path / "s.csv", "--bits", "2.5", "-o", tmp_path / "p.json").code == 0
    ran = alphaq("report", tmp_path / "p.json", "--stats", tmp_path / "s.csv", "-o", tmp_path / "r.html", "--json")
    page = (tmp_path / "r.html").read_text()
    assert ran.json["units"] == 96
    assert "code bits" in page
    assert "alphaq plan --bits 2.5 --method alphaq" in page and "--stats s.csv -o plan.json" in page
    assert "Give --model or --stats" not in " ".join(ran.json["missing"])


def test_another_model_is_refused(alphaq: Run, tiny_quantized: Path, tiny: Path, tmp_path: Path) -> None:
    plan = Plan.read(tiny_quantized / "plan.json")
    assert plan.source is not None
    other = plan.model_copy(update={"source": plan.source.model_copy(update={"fingerprint": "0" * 64})})
    (tmp_path / "p.json").write_text(other.to_json())
    ran = alphaq("report", tmp_path / "p.json", "--reference", tiny, "-o", tmp_path / "r.html")
    assert ran.code == 2
    assert "Give the checkpoint it was made of" in ran.err
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("nowhere",), "No plan file"),
        (("{run}", "--spectra", "3"), "Add --reference"),
        (("{run}", "--stats", "nowhere.csv"), "alphaq analyze"),
        (("{run}", "--compare", "nowhere"), "alphaq compare"),
        (("{run}", "--reference", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: tuple[str, ...],
    fault: str,
    alphaq: Run,
    tiny_quantized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = alphaq("report", *(part.format(run=tiny_quantized) for part in arguments))
    assert ran.code == 2
    assert fault in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_manifest_is_named(alphaq: Run, tiny_quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_bytes((tiny_quantized / "plan.json").read_bytes())
    (tmp_path / "run" / "alphaq_manifest.json").write_text("{")
    ran = alphaq("report", tmp_path / "run", "-o", tmp_path / "r.html")
    assert ran.code == 2
    assert "alphaq_manifest.json" in ran.err


@pytest.mark.usefixtures("knows_tiny")
def test_plan_and_analyze_draw_for_people_and_not_for_programs(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    shown = alphaq("plan", tiny, "--bits", "2.5", "--method", "distortion").out
    assert "Bits by layer (down) and expert (across)" in shown
    assert "matrices at t2.5" in shown
    fast = alphaq("plan", tiny, "--bits", "2.5", "--method", "distortion", "--fast").out
    assert "matrices at 2g128" in fast and "matrices at t" not in fast
    assert "Bits by layer" not in alphaq("plan", tiny, "--bits", "2.5", "--method", "distortion", "--json").out
    analyzed = alphaq("analyze", tiny, "-o", tmp_path / "s.csv")
    assert "small α: heavy tail" in analyzed.out
    assert json.loads(alphaq("analyze", tiny, "-o", tmp_path / "s.csv", "--json").out)["matrices"] > 96
