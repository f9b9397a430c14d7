import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from alphaq.evaluation.certificate import Certificate, Estimate
from alphaq.nouns.plan import Plan
from alphaq.nouns.target import Reaches, Target
from alphaq.trials import search as searching
from alphaq.trials.search import Curve, descend, rest_bits, smallest_reaching
from conftest import DATA, Ran

Run = Callable[..., Ran]
TEXT = DATA / "texts" / "code.txt"
SCORING = ("--window", 32, "--max-tokens", 128)


@pytest.mark.parametrize("first", range(4, 21))
def test_search_ends_at_the_first_step_that_reaches_and_has_seen_the_one_before_fail(first: int) -> None:
    asked: list[int] = []

    def reaches(step: int) -> bool:
        asked.append(step)
        return step >= first

    assert smallest_reaching(4, 20, reaches) == first
    assert len(asked) == len(set(asked)) <= 6
    assert first == 4 or first - 1 in asked


def test_search_gives_up_at_once_if_the_widest_fails() -> None:
    asked: list[int] = []
    assert smallest_reaching(4, 20, lambda step: bool(asked.append(step))) is None
    assert asked == [20]


def test_search_of_a_bumpy_curve_ends_at_neighbours_of_which_one_fails() -> None:
    reaching = {7, 9, 10, 12, 13, 14, 15, 16}
    found = smallest_reaching(1, 16, reaching.__contains__)
    assert found in reaching and found - 1 not in reaching


def test_what_counts_as_reached_is_as_asked_for() -> None:
    ear = Estimate(value=0.979, low=0.975, high=0.981)
    reached = {reaches: searching.reached(Target(ear=0.98, reaches=reaches), ear) for reaches in get_args(Reaches)}
    assert reached == {"within": True, "estimate": False, "above": False}
    assert searching.reached(Target(ear=0.978, reaches="estimate"), ear)
    assert not searching.reached(Target(ear=0.978, reaches="above"), ear)


@pytest.mark.parametrize(("bpw", "bits"), [(1.2, 4), (3.0, 4), (3.1, 5), (5.0, 6), (7.0, 8), (7.5, 16)])
def test_other_roles_are_a_bit_wider_than_experts(bpw: float, bits: int) -> None:
    assert rest_bits(bpw) == bits


@pytest.mark.parametrize("first", range(4, 21))
def test_descent_ends_at_the_first_step_that_reaches(first: int) -> None:
    asked: list[int] = []

    def reaches(step: int) -> bool:
        asked.append(step)
        return step >= first

    assert descend(4, 20, reaches) == first
    assert len(asked) == len(set(asked)) and (first == 4 or first - 1 in asked)
    assert first < 20 or asked == [19]


@pytest.mark.slow
def test_plan_quantize_certify_agree_and_the_next_smaller_step_fails(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    plan, curve, out = tmp_path / "plan.json", tmp_path / "curve.json", tmp_path / "out"
    ran = alphaq(
        *("plan", tiny, "--ear", 0.935, "--text", TEXT, *SCORING, "--choices", "1,2,3", "--ear-step", 0.5),
        *("-o", plan, "--curve", curve),
    )
    assert ran.code == 0, ran.err
    found = Curve.model_validate_json(curve.read_text())
    chosen, failed = found.chosen, found.failed
    assert chosen is not None and failed is not None and failed.budget_bpw == chosen.budget_bpw - 0.5
    assert (failed.attention_bits, failed.shared_bits) == (chosen.attention_bits, chosen.shared_bits)
    assert chosen.ear.high >= 0.935 > failed.ear.high and chosen.reached and not failed.reached
    assert chosen.size_bytes is not None and failed.size_bytes is not None and failed.size_bytes < chosen.size_bytes
    made = Plan.read(plan)
    assert made.size_bytes == chosen.size_bytes and made.config.budget.bpw == chosen.budget_bpw
    assert f"--bpw {chosen.budget_bpw:g}" in ran.err and "next smaller step" in ran.err

    assert alphaq("quantize", tiny, "--plan", plan, "-o", out).code == 0
    certified = alphaq("certify", out, "--reference", tiny, "--text", TEXT, *SCORING, "--ear", 0.935, "--json").json
    assert Estimate(**certified["overall"]["ear"]) == chosen.ear
    assert Certificate.read(out / "certificate.json").model.source == found.source.fingerprint
    again = alphaq(
        *("plan", tiny, "--bpw", chosen.budget_bpw, "--choices", "1,2,3", "--json"),
        *("--attention-bits", chosen.attention_bits, "--shared-bits", chosen.shared_bits),
    ).json
    assert again["choices"] == made.choices
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.json", "out", "plan.json"]


@pytest.mark.slow
def test_quantize_searches_too(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    ran = alphaq(
        *("quantize", tiny, "--ear", 0.5, "--text", TEXT, *SCORING, "--choices", "2,4", "--ear-step", 2, "--json"),
        *("-o", tmp_path / "out", "--curve", tmp_path / "curve.json"),
    )
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "curve.json").read_text())
    assert ran.json["config"]["budget"]["bpw"] == found["chosen"]["budget_bpw"]
    assert found["failed"] is None  # even the narrowest reach it
    assert "no smaller budget is feasible" in ran.err


@pytest.mark.slow
def test_target_beyond_the_widest_choices_says_what_they_reach(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    curve = tmp_path / "curve.json"
    ran = alphaq(
        *("plan", tiny, "--ear", 0.999, "--text", TEXT, *SCORING, "--choices", "2", "--ear-step", 1),
        *("-o", tmp_path / "plan.json", "--curve", curve),
    )
    assert ran.code == 2 and "Not even the widest choices reach an EAR of 0.999" in ran.err
    assert not (tmp_path / "plan.json").exists()
    found = Curve.model_validate_json(curve.read_text())
    assert found.chosen is None and len(found.points) == 1
    assert f"{found.points[0].ear}" in " ".join(ran.err.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--ear", 0.9, "--bits", 2), "searches the budget that --bits states"),
        (("--ear", 0.9, "--size", "9MiB"), "searches the budget that --size states"),
        (("--ear", 0.9, "--no-text"), "measured on texts"),
        (("--ear", 1.5), "not between 0 and 1"),
        (("--ear", 0.9, "--ear-step", 0), "not between 0.001 and 8"),
        (("--ear", 0.9, "--reaches", "abov"), "Did you mean 'above'"),
        (("--ear", 0.9, "--engine", "vllm"), "engine native only"),
        (("--ear", 0.9, "--unweighted"), "counts matrices"),
        (("--ear", 0.9, "--dtype", "float3"), "Did you mean 'float32'"),
        (("--bits", 2), "--text is for a search"),
        (("--bits", 2, "--window", 64), "--text, --window is for a search"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_any_work(
    alphaq: Run, tiny: Path, options: tuple[object, ...], said: str
) -> None:
    text = () if "--no-text" in options else ("--text", TEXT)
    ran = alphaq("plan", tiny, *text, *(option for option in options if option != "--no-text"))
    assert ran.code == 2 and said in " ".join(ran.err.split())


def test_search_needs_the_model_and_stray_files_are_refused(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    assert "Give MODEL" in alphaq("plan", "--ear", 0.9, "--text", TEXT).err
    assert "FILE is for a search" in alphaq("plan", tiny, TEXT, "--bits", 2).err
    (tmp_path / "plan.json").write_text("{}")
    ran = alphaq("quantize", tiny, TEXT, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert ran.code == 2 and "already decides everything that FILE would" in ran.err
