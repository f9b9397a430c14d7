import csv
import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.profiles import ENGINES
from alphaq.errors import AlphaQError, BudgetError, OutputError, StatsError
from alphaq.evaluation.fidelity import Remembered, WindowScore, paired_bootstrap, windows
from alphaq.measuring.cache import Cache
from alphaq.measuring.resources import Resources
from alphaq.nouns.plan import Plan
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.settings import Budget, PlanConfig, Rule
from alphaq.planning import checked_plan, make_plan, measure_for_plan, measure_for_plans, plain_size, resolve
from alphaq.sensitivity.methods import METHODS as METHODS_KNOWN
from alphaq.trials import compare as comparison
from alphaq.trials import trial as trials
from alphaq.trials.compare import Comparison, compare, variant_of
from alphaq.trials.results import Row
from alphaq.work.workers import silent
from alphaq.writing.rounding import Rounding
from conftest import DATA

TEXTS = sorted((DATA / "texts").glob("*.txt"))[:2]
CONFIG = PlanConfig(budget=Budget(bits=2), choices="2,3")
METHODS = ("uniform", "first-layers", "distortion")
slow = pytest.mark.slow


def run(tiny: Path, out: Path, methods: tuple[str, ...] = METHODS, **settings: Any) -> list[Row]:
    resources = Resources(wrap=settings.pop("wrap", silent))
    scoring = Scoring(texts=TEXTS, max_tokens=256, window=settings.pop("window", 64))
    comparison = Comparison(methods, [2.0, 2.5], CONFIG, **settings)
    return compare(open_checkpoint(tiny), comparison, scoring, out, resources)


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
    monkeypatch.setattr(comparison, "measure_for_plans", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(trials, "pair_of", lambda *_: pytest.fail("loaded again"))
    assert run(tiny, out) == rows


def test_interrupted_comparison_goes_on_to_the_same_figures(
    finished: tuple[Path, list[Row]], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, plans = trials.quantize, []

    def stopping(checkpoint: Any, plan: Any, *args: Any, **kwargs: Any) -> Any:
        plans.append(plan.choices)
        if len(plans) == 2:
            raise KeyboardInterrupt
        return real(checkpoint, plan, *args, **kwargs)

    monkeypatch.setattr(trials, "quantize", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "out")
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) > 2
    again = run(tiny, tmp_path / "out")

    def figures(rows: list[Row]) -> list[tuple[Any, ...]]:
        return [(row.method, row.bits, row.size_bytes, row.perplexity, row.kl, row.difference) for row in rows]

    assert figures(again) == figures(finished[1])
    distinct = {json.dumps(choices, sort_keys=True) for choices in plans}
    assert len(plans) == len(distinct) + 1  # the one that was stopped is done again, equal plans are not


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache of what `plan` measures, apart from the comparison's."""
    return tmp_path_factory.mktemp("own")


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(("auto", "uniform"), marks=slow),
        pytest.param(("uniform", "auto"), marks=slow),
        pytest.param(("mint", "auto", "uniform"), marks=slow),
    ],
)
def test_plans_do_not_depend_on_order_or_company_and_are_those_of_plan(
    order: tuple[str, ...], tiny: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Plan] = []

    def scored(trials: object, plan: Plan | None, rounding: Rounding | None) -> dict[str, Any]:
        seen.extend([] if plan is None else [plan])
        return {"digest": "", "scores": {"text": [[1, 1.0, 0.0, 1.0, 1.0, 1.0]]}, "seconds_to_quantize": 0.0}

    def plain(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1]}

    monkeypatch.setattr(trials, "pair_of", lambda *_: (SimpleNamespace(dtype="", device="", config=None), None, plain))
    monkeypatch.setattr(trials.Trials, "run", scored)
    checkpoint = open_checkpoint(tiny)
    with Cache(tmp_path / "cache", {}) as cache:  # --no-cache measures the same, only later again
        rows = compare(
            checkpoint, Comparison(order, [2.5]), Scoring(texts=TEXTS), tmp_path / "out", Resources(cache=cache)
        )
        for row in rows[1:]:
            config = PlanConfig(budget=Budget(size_bytes=row.budget_bytes), method=row.method)
            with Cache(own, {}) as kept:
                found = measure_for_plan(checkpoint, resolve(config), resources=Resources(cache=kept))
                alone = checked_plan(checkpoint, resolve(config), found, Resources(cache=kept))
            made = next(plan for plan in seen if plan.config.method == row.method)
            # Alone it is measured only as far as its own budget asks for, so that numbers differ in their last digits.
            assert (made.choices, made.size_bytes) == (alone.choices, alone.size_bytes)
    assert [plan.config.method for plan in seen] == [*["uniform"] * ("uniform" not in order), *order]


@pytest.mark.parametrize("engine", [name if name == "native" else pytest.param(name, marks=slow) for name in ENGINES])
def test_measuring_for_all_methods_together_gives_each_what_it_measures_alone(
    engine: str, save_family: Callable[..., Path], tmp_path: Path
) -> None:
    """Every method that goes by errors, first and last; whatever else is offered beside it."""
    checkpoint = open_checkpoint(save_family("qwen2_moe") if engine != "llama.cpp" else DATA / "tiny")
    size = plain_size(checkpoint, resolve(PlanConfig(budget=Budget(bits=4), engine=engine, method="uniform")), 4.5)
    config = PlanConfig(budget=Budget(size_bytes=size), engine=engine)
    requests = {}
    for name, method in METHODS_KNOWN.items():
        with suppress(AlphaQError):  # methods that engines or their choices have no room for
            requests[name] = resolve(config.model_copy(update={"method": name})) if not method.needs_text else None
    requests = {name: request for name, request in requests.items() if request is not None}
    assert {"auto", "uniform", "distortion", "mint"} <= requests.keys()
    with Cache(tmp_path / "cache", {}) as cache:
        alone = {
            name: measure_for_plan(checkpoint, one, resources=Resources(cache=cache), check_budget=False)
            for name, one in requests.items()
        }
    with Cache(tmp_path / "other", {}) as cache:
        for names in (list(requests), list(requests)[::-1]):
            found = measure_for_plans(
                checkpoint, {n: requests[n] for n in names}, resources=Resources(cache=cache), check_budget=False
            )
            for name, request in requests.items():
                one, other = found[name], alone[name]
                assert (
                    one.evidence.choices == other.evidence.choices and one.measured == other.measured == request.offered
                )
                np.testing.assert_array_equal(one.evidence.errors, other.evidence.errors)
                with suppress(BudgetError):  # --min-sqnr may leave nothing, then for both
                    made, planned = make_plan(checkpoint, request, other), make_plan(checkpoint, request, one)
                    assert (planned.choices, planned.size_bytes) == (made.choices, made.size_bytes)
                    assert planned.objective == pytest.approx(made.objective, rel=1e-12)  # a sum's last digit differs


@slow
def test_choices_that_were_not_measured_cannot_be_planned_with(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    narrow = resolve(PlanConfig(budget=Budget(bits=2.5), choices="2,3"))
    found = measure_for_plan(checkpoint, narrow)
    wide = resolve(PlanConfig(budget=Budget(bits=2.5), choices="2,3,2g32", pins=(Rule(pattern="down", value="3"),)))
    with pytest.raises(BudgetError, match="2g32 was not measured"):
        make_plan(checkpoint, wide, found)
    pinned = resolve(PlanConfig(budget=Budget(bits=2.5), choices="2", pins=(Rule(pattern="down", value="3"),)))
    asked_for_more = replace(narrow, choices=pinned.choices)
    with pytest.raises(BudgetError, match="3g128 was not measured"):  # its errors are known of pinned matrices only
        make_plan(checkpoint, asked_for_more, measure_for_plan(checkpoint, pinned))


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


def test_only_methods_in_nats_drop_experts() -> None:
    base = PlanConfig(budget=Budget(bits=2), drop=True, max_drop=0.5)
    requests = comparison._requests(base, ["auto", "uniform"], None)
    assert {name: (one.config.drop, one.config.max_drop) for name, one in requests.items()} == {
        "auto": (True, 0.5),
        "uniform": (False, 0.25),
    }


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

    cut = windows(tokenizer, "x" * 20, length=4, max_tokens=6, skip_tokens=10, bos=False)
    assert [part.tolist() for part in cut.parts] == [[[10, 11, 12, 13]], [[14, 15]]]


@pytest.mark.parametrize("name", ["notes.txt", "results.jsonl"])
def test_folder_of_something_else_is_left_alone(tiny: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "blocks").mkdir()
    (tmp_path / name).write_text("mine\n")
    with pytest.raises(OutputError, match="holds no comparison"):
        run(tiny, tmp_path)
    assert (tmp_path / name).read_text() == "mine\n" and (tmp_path / "blocks").is_dir()


def test_infeasible_budget_costs_its_own_row_only(tiny: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"min_bits": (Rule(pattern="*", value="3"),)})
    comparison = Comparison(("distortion",), [2.0, 3.0], config)
    rows = compare(open_checkpoint(tiny), comparison, Scoring(texts=TEXTS, max_tokens=64), tmp_path / "out")
    assert [(row.method, row.bits, bool(row.error)) for row in rows[1:]] == [
        ("uniform", 2.0, True),
        ("distortion", 2.0, True),
        ("uniform", 3.0, False),
        ("distortion", 3.0, False),
    ]


@pytest.mark.slow
def test_quantizers_are_compared_under_the_same_plan(tiny: Path, tmp_path: Path) -> None:
    roundings = [Rounding.of("native", "debiased"), Rounding.of("native", "rtn")]
    rows = run(tiny, tmp_path / "out", ("first-layers",), roundings=roundings)
    assert [(row.method, row.quantizer, row.bits) for row in rows] == [
        ("reference", "", 16.0),
        *(
            (method, quantizer, bits)
            for bits in (2.0, 2.5)
            for method, quantizer in (("uniform", "debiased"), ("first-layers", "debiased"), ("first-layers", "rtn"))
        ),
    ]
    debiased, rtn = rows[-2:]
    assert debiased.size_bytes == rtn.size_bytes and debiased.kl != rtn.kl
    assert rtn.seconds_to_quantize is not None and rtn.difference is not None
    calls: list[object] = []
    again = run(
        tiny, tmp_path / "out", ("first-layers",), roundings=roundings[:1], wrap=lambda *a: calls.append(a) or a[0]
    )
    assert again == [row for row in rows if row.quantizer != "rtn"] and not calls
