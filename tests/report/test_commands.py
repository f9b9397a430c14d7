import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from alphaq.records import Plan
from alphaq.report.commands import reproduce
from conftest import Ran

Run = Callable[..., Ran]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--bits", "2.5"), marks=pytest.mark.slow),
        ("--bpw", "3", "--method", "alphaq", "--gamma", "2.5", "--choices", "2,3,4", "--min-bits", "down=3"),
        ("--size", "7MiB", "--method", "random", "--seed", "4", "--pin", "layers.0.*=4", "--attention-bits", "8"),
        ("--bits", "3", "--method", "paper"),
        ("--bits", "3", "--method", "mint"),
        (
            "--bits",
            "3",
            "--method",
            "distortion",
            "--per-layer",
            "--symmetric",
            "--group-size",
            "64",
            "--max-bits",
            "5",
        ),
        pytest.param(
            ("--bits", "3", "--engine", "mlx", "--tail", "ks", "--spectrum", "whole", "--method", "alphaq"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_command_makes_the_same_plan_again(
    options: tuple[str, ...], alphaq: Run, tiny: Path, tmp_path: Path
) -> None:
    assert alphaq("plan", tiny, *options, "-o", tmp_path / "first.json").code == 0
    first = Plan.read(tmp_path / "first.json")
    words = shlex.split(reproduce(first)[0][1])
    assert words[:3] == ["alphaq", "plan", first.source.name if first.source else ""]
    again = alphaq(*["plan", tiny, *words[3:-1], tmp_path / "second.json"])
    assert again.code == 0, again.err
    assert Plan.read(tmp_path / "second.json") == first


def test_a_plan_from_stats_names_the_file_it_came_from() -> None:
    plan = Plan(config={"budget": {"bits": 2.5}, "method": "alphaq", "gamma": 2.0}, choices={"a": "2"})
    steps = dict(reproduce(plan, "numbers.csv"))
    assert steps["Plan"] == "alphaq plan --stats numbers.csv --bits 2.5 --method alphaq --gamma 2.0 -o plan.json"
    assert "Quantize" not in steps


def test_names_are_quoted_for_the_shell() -> None:
    plan = Plan.model_validate(
        {
            "source": {"name": "a b; rm", "fingerprint": "0"},
            "config": {"budget": {"bits": 2}, "method": "auto"},
            "choices": {"a": "2"},
        }
    )
    commands = [shlex.split(command) for _, command in reproduce(plan)]
    assert len(commands) == 4
    assert all("a b; rm" in words and "rm" not in words for words in commands)


def test_a_plan_without_settings_has_no_commands() -> None:
    assert reproduce(Plan(choices={"a": "2"})) == []
