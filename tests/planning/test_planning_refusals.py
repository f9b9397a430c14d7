"""What a plan says of weights that it need not read, of weights that are not there, and of budgets out of reach."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.errors import BudgetError
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import make_plan, measure_for_plan, resolve
from alphaq.sensitivity.methods import METHODS
from conftest import DATA, Ran, random_model

Run = Callable[..., Ran]
BY_SHAPES = [name for name, method in METHODS.items() if method.by_shapes]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose down projections have rows of 96 weights, no multiple of 256."""
    folder = tmp_path_factory.mktemp("odd")
    sizes = dict(hidden_size=256, moe_intermediate_size=96, shared_expert_intermediate_size=96, num_hidden_layers=2)
    random_model("qwen2_moe", vocab_size=4096, **sizes).bfloat16().save_pretrained(folder, save_original_format=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "tiny" / name, folder)
    return folder


@pytest.mark.parametrize("method", BY_SHAPES)
def test_an_order_of_places_with_errors_from_a_formula_reads_headers_only(
    save_family: Callable[..., Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And plans what measured errors would, since they decide nothing."""
    config = PlanConfig(budget=Budget(bits=3.3), method=method, choices="2,3,4")
    checkpoint = open_checkpoint(save_family("olmoe"))
    request, measured = (resolve(config.model_copy(update={"noise": noise})) for noise in ("analytic", "measured"))
    expected = make_plan(checkpoint, measured, measure_for_plan(checkpoint, measured))
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "file", lambda *_: pytest.fail("a weight was read"))
        plan = make_plan(checkpoint, request, measure_for_plan(checkpoint, request))
    assert plan.choices == expected.choices and plan.size_bytes == expected.size_bytes
    assert plan.alpha == {} and plan.neutral == {}
    assert all(0 < error < 1 for error in plan.expected_error.values())


def test_a_count_of_whole_bits_takes_no_fractions(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    config = PlanConfig(
        budget=Budget(bits=2), method="distortion", choices="t2,t2.75", unweighted=True, noise="analytic"
    )
    with pytest.raises(BudgetError, match=r"t2\.75 has a fraction"):
        make_plan(checkpoint, request := resolve(config), measure_for_plan(checkpoint, request))


def test_what_was_not_read_serves_no_method_that_needs_it(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    by_places, by_errors = (
        resolve(PlanConfig(budget=Budget(bits=3), method=method, noise="analytic")) for method in ("uniform", "alphaq")
    )
    found = measure_for_plan(checkpoint, by_places)
    with pytest.raises(BudgetError, match=r"--method alphaq needs the weights"):
        make_plan(checkpoint, replace(by_errors, choices=found.evidence.choices), found)


def test_a_report_of_a_plan_that_read_nothing_can_be_made(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    plan = tmp_path / "p.json"
    assert alphaq("plan", tiny, "--bits", "3", "--method", "uniform", "--noise", "analytic", "-o", plan).code == 0
    ran = alphaq("report", plan, "-o", tmp_path / "r.html")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("share", ["all", "one"])
def test_weights_of_zeros_are_counted(
    alphaq: Run, save_family: Callable[..., Path], tmp_path: Path, share: str
) -> None:
    folder = Path(shutil.copytree(save_family("olmoe"), tmp_path / "m"))
    plan = ("plan", folder, "--bits", "3", "--method", "distortion", "--workers", "1")
    assert "zeros" not in alphaq(*plan).err
    planned = [matrix.tensor for matrix in open_checkpoint(folder).planned]
    empty = planned if share == "all" else planned[5:6]
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        save_file({k: torch.zeros_like(v) if k in empty else v for k, v in held.items()}, path, {"format": "pt"})
    ran = alphaq(*plan)
    said = ran.err.replace("\n", " ")
    assert ran.code == 0 and f"warning: {len(empty)} of 36 planned matrices hold nothing but zeros, {empty[0]}" in said


def test_the_least_budget_names_what_rows_are_stored_as_and_a_method_that_can_do_with_less(
    alphaq: Run, odd: Path
) -> None:
    options = ("--engine", "llama.cpp", "--bits", "3", "--noise", "analytic")
    ran = alphaq("plan", odd, *options, "--method", "uniform")
    said = ran.err.replace("\n", " ")
    assert ran.code == 2
    assert "16 matrices at Q2_K and 8 at Q8_0 (rows of 96 weights are not whole Q2_K blocks of 256)" in said
    assert "--method distortion" in said and "narrower" not in said
    assert alphaq("plan", odd, *options, "--method", "distortion", "--workers", "1").code == 0


def test_what_no_file_can_hold_is_told_before_the_budget(alphaq: Run, save_family: Callable[..., Path]) -> None:
    ran = alphaq("plan", save_family("mixtral"), "--engine", "llama.cpp", "--bits", "0.5", "--method", "uniform")
    assert ran.code == 2 and "no tokenizer that llama.cpp can be given" in ran.err.replace("\n", " ")
