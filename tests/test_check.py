"""The default's plan is held against uniform bits on the model's own writing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from alphaq import pipeline
from alphaq.cache import Cache
from alphaq.calibration.tokens import random_windows
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.cli import app
from alphaq.config import Budget, PlanConfig
from alphaq.measurement import restored
from alphaq.planning import check, checked_plan, make_plan, measure_for_plan, resolve
from alphaq.planning.check import divergences
from alphaq.records import Choice, Plan, Role
from alphaq.runtime.loading import load_model
from alphaq.sensitivity import methods
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
    rounding = partial(restored, source, quantizer="rtn", importance={})
    nothing: dict[str, Choice] = {}
    itself, quantized = divergences(source, IDS, [nothing, plan.every_choice()], rounding)
    assert itself == pytest.approx(0, abs=1e-6)
    assert quantized == pytest.approx(loaded_divergence(tmp_path / "model", tmp_path / "out", IDS), rel=1e-3)


def test_divergence_sees_embedding_and_head(tmp_path: Path) -> None:
    source = open_checkpoint(save_runnable(tmp_path / "model", "qwen2_moe"))
    rounding = partial(restored, source, quantizer="rtn", importance={})
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
    with Cache(cache, {}) as kept:
        return checked_plan(checkpoint, request, measure_for_plan(checkpoint, request, cache=kept), kept)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measured")


def test_good_plan_stays_and_says_what_it_was_held_against(checkpoint: Checkpoint, measured: Path) -> None:
    plan = made(checkpoint, measured)
    assert plan.check is not None and plan.check.by == "kl" and plan.check.taken == "plan"
    assert 0 < plan.check.plan < plan.check.uniform and plan.check.tokens == 2 * 255
    unchecked = made(checkpoint, measured, check=False)
    assert unchecked.check is None and unchecked.choices == plan.choices
    assert Plan.from_json(plan.to_json(), "plan") == plan


def test_ruinous_plan_is_given_up_for_uniform_bits(checkpoint: Checkpoint, measured: Path, ruinous: None) -> None:
    plan, unchecked = made(checkpoint, measured), made(checkpoint, measured, check=False)
    uniform = made(checkpoint, measured, method="uniform")
    assert plan.check is not None and plan.check.taken == "uniform" and plan.check.plan > plan.check.uniform
    assert plan.choices == uniform.choices != unchecked.choices
    assert plan.size_bytes == uniform.size_bytes
    assert plan.config["method"] == "auto" and plan.config["check"]  # the command that gives it again


def test_large_model_is_judged_by_moves_of_the_stream(
    checkpoint: Checkpoint, measured: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(check, "MOST_WEIGHTS", 1)
    monkeypatch.setattr(check, "stream_forward", lambda *_, **__: pytest.fail("run"))
    plan = made(checkpoint, measured)
    assert plan.check is not None and plan.check.by == "moves" and plan.check.taken == "plan"
    request.getfixturevalue("ruinous")
    plan = made(checkpoint, measured)
    assert plan.check is not None and plan.check.taken == "uniform"


def test_only_the_default_is_checked(checkpoint: Checkpoint, measured: Path) -> None:
    assert made(checkpoint, measured, method="router").check is None


def test_user_is_told(tiny: Path, ruinous: None, tmp_path: Path) -> None:
    command = ["plan", str(tiny), "--bits", "2.5", "-o", str(tmp_path / "plan.json")]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    assert "uniform bits are taken, since they change the model less (KL on 510 tokens" in told.output.replace(
        "\n", " "
    )
    assert json.loads((tmp_path / "plan.json").read_text())["check"]["taken"] == "uniform"
    quiet = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "other.json"), "--no-check"])
    assert quiet.exit_code == 0 and "uniform" not in quiet.output
    assert json.loads((tmp_path / "other.json").read_text())["check"] is None
