"""How long quantizing takes is said before, where it takes long."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import BudgetError
from alphaq.formats.table import format_of, parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import resolve
from alphaq.planning.scope import Scope
from alphaq.quantizers.ggml import quantize_ggml
from alphaq.quantizers.trellis import quantize_trellis
from alphaq.work.workers import Workers
from alphaq.writing import pace
from alphaq.writing.pace import Pace, in_words, pace_of, seconds_per_weight
from conftest import random_model


def config_of(**settings: object) -> PlanConfig:
    return PlanConfig.model_validate({"budget": Budget(bits=3.0), "engine": "llama.cpp"} | settings)


def test_every_type_s_weights_count_with_its_own_speed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny)
    names = [matrix.name for matrix in checkpoint.planned]
    choices = dict.fromkeys(names, "Q4_K") | {names[0]: "IQ4_XS", names[1]: "16"}
    speeds = {"Q4_K": 1e-6, "IQ4_XS": 1e-3}
    monkeypatch.setattr(pace, "seconds_per_weight", lambda choice, rounder: speeds[str(choice)])
    found = pace_of(checkpoint, Plan(engine="llama.cpp", choices=choices), Workers(2, checkpoint))
    assert found is not None and found.cores == 2
    weights = {matrix.name: matrix.parameters for matrix in checkpoint.planned}
    assert found.seconds[parse_choice("IQ4_XS")] == pytest.approx(1e-3 * weights[names[0]] / 2)
    assert found.seconds[parse_choice("Q4_K")] == pytest.approx(1e-6 * sum(weights[n] for n in names[2:]) / 2)


def test_an_engine_without_slow_types_has_nothing_to_say(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    plan = Plan(engine="native", choices={checkpoint.planned[0].name: "4g128"})
    assert pace_of(checkpoint, plan, Workers(1, checkpoint)) is None


def test_trellis_codes_take_long_enough_to_be_told(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny)
    first, second, *_ = checkpoint.planned
    plan = Plan(engine="native", choices={first.name: "t2.25", second.name: "4g128"})
    monkeypatch.setattr(pace, "seconds_per_weight", lambda choice, rounder: 60 / first.parameters)
    found = pace_of(checkpoint, plan, Workers(2, checkpoint))
    assert found is not None and found.seconds[parse_choice("t2.25")] == pytest.approx(30)
    assert found.note == "quantizing takes about 60 s on 2 cores, 30 s of it for t2.25; --fast leaves them out"


def test_no_more_weights_are_tried_than_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def rounder(weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix:
        tried.append(weight.numel())
        return quantize_trellis(weight[:, :256], choice, name)

    assert seconds_per_weight(parse_choice("t2"), rounder) > 0
    assert set(tried) == {pace.TRIED_WEIGHTS}


def test_a_search_is_slower_than_rounding() -> None:
    slow, quick = (seconds_per_weight(parse_choice(name), quantize_ggml) for name in ("IQ4_XS", "Q8_0"))
    assert slow > 3 * quick > 0


def test_tables_are_built_before_the_clock_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 3.0, 10.0, 12.0, 20.0, 24.0))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(clock))
    calls: list[int] = []

    def rounder(weight: torch.Tensor, choice: Choice, name: str = "matrix") -> QuantizedMatrix:
        calls.append(len(weight))
        return quantize_ggml(weight, choice, name)

    assert seconds_per_weight(parse_choice("Q8_0"), rounder) == 2.0 / pace.TRIED_WEIGHTS
    assert calls == [1, 64, 64, 64]


def test_the_note_names_what_takes_long_and_the_way_out() -> None:
    seconds = {parse_choice("IQ2_S"): 600.0, parse_choice("IQ3_S"): 60.0, parse_choice("Q4_K"): 60.0}
    slow = frozenset({parse_choice("IQ2_S"), parse_choice("IQ3_S")})
    assert Pace(seconds, 2, slow).note == (
        "quantizing takes about 12 min on 2 cores, 11 min of it for IQ2_S, IQ3_S; --fast leaves them out"
    )
    assert Pace({parse_choice("Q4_K"): 30.0}, 1, slow).note == "quantizing takes about 30 s on 1 core"
    assert Pace({parse_choice("IQ2_S"): 5.0}, 1, slow).note is None
    rates = [parse_choice(name) for name in ("t2", "t2.25", "t1.75", "t3")]
    told = Pace(dict(zip(rates, (40.0, 30.0, 20.0, 10.0), strict=True)), 1, frozenset(rates)).note
    assert told is not None and told.endswith("2 min of it for t2, t2.25, t1.75 and 1 more; --fast leaves them out")
    assert in_words(3 * 3600) == "3.0 h"


def test_fast_offers_types_that_are_rounded_quickly() -> None:
    offered = resolve(config_of(fast=True)).offered
    assert {str(choice) for choice in offered} >= {"Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0", "Q4_0"}
    assert not any(format_of(choice).slow(choice) for choice in offered)
    assert any(format_of(choice).slow(choice) for choice in resolve(config_of()).offered)


def test_fast_keeps_slow_types_from_roles_of_their_own_width_too(tmp_path: Path) -> None:
    random_model("mixtral").save_pretrained(tmp_path)  # rows that are no whole Q4_K blocks
    checkpoint = open_checkpoint(tmp_path)
    usual, fast = (set(Scope.of(checkpoint, resolve(config_of(fast=one))).fixed.values()) for one in (False, True))
    assert any(format_of(choice).slow(choice) for choice in usual)
    assert fast and not any(format_of(choice).slow(choice) for choice in fast)


@pytest.mark.parametrize("settings", [{"fast": True}, {"choices": "IQ4_XS"}])
def test_fast_is_no_way_out_where_it_changes_nothing(
    tiny: Path, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny)
    monkeypatch.setattr(pace, "seconds_per_weight", lambda choice, rounder: 1.0)
    plan = Plan(engine="llama.cpp", choices={checkpoint.planned[0].name: "IQ4_XS"}, config=config_of(**settings))
    found = pace_of(checkpoint, plan, Workers(1, checkpoint))
    assert found is not None and found.note is not None and "--fast" not in found.note


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"engine": "mlx"}, "mlx has no choices that take long"),
        ({"choices": "Q4_K,Q6_K"}, "--choices says which"),
        ({"engine": "native", "codec": "zstd"}, "--codec has rates of its own"),
    ],
)
def test_fast_is_refused_where_it_does_nothing(settings: dict[str, object], why: str) -> None:
    with pytest.raises(BudgetError, match=f"--fast leaves out choices that take long, but {why}. Drop it."):
        resolve(config_of(fast=True, **settings))
