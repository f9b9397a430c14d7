import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alphaq import comparison, pipeline, trials
from alphaq.calibrated import Rounding
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.comparison import Row, compare, variant_of
from alphaq.config import Budget, PlanConfig, Rule
from alphaq.errors import AlphaQError, OutputError, StatsError
from alphaq.evaluation.fidelity import Remembered, WindowScore, paired_bootstrap, windows
from conftest import DATA

TEXTS = sorted((DATA / "texts").glob("*.txt"))[:2]
CONFIG = PlanConfig(budget=Budget(bits=2), choices="2,3")
METHODS = ("uniform", "first-layers", "distortion")


def run(tiny: Path, out: Path, methods: tuple[str, ...] = METHODS, **settings: Any) -> list[Row]:
    settings = {"config": CONFIG, "max_tokens": 256, "window": 64, **settings}
    return compare(open_checkpoint(tiny), methods, [2.0, 2.5], TEXTS, out, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    out = tmp_path_factory.mktemp("compare") / "out"
    return out, run(DATA / "tiny", out)


def test_methods_get_the_same_bytes_and_are_judged_on_the_same_windows(finished: tuple[Path, list[Row]]) -> None:
    _, rows = finished
    assert [(row.method, row.bits) for row in rows] == [
        ("reference", 16.0),
        *((method, bits) for bits in (2.0, 2.5) for method in METHODS),
    ]
    for bits in (2.0, 2.5):
        group = [row for row in rows if row.bits == bits]
        assert len({row.budget_bytes for row in group}) == 1
        uniform = group[0]
        assert uniform.size_bytes == uniform.budget_bytes and uniform.average_bits == bits
        assert all(row.size_bytes is not None and row.size_bytes <= row.budget_bytes for row in group)
        assert uniform.difference is None and all(row.difference is not None for row in group[1:])
    reference = rows[0]
    assert reference.kl == pytest.approx(0, abs=1e-6) and reference.ear == pytest.approx(1, abs=1e-5)
    assert all((row.kl or 0) > 0.001 for row in rows[1:])


def test_interval_holds_the_difference_and_is_zero_for_equal_plans(finished: tuple[Path, list[Row]]) -> None:
    _, rows = finished
    at_two = [row for row in rows if row.bits == 2.0]  # only 2 bits fit: all plans are the same
    assert all(row.difference == row.difference_low == row.difference_high == 0 for row in at_two[1:])
    for row in rows[-2:]:
        assert row.difference_low <= row.difference <= row.difference_high  # type: ignore[operator]
        uniform = next(other for other in rows if (other.method, other.bits) == ("uniform", row.bits))
        assert row.difference == pytest.approx(row.mean_perplexity / uniform.mean_perplexity - 1)  # type: ignore[operator]


def test_files_hold_the_rows(finished: tuple[Path, list[Row]]) -> None:
    out, rows = finished
    stored = json.loads((out / "comparison.json").read_text())["rows"]
    assert [Row(**row) for row in stored] == rows
    with (out / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == [row.method for row in rows]
    assert float(lines[1][f"perplexity_{TEXTS[0].stem}"]) == rows[1].perplexity[TEXTS[0].stem]  # type: ignore[index]
    assert sorted(path.name for path in out.iterdir()) == ["comparison.csv", "comparison.json", "results.jsonl"]


def test_finished_comparison_is_read_and_not_repeated(
    finished: tuple[Path, list[Row]], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rows = finished
    monkeypatch.setattr(comparison, "measure_for_plan", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(trials, "load_model", lambda *_, **__: pytest.fail("loaded again"))
    assert run(tiny, out) == rows


def test_interrupted_comparison_goes_on_to_the_same_figures(
    finished: tuple[Path, list[Row]], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, plans = pipeline.quantize, []

    def stopping(checkpoint: Any, plan: Any, *args: Any, **kwargs: Any) -> Any:
        plans.append(plan.choices)
        if len(plans) == 2:
            raise KeyboardInterrupt
        return real(checkpoint, plan, *args, **kwargs)

    monkeypatch.setattr(pipeline, "quantize", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "out")
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) > 2
    again = run(tiny, tmp_path / "out")

    def figures(rows: list[Row]) -> list[tuple[Any, ...]]:
        return [(row.method, row.bits, row.size_bytes, row.perplexity, row.kl, row.difference) for row in rows]

    assert figures(again) == figures(finished[1])
    distinct = {json.dumps(choices, sort_keys=True) for choices in plans}
    assert len(plans) == len(distinct) + 1  # the one that was stopped is done again, equal plans are not


def test_other_settings_need_another_folder(finished: tuple[Path, list[Row]], tiny: Path) -> None:
    with pytest.raises(OutputError, match="another model, texts or settings"):
        run(tiny, finished[0], window=32)


def test_method_without_a_plan_is_reported_and_the_others_run(tiny: Path, tmp_path: Path) -> None:
    rows = run(tiny, tmp_path / "out", ("uniform", "distortion:min_sqnr_db=60"))
    failed = [row for row in rows if row.error]
    assert [row.method for row in failed] == ["distortion:min_sqnr_db=60"] * 2
    assert "--min-sqnr" in failed[0].error and failed[0].perplexity is None
    assert rows[1].perplexity is not None


def test_method_that_needs_text_is_refused_before_any_work(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(StatsError, match="needs a text"):
        run(tiny, tmp_path / "out", ("uniform", "pmq"))
    assert not (tmp_path / "out").exists()


def test_method_with_settings_of_its_own() -> None:
    config = variant_of(CONFIG, "alphaq:gamma=2.5:tail=ks")
    assert (config.method, config.gamma, config.tail) == ("alphaq", 2.5, "ks")
    with pytest.raises(AlphaQError, match=r"Did you mean 'gamma'"):
        variant_of(CONFIG, "alphaq:gama=2")
    with pytest.raises(AlphaQError, match=r"alphaq:gamma=high"):
        variant_of(CONFIG, "alphaq:gamma=high")


def test_paired_bootstrap_sees_a_small_constant_difference() -> None:
    torch.manual_seed(0)
    hard = (torch.rand(40) * 5 + 1).tolist()
    plain = {"a": [WindowScore(100, 100 * value) for value in hard]}
    worse = {"a": [WindowScore(100, 100 * (value + 0.01)) for value in hard]}
    found = paired_bootstrap(worse, plain)
    assert found.ratio == pytest.approx(math.expm1(0.01))
    assert found.interval == pytest.approx((found.ratio, found.ratio))
    assert paired_bootstrap(plain, plain).interval == (0, 0)


def test_remembered_model_runs_each_window_once_and_keeps_its_limit() -> None:
    calls: list[int] = []

    class Model:
        device, config = torch.device("cpu"), SimpleNamespace()

        def __call__(self, ids: torch.Tensor) -> Any:
            calls.append(int(ids.sum()))
            return SimpleNamespace(logits=ids.float()[..., None].expand(-1, -1, 8))

    remembered = Remembered(Model(), limit_bytes=8 * 4 * 4)
    first, second = torch.arange(4)[None], torch.arange(4, 8)[None]
    for ids in (first, first, second, second):
        assert torch.equal(remembered(ids).logits[..., 0], ids.float())
    assert calls == [6, 22, 22]


def test_skipped_tokens_are_not_scored() -> None:
    def tokenizer(text: str, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(len(text))[None]}

    parts = windows(tokenizer, "x" * 20, length=4, max_tokens=6, skip_tokens=10)
    assert [part.tolist() for part in parts] == [[[10, 11, 12, 13]], [[14, 15]]]


@pytest.mark.parametrize("name", ["notes.txt", "results.jsonl"])
def test_folder_of_something_else_is_left_alone(tiny: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "blocks").mkdir()
    (tmp_path / name).write_text("mine\n")
    with pytest.raises(OutputError, match="holds no comparison"):
        run(tiny, tmp_path)
    assert (tmp_path / name).read_text() == "mine\n" and (tmp_path / "blocks").is_dir()


def test_infeasible_budget_costs_its_own_row_only(tiny: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"min_bits": (Rule(pattern="*", value="3"),)})
    rows = compare(open_checkpoint(tiny), ("distortion",), [2.0, 3.0], TEXTS, tmp_path / "out", config, max_tokens=64)
    assert [(row.method, row.bits, bool(row.error)) for row in rows[1:]] == [
        ("uniform", 2.0, True),
        ("distortion", 2.0, True),
        ("uniform", 3.0, False),
        ("distortion", 3.0, False),
    ]


def test_quantizers_are_compared_under_the_same_plan(tiny: Path, tmp_path: Path) -> None:
    roundings = [Rounding.of("native", "rtn"), Rounding.of("native", "minmax")]
    rows = run(tiny, tmp_path / "out", ("first-layers",), roundings=roundings)
    assert [(row.method, row.quantizer, row.bits) for row in rows] == [
        ("reference", "", 16.0),
        *(
            (method, quantizer, bits)
            for bits in (2.0, 2.5)
            for method, quantizer in (("uniform", "rtn"), ("first-layers", "rtn"), ("first-layers", "minmax"))
        ),
    ]
    rtn, minmax = rows[-2:]
    assert rtn.size_bytes == minmax.size_bytes and rtn.kl != minmax.kl
    assert minmax.seconds_to_quantize is not None and minmax.difference is not None
    calls: list[object] = []
    again = run(
        tiny, tmp_path / "out", ("first-layers",), roundings=roundings[:1], wrap=lambda *a: calls.append(a) or a[0]
    )
    assert again == [row for row in rows if row.quantizer != "minmax"] and not calls
