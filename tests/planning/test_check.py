"""The default's plan is held against uniform bits on the model's own writing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from alphaq import pipeline
from alphaq.calibration.divergence import divergences
from alphaq.calibration.tokens import model_prefix, random_windows, tokenizer_fault
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.cli.app import app
from alphaq.engines.profiles import ENGINES
from alphaq.errors import PassError
from alphaq.formats.table import parse_choice
from alphaq.measuring.cache import Cache
from alphaq.measuring.measurement import restored
from alphaq.measuring.resources import Resources
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import check, checked_plan, make_plan, measure_for_plan, passes, resolve
from alphaq.quantizers.base import rounder_of
from alphaq.runtime.loading import load_model
from alphaq.sensitivity import methods
from alphaq.simd.sums import squared_distance
from runnable import save_runnable

IDS = random_windows(340, windows=2, length=24)


def loaded_divergence(reference: Path, quantized: Path, ids: torch.Tensor) -> float:
    """KL of two loaded models, in float32."""
    (model, _), (other, _) = load_model(reference, "float32"), load_model(quantized, "float32")
    with torch.no_grad():
        log_p, log_q = (one(ids).logits[:, :-1].log_softmax(-1) for one in (model, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["qwen2_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_divergence_is_that_of_the_files_which_are_written(family: str, tmp_path: Path) -> None:
    source = open_checkpoint(save_runnable(tmp_path / "model", family))
    request = resolve(PlanConfig(budget=Budget(bits=3), group_size=32, method="distortion"))
    plan = make_plan(source, request, measure_for_plan(source, request))
    pipeline.quantize(source, plan, tmp_path / "out")
    rounding = partial(restored, source, quantizer="debiased", importance={})
    nothing: dict[str, Choice] = {}
    itself, quantized = divergences(source, IDS, [nothing, plan.every_choice()], rounding)
    assert itself == pytest.approx(0, abs=1e-6)
    assert quantized == pytest.approx(loaded_divergence(tmp_path / "model", tmp_path / "out", IDS), rel=1e-3)


def test_divergence_sees_embedding_and_head(tmp_path: Path) -> None:
    source = open_checkpoint(save_runnable(tmp_path / "model", "qwen2_moe"))
    rounding = partial(restored, source, quantizer="debiased", importance={})
    names = {role: next(one.name for one in source.with_role(role)) for role in (Role.EMBEDDING, Role.HEAD)}
    kept, *moved = divergences(source, IDS, [{}, *({name: Choice(2, 32)} for name in names.values())], rounding)
    assert kept < 1e-6 < 1e-3 < min(moved)


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


@pytest.fixture
def ruinous(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default whose losses are upside down: what matters least gets the most."""
    right = methods.METHODS["auto"]
    rule: Callable[..., Any] = right.rule  # type: ignore[assignment]

    def inverse(evidence: Any) -> Any:
        importance = rule(evidence).max(axis=1, keepdims=True)
        return evidence.errors / importance**3 * importance.mean() ** 3

    monkeypatch.setitem(methods.METHODS, "auto", replace(right, rule=inverse))


def made(checkpoint: Checkpoint, cache: Path, **settings: Any) -> Plan:
    request = resolve(PlanConfig(**{"budget": Budget(bits=2.5), **settings}))
    with Cache(cache, {}) as opened:
        kept = Resources(cache=opened)
        return checked_plan(checkpoint, request, measure_for_plan(checkpoint, request, resources=kept), kept)


@pytest.fixture(scope="module")
def measured(known_tiny: Path) -> Path:
    return known_tiny


def test_good_plan_stays_and_says_what_it_was_held_against(checkpoint: Checkpoint, measured: Path) -> None:
    plan = made(checkpoint, measured)
    assert plan.check is not None and plan.check.by == "kl" and plan.check.taken == "plan"
    assert 0 < plan.check.plan < plan.check.uniform and plan.check.tokens == 4 * 127
    unchecked = made(checkpoint, measured, check=False)
    assert unchecked.check is None and unchecked.choices == plan.choices
    assert Plan.from_json(plan.to_json(), "plan") == plan


def test_ruinous_plan_is_given_up_for_uniform_bits(checkpoint: Checkpoint, measured: Path, ruinous: None) -> None:
    plan, unchecked = made(checkpoint, measured), made(checkpoint, measured, check=False)
    uniform = made(checkpoint, measured, method="uniform")
    assert plan.check is not None and plan.check.taken == "uniform" and plan.check.plan > plan.check.uniform
    assert plan.choices == uniform.choices != unchecked.choices
    assert plan.size_bytes == uniform.size_bytes
    assert plan.config.method == "auto" and plan.config.check  # the command that gives it again


def without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PassError("No gradient passes.")

    monkeypatch.setattr(passes, "gather_fisher", refuse)


@pytest.mark.slow
def test_without_a_gradient_the_signal_stands_in_and_the_plan_says_so(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_gradient(monkeypatch)
    plan = made(checkpoint, tmp_path, check=False)
    assert plan.prediction is None and plan.unpredicted is not None and "No gradient passes" in plan.unpredicted
    assert plan.choices == made(checkpoint, tmp_path, method="signal").choices
    with pytest.raises(PassError, match="No gradient passes"):
        made(checkpoint, tmp_path, method="fisher")


@pytest.mark.slow
def test_large_model_is_judged_by_moves_of_the_stream(
    checkpoint: Checkpoint, measured: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(check, "MOST_PREDICTED", 1)
    monkeypatch.setattr(check, "divergences", lambda *_, **__: pytest.fail("run"))
    plan = made(checkpoint, measured)
    assert plan.check is None and "predicted KL" in plan.unchecked
    monkeypatch.setattr(check, "MOST_WEIGHTS", 1)
    without_gradient(monkeypatch)
    measured = measured / "signal"
    plan = made(checkpoint, measured)
    assert plan.check is not None and plan.check.by == "moves" and plan.check.taken == "plan"
    request.getfixturevalue("ruinous")
    plan = made(checkpoint, measured)
    assert plan.check is not None and plan.check.taken == "uniform"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "mlx"])
def test_roles_that_share_the_bytes_share_those_of_uniform_bits(
    checkpoint: Checkpoint, measured: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setattr(check, "MARGIN", 0.0)  # so that uniform bits are what is taken
    size = Budget(size_bytes=6_000_000)
    uniform = made(checkpoint, measured, engine=engine, budget=size, choices="2,3,4,6,8")
    assert uniform.check is not None and uniform.check.taken == "uniform"
    roles = {one.name: one.role for one in checkpoint.matrices}
    assert {Role.EMBEDDING, Role.HEAD, Role.ATTENTION} <= {roles[name] for name in uniform.choices}
    widths = sorted({choice.bits for choice in uniform.every_choice().values()})
    assert widths in ([2, 3], [3, 4], [4, 6]) and 5_900_000 < (uniform.size_bytes or 0) <= 6_000_000


def test_only_the_default_is_checked(checkpoint: Checkpoint, measured: Path) -> None:
    assert made(checkpoint, measured, method="router").check is None


@pytest.mark.usefixtures("knows_tiny")
def test_user_is_told(tiny: Path, ruinous: None, tmp_path: Path) -> None:
    command = ["plan", str(tiny), "--bits", "2.5", "-o", str(tmp_path / "plan.json")]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    assert "uniform bits are taken, since they change the model less (KL on 508 tokens" in told.output.replace(
        "\n", " "
    )
    assert json.loads((tmp_path / "plan.json").read_text())["check"]["taken"] == "uniform"
    quiet = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "other.json"), "--no-check"])
    assert quiet.exit_code == 0 and "uniform" not in quiet.output
    assert json.loads((tmp_path / "other.json").read_text())["check"] is None


@pytest.mark.parametrize(
    ("engine", "choice"),
    [
        ("native", "3g64"),
        ("native", "4g32s"),
        ("mlx", "3g64"),
        ("vllm", "4g64s"),
        ("gptqmodel", "2g32"),
        ("llama.cpp", "Q3_K"),
    ],
)
def test_what_stands_in_is_as_far_away_as_the_quantizer_says(checkpoint: Checkpoint, engine: str, choice: str) -> None:
    """By the engine's own way to restore: MLX adds its offsets, others take them for zero points."""
    quantizer, matrix, parsed = ENGINES[engine].quantizer, checkpoint.planned[7], parse_choice(choice)
    weight = checkpoint.read(matrix)
    found = restored(checkpoint, matrix, parsed, quantizer, {})
    error = rounder_of(quantizer)(weight, parsed, matrix.name).squared_error
    assert squared_distance(weight, found) == pytest.approx(error, rel=0.01)


def test_trellis_codes_are_held_against_uniform_rates(checkpoint: Checkpoint, measured: Path) -> None:
    plan = made(checkpoint, measured, budget=Budget(bpw=2.2), choices="t1.5,t2,2,4,8")
    assert plan.unchecked is None and plan.check is not None and 0 < plan.check.plan < plan.check.uniform


@pytest.mark.slow
def test_ruinous_plan_of_trellis_codes_is_given_up(checkpoint: Checkpoint, measured: Path, ruinous: None) -> None:
    plan = made(checkpoint, measured, choices="t1,t2,t2.25,t3")
    assert plan.check is not None and plan.check.taken == "uniform"
    assert {plan.choices[name] for name in plan.assignment} == {"t2.25", "t3"}  # of 2.5 bits


def test_plan_that_nothing_stands_beside_says_why(checkpoint: Checkpoint, measured: Path) -> None:
    plan = made(checkpoint, measured, choices="3g64,2g128-slim")
    assert plan.check is None and plan.unchecked is not None and "no uniform bits" in plan.unchecked
    layers = made(checkpoint, measured, per_layer=True)
    assert layers.check is None and layers.unchecked is not None and "each layer" in layers.unchecked


@pytest.mark.slow
def test_plan_of_all_roles_is_not_judged_by_what_the_signal_knows_of_experts(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_PREDICTED", 1)
    plan = made(checkpoint, tmp_path, engine="llama.cpp", budget=Budget(size_bytes=7_500_000), choices="Q3_K,Q4_K,Q6_K")
    assert plan.check is None and plan.unchecked is not None and "too large" in plan.unchecked


@pytest.mark.slow
def test_damaged_verdict_in_the_cache_is_made_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plan = made(checkpoint, tmp_path)
    (kept,) = tmp_path.glob("*/check-*.json")
    for damage in ("", "[1.0]", '{"a": 1}'):
        kept.write_text(damage)
        assert made(checkpoint, tmp_path) == plan


@pytest.mark.slow
def test_tokenizer_that_its_library_cannot_take_does_not_stop_planning(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    checkpoint = open_checkpoint(folder)
    assert model_prefix(checkpoint) == () and tokenizer_fault(checkpoint)
    assert tokenizer_fault(open_checkpoint(tiny)) is None
    told = CliRunner().invoke(app, ["plan", str(folder), "--bits", "2.5", "--no-check"])
    assert told.exit_code == 0 and "tokenizer cannot be loaded" in told.output
