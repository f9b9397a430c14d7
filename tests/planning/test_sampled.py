"""Plans of a share of a model's bytes: which rows are read, and how near they come to plans of all bytes."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from alphaq.checkpoint.ranges import ranges_of
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.errors import BudgetError
from alphaq.measuring.cache import Cache
from alphaq.measuring.resources import Resources
from alphaq.measuring.rows import draw_rows, stack_of
from alphaq.nouns.option import settings_of
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import Measurements, make_plan, measure_for_plan, resolve
from alphaq.planning.sampled import routing_uses
from families import random_family

FEW = {"engine": "native", "method": "typical", "choices": "2,3,4,8"}


@pytest.fixture(scope="module")
def opened(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


def measured(
    checkpoint: Checkpoint, share: float | None, resources: Resources = Resources(), **changes: str
) -> Measurements:
    config = PlanConfig(budget=Budget(size_bytes=2**40), share=share, **FEW | changes)
    return measure_for_plan(checkpoint, resolve(config), resources=resources, settle=False)


def test_runs_take_the_share_that_was_asked_for_and_are_always_the_same(opened: Checkpoint) -> None:
    for share in (0.01, 0.05, 0.3):
        sample = draw_rows(opened, share)
        assert 0.9 * share < sample.extent.rows / sample.extent.matrices <= share
        assert sample.matrices == draw_rows(opened, share).matrices
        assert {stack_of(matrix) for matrix in opened.matrices if matrix.role.value != "router"} == sample.runs.keys()
        for one, other in combinations(sorted(sample.row_ranges), 2):  # each byte once
            assert one.begin + one.nbytes <= other.begin or one.shard != other.shard


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_a_run_is_its_rows_of_the_matrix(family: str, tmp_path: Path) -> None:
    random_family(family).bfloat16().save_pretrained(tmp_path / family)
    checkpoint = open_checkpoint(tmp_path / family)
    named = {matrix.name: matrix for matrix in checkpoint.matrices}
    for run in draw_rows(checkpoint, 0.05).matrices:
        name, _, rows = run.name.partition("[")
        first, last = map(int, rows.rstrip("]").split(":")) if rows else (0, run.shape[0])
        assert torch.equal(checkpoint.read(run), checkpoint.read(named[name])[first:last])
        assert sum(one.nbytes for one in ranges_of(checkpoint, run)) == checkpoint.place(run)[1]


def test_a_plan_of_one_percent_loses_hardly_more_by_all_bytes(opened: Checkpoint) -> None:
    few, full = measured(opened, 0.01), measured(opened, None)
    exact = dict(zip(full.evidence.names, full.evidence.relative_errors, strict=True)) | full.joined
    assert np.array_equal(few.evidence.weights, full.evidence.weights)
    for size in (5_500_000, 7_000_000):
        config = PlanConfig(budget=Budget(size_bytes=size), **FEW)
        plans = [make_plan(opened, resolve(config), one) for one in (few, full)]
        table = plans[1].table
        assert table is not None and set(table.losses) == set(exact)
        losses = [
            sum(table.losses[unit][table.choices.index(plan.choices[unit])] or 0.0 for unit in table.losses)
            for plan in plans
        ]
        assert losses[1] <= losses[0] <= 1.1 * losses[1]
        assert plans[0].objective == pytest.approx(losses[0], rel=0.1)
        assert plans[0].sampling_error and plans[1].sampling_error == 0


def test_what_errors_of_few_rows_leave_open_is_told(opened: Checkpoint) -> None:
    few, full = measured(opened, 0.01), measured(opened, None)
    assert few.deviations is not None
    stacks = np.array([stack_of(matrix) for matrix in few.evidence.matrices])
    missed = []
    for stack in dict.fromkeys(stacks):
        own = stacks == stack
        truth = full.evidence.errors[own].sum(axis=0) / full.evidence.energies[own].sum()
        missed.append((few.evidence.relative_errors[own][0] / truth - 1) / few.deviations[own][0])
    assert 0.5 < np.sqrt(np.mean(np.square(missed))) < 1.5


@pytest.mark.slow
def test_runs_that_no_choice_is_measured_on_count_for_nothing(
    opened: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alphaq.measuring.rows.RUN_BYTES", 1 << 11)
    monkeypatch.setattr("alphaq.planning.sampled.SLOW_RUNS", 4)
    with Cache(tmp_path, {}) as cache:
        quick, slow = (
            measured(opened, 0.05, Resources(cache=one), engine="llama.cpp", choices=choices).evidence
            for one, choices in ((cache, "Q4_K"), (None, "IQ3_S"))
        )
        known = measured(opened, 0.05, Resources(cache=cache), engine="llama.cpp", choices="IQ3_S").evidence
    assert np.array_equal(slow.energies, known.energies) and not np.array_equal(slow.energies, quick.energies)
    assert slow.energies.sum() == pytest.approx(quick.energies.sum(), rel=0.05)


@pytest.mark.parametrize(
    ("family", "words"), [("flex_olmo", "see more than a norm"), ("llama4", "something of its own in its experts")]
)
def test_where_routers_alone_tell_nothing_experts_count_alike_and_why(family: str, words: str, tmp_path: Path) -> None:
    random_family(family).bfloat16().save_pretrained(tmp_path / family)
    checkpoint = open_checkpoint(tmp_path / family)
    found = measured(checkpoint, 0.05)
    assert found.evidence.prior == {} and found.unrouted and words in found.unrouted


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "fisher"}, "needs all weights (fisher)"),
        ({"method": "alphaq"}, "needs all weights (alpha)"),
        ({"noise": "analytic"}, "Drop --noise analytic"),
        ({"codec": "zstd", "choices": None}, "--codec, --unweighted and --imatrix go by whole matrices"),
    ],
)
def test_what_a_share_cannot_tell_is_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(BudgetError, match=words.replace("(", r"\(").replace(")", r"\)")):
        resolve(PlanConfig(budget=Budget(bits=2.5), share=0.01, **{**FEW, **changes}))


@pytest.mark.parametrize("family", ["gpt_oss", "phimoe"])
def test_the_prior_reads_nothing_that_is_not_told(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_family(family).bfloat16().save_pretrained(tmp_path / family)
    checkpoint, read = open_checkpoint(tmp_path / family), set()
    whole = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: (read.add(name), whole(self, name))[1])
    uses, why = routing_uses(checkpoint, Resources())
    assert uses and why is None and read
    assert read <= {*draw_rows(checkpoint, 0.05).whole}


def test_gate_and_up_of_one_slice_are_drawn_together(tmp_path: Path) -> None:
    random_family("llama4").bfloat16().save_pretrained(tmp_path / "llama4")
    checkpoint = open_checkpoint(tmp_path / "llama4")
    drawn: dict[tuple[int | None, str | None], set[int | None]] = {}
    for run in draw_rows(checkpoint, 0.3).matrices:
        if run.index is not None:
            drawn.setdefault((run.layer, run.projection), set()).add(run.expert)
    assert all(drawn[layer, "gate"] == drawn[layer, "up"] for layer, part in drawn if part == "gate")
    assert "gate" in {part for _, part in drawn}


@pytest.mark.parametrize("share", [0.01, 0.07, 1 / 3, 0.123456789, 1.0])
def test_a_share_is_shown_as_it_is(share: float) -> None:
    setting = settings_of(PlanConfig)["share"]
    assert setting.parse(setting.words(share)[1]) == share


def test_the_default_of_a_share_is_a_typical_model() -> None:
    assert resolve(PlanConfig(budget=Budget(bits=2.5), share=0.01)).config.method == "typical"
