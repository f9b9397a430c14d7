"""A model in trellis codes, by the command line: planned, written, verified, run, coded, saved, not sliced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import resolve
from alphaq.writing import storing
from conftest import DATA, Ran
from families import plain_copy

MODEL = DATA / "tiny"
ALL = ("--choices", "trellis", "--noise", "analytic")


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return torch.as_tensor(model(ids).logits)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trellis") / "out"
    checkpoint = open_checkpoint(MODEL)
    request = resolve(PlanConfig(budget=Budget(bpw=2.1), choices="t1.5,t2,t2.25,t3,4g128s", method="alphaq"))
    plan = pipeline.make_plan(checkpoint, request, pipeline.measure_for_plan(checkpoint, request))
    pipeline.quantize(checkpoint, plan, out)
    return out


def test_the_budget_holds_to_the_byte_and_every_tensor_is_as_planned(written: Path, alphaq: Callable[..., Ran]) -> None:
    plan = Plan.read(written / "plan.json")
    assert sum(path.stat().st_size for path in written.glob("*.safetensors")) == plan.size_bytes
    used = {plan.choices[name] for name in plan.assignment}
    assert len({text for text in used if text.startswith("t")}) >= 2
    assert plan.bits_per_weight is not None and 1.95 < plan.bits_per_weight <= 2.1
    assert plan.average_bits == pytest.approx(plan.bits_per_weight, abs=0.25)  # fractions count
    verified = alphaq("verify", written, "--reference", MODEL, "--json")
    assert verified.code == 0 and verified.json["ok"], verified.err


def test_it_runs_as_the_weights_that_it_stands_for_and_can_be_saved(written: Path, tmp_path: Path) -> None:
    model = load(written)
    wanted = logits(load(plain_copy(open_checkpoint(MODEL), written, tmp_path / "plain")))
    found = logits(model)
    assert float((found - wanted).abs().max()) < 1e-3 * float(wanted.std())
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), found)


def test_coding_it_wins_nothing_and_loses_nothing(written: Path, alphaq: Callable[..., Ran], tmp_path: Path) -> None:
    ran = alphaq("recode", written, "-o", tmp_path / "coded", "--codec", "zstd")
    assert ran.code == 0, ran.err
    assert alphaq("recode", tmp_path / "coded", "-o", tmp_path / "plain", "--codec", "none").code == 0
    for file in written.glob("*.safetensors"):
        assert (tmp_path / "plain" / file.name).read_bytes() == file.read_bytes()


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    written: Path, alphaq: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("quantize", MODEL, "--plan", written / "plan.json", "-o", tmp_path / "out", "--workers", 1)
    real, earlier = storing.store, []

    def store(checkpoint: Any, task: Any) -> Any:
        earlier.append(task.earlier)
        if len(earlier) == 20:
            raise OSError("no space")
        return real(checkpoint, task)

    monkeypatch.setattr(storing, "store", store)
    assert alphaq(*command).code == 2
    assert alphaq(*command).code == 0
    assert sum(one is not None for one in earlier[20:]) == 19  # which are not searched again
    for file in written.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_workers_change_no_byte(written: Path, alphaq: Callable[..., Ran], tmp_path: Path) -> None:
    plan = ("--plan", written / "plan.json")
    assert alphaq("quantize", MODEL, *plan, "-o", tmp_path / "out", "--workers", 2).code == 0
    for file in written.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_slice_is_refused_with_what_to_do_instead(written: Path, alphaq: Callable[..., Ran], tmp_path: Path) -> None:
    ran = alphaq("slice", written, "-o", tmp_path / "less", "--bpw", 1.6)
    assert ran.code == 2 and not (tmp_path / "less").exists()
    assert "in trellis codes" in ran.err and "--choices t1.5,t2,t2.25,t3,4g128s -o OUT" in ran.err


def test_limits_count_fractions(alphaq: Callable[..., Ran], tmp_path: Path) -> None:
    limits = ("--min-bits", 1.75, "--max-bits", 2.5)
    ran = alphaq("plan", MODEL, "--bpw", 2.2, *ALL, "--method", "alphaq", *limits, "-o", tmp_path / "plan.json")
    assert ran.code == 0, ran.err
    plan = Plan.read(tmp_path / "plan.json")
    assert {plan.choices[name] for name in plan.assignment} <= {"t1.75", "t2", "t2.25", "t2.5"}
    assert all(plan.choices[name] == f"t{bits:g}" for name, bits in plan.assignment.items())
    assert sum(bits * count for bits, count in plan.histogram.items()) == sum(plan.assignment.values())
    assert plan.average_bits == pytest.approx(sum(plan.assignment.values()) / len(plan.assignment), abs=0.25)
    assert any(bits % 1 for bits in plan.histogram)


def test_the_widest_rate_is_told_with_its_fraction(alphaq: Callable[..., Ran], tmp_path: Path) -> None:
    asked = ("--choices", "t2,t2.75", "--noise", "analytic", "--method", "alphaq")
    ran = alphaq("plan", MODEL, "--bits", 2.9, *asked, "-o", tmp_path / "plan.json")
    assert ran.code == 0 and "no choice offered is wider than 2.75 bits" in ran.err
    assert "wider" not in alphaq("plan", MODEL, "--bits", 2.5, *asked, "-o", tmp_path / "other.json").err


def test_uniform_takes_whole_rates(alphaq: Callable[..., Ran], tmp_path: Path) -> None:
    ran = alphaq("plan", MODEL, "--bits", 2, *ALL, "--method", "uniform", "-o", tmp_path / "plan.json")
    assert ran.code == 0, ran.err
    plan = Plan.read(tmp_path / "plan.json")
    assert {plan.choices[name] for name in plan.assignment} == {"t2"}
