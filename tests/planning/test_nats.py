"""Losses in nats: what a plan foretells, and where it must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.formats.table import parse_choice
from alphaq.measuring.cache import Cache
from alphaq.measuring.resources import Resources
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget, PlanConfig, Rule
from alphaq.planning import Measurements, Request, checked_plan, make_plan, measure_for_plan, resolve
from alphaq.quantizers.rounded import STREAM_SHARE, ErrorWeights, SourceMatrix
from conftest import Ran


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


@pytest.fixture(scope="module")
def kept(known_tiny: Path) -> Path:
    return known_tiny


def measured(checkpoint: Checkpoint, kept: Path, settle: bool = True, **settings: Any) -> tuple[Request, Measurements]:
    request = resolve(PlanConfig(**{"budget": Budget(bits=3), "check": False, **settings}))
    with Cache(kept, {}) as cache:
        return request, measure_for_plan(checkpoint, request, resources=Resources(cache=cache), settle=settle)


def made(checkpoint: Checkpoint, kept: Path, **settings: Any) -> Plan:
    return make_plan(checkpoint, *measured(checkpoint, kept, **settings))


def test_what_is_foretold_is_the_kl_that_is_measured(checkpoint: Checkpoint, kept: Path) -> None:
    request = resolve(PlanConfig(budget=Budget(bits=3)))
    with Cache(kept, {}) as cache:
        resources = Resources(cache=cache)
        plan = checked_plan(checkpoint, request, measure_for_plan(checkpoint, request, resources=resources), resources)
    assert plan.prediction is not None and plan.check is not None
    assert plan.prediction.low < plan.prediction.kl < plan.prediction.high
    assert plan.prediction.kl / 2 < plan.check.plan < 2 * plan.prediction.kl
    assert plan.objective is not None and plan.prediction.kl > plan.objective  # with the roles outside the budget


def test_a_choice_that_only_a_pin_names_does_not_stop_a_joint_budget(checkpoint: Checkpoint, kept: Path) -> None:
    pin = Rule(pattern="layers.0.*", value="8")
    plan = made(checkpoint, kept, budget=Budget(size_bytes=6_500_000), choices="2,3,4", pins=(pin,))
    assert plan.size_bytes is not None and 6_000_000 < plan.size_bytes <= 6_500_000
    assert plan.prediction is not None


def test_all_roles_of_a_native_plan_share_a_size(checkpoint: Checkpoint, kept: Path) -> None:
    shared = made(checkpoint, kept, budget=Budget(size_bytes=7_100_000))
    fixed = made(checkpoint, kept, budget=Budget(size_bytes=7_100_000), roles="fixed")
    assert shared.prediction is not None and fixed.prediction is not None
    assert shared.prediction.kl < 0.8 * fixed.prediction.kl
    outside = {one.name for role in (Role.EMBEDDING, Role.HEAD) for one in checkpoint.with_role(role)}
    assert outside <= shared.choices.keys() and not outside & fixed.choices.keys()


def test_matrices_that_stand_for_others_are_of_their_role(
    checkpoint: Checkpoint, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts that were not measured count as those that were do, whatever the embedding counts."""
    monkeypatch.setattr("alphaq.planning.samples.SAMPLE_MEMBERS", 2)
    settings = {"engine": "mlx", "choices": "2,4", "budget": Budget(size_bytes=6_000_000)}
    _, found = measured(checkpoint, kept, settle=False, **settings)
    fisher, energies = found.evidence.fisher, dict(zip(found.evidence.names, found.evidence.energies, strict=True))
    assert fisher is not None
    counted = np.array([found.harms[n] / (0.5 * fisher.matrices[n].mean * energy) for n, energy in energies.items()])
    values, times = np.unique(counted.round(9), return_counts=True)
    mean = values[times.argmax()]
    assert times.max() == len(energies) - 2 * 12 and mean == pytest.approx(values[values != mean].mean(), rel=1e-6)


def test_without_measured_errors_roles_are_weighed_and_nothing_is_foretold(checkpoint: Checkpoint, kept: Path) -> None:
    plan = made(checkpoint, kept, budget=Budget(size_bytes=7_500_000), noise="analytic")
    assert plan.prediction is None
    others = [matrix.name for matrix in checkpoint.matrices if matrix.role is Role.ATTENTION]
    assert max(plan.choice(name).bits for name in others) > 1


def test_measurements_in_nats_serve_other_methods_plainly(checkpoint: Checkpoint, kept: Path) -> None:
    _, found = measured(checkpoint, kept, settle=False)
    request, alone = measured(checkpoint, kept, settle=False, method="distortion")
    lent = make_plan(checkpoint, request, found)
    assert lent.prediction is None
    own = make_plan(checkpoint, request, alone)
    same = np.mean([lent.choices[name] == own.choices[name] for name in own.choices])
    assert same > 0.9


def test_other_widths_outside_the_budget_are_not_foretold_by_what_was_measured(
    checkpoint: Checkpoint, kept: Path
) -> None:
    _, found = measured(checkpoint, kept, settle=False)
    wider = resolve(PlanConfig(budget=Budget(bits=3), attention_bits=8, check=False))
    assert make_plan(checkpoint, wider, found).prediction is None


def test_least_ratio_is_that_of_plain_errors(checkpoint: Checkpoint, kept: Path) -> None:
    plan = made(checkpoint, kept, min_sqnr_db=9.0)
    assert max(plan.expected_error[name] for name in plan.assignment) <= 10**-0.9 * 1.001


@pytest.mark.parametrize("choice", ["2g128", "4g64", "t2"])
def test_errors_of_drawn_rows_are_those_of_the_matrix(checkpoint: Checkpoint, choice: str) -> None:
    (head,) = checkpoint.with_role(Role.HEAD)
    random = np.random.default_rng(0)
    rows, columns = (random.lognormal(0, 1.5, size).astype(np.float32) for size in head.shape)
    counting = ErrorWeights(rows / rows.mean(), columns / columns.mean())
    source = SourceMatrix(checkpoint, head, "debiased", None, counting)
    one = parse_choice(choice)
    enough = STREAM_SHARE * head.parameters
    whole, drawn = source.errors((one,), enough), source.errors((one,), 1 << 17)
    plainly = SourceMatrix(checkpoint, head, "debiased").errors((one,), enough)
    assert whole.deviation == {} and drawn.deviation[one] > 0
    assert whole.plain[one] == pytest.approx(plainly.expected[one], rel=1e-4)
    assert drawn.expected[one] == pytest.approx(whole.expected[one], rel=0.06)
    assert drawn.plain[one] == pytest.approx(whole.plain[one], rel=0.03)
    assert drawn.counted == whole.counted


@pytest.mark.slow
def test_a_slice_by_size_keeps_what_the_artifact_keeps(tiny: Path, alphaq: Callable[..., Ran], tmp_path: Path) -> None:
    big = ("--bits", 4, "--choices", "4g128-nest", "--method", "distortion", "-o", tmp_path / "big")
    assert alphaq("quantize", tiny, *big).code == 0
    ran = alphaq("slice", tmp_path / "big", "--size", "7.3MB", "--no-check", "-o", tmp_path / "small", "--json")
    assert ran.code == 0, ran.err
    plan = Plan.read(tmp_path / "small" / "plan.json")
    assert plan.size_bytes is not None and 7_000_000 < plan.size_bytes <= 7_300_000
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & plan.choices.keys()
