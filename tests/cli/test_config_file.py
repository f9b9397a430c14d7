from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Ran

pytestmark = pytest.mark.usefixtures("knows_tiny")
Run = Callable[..., Ran]


def config(folder: Path, text: str) -> Path:
    path = folder / "alphaq.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_holds_options_and_what_is_typed_wins(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    path = config(
        tmp_path,
        """
        method = "uniform"
        json = true
        attention-bits = 8
        [plan]
        bits = 3
        max_bits = ["4", "down=3"]
        check = false
        """,
    )
    made = alphaq("plan", tiny, "--config", path, "--attention-bits", 4).json["config"]
    assert made["method"] == "uniform" and made["budget"]["bits"] == 3.0 and made["check"] is False
    assert made["max_bits"] == [{"pattern": "*", "value": "4"}, {"pattern": "down", "value": "3"}]
    assert made["attention_bits"] == 4


def test_a_table_wins_over_what_stands_above_it_and_others_are_not_for_this_command(
    alphaq: Run, tiny: Path, tmp_path: Path
) -> None:
    path = config(tmp_path, 'bits = 2\nmethod = "uniform"\nlimit = 3\n[plan]\nbits = 3\n[slice]\nbits = 4\n')
    made = alphaq("plan", tiny, "--config", path, "--json").json
    assert made["config"]["budget"]["bits"] == 3.0


def test_what_a_file_asks_for_beside_a_plan_is_refused_as_if_it_were_typed(
    alphaq: Run, tiny: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    assert alphaq("plan", tiny, "--bits", 3, "--method", "uniform", "-o", plan).code == 0
    path = config(tmp_path, "[quantize]\nbits = 2\n")
    ran = alphaq("quantize", tiny, "--plan", plan, "--config", path, "-o", tmp_path / "out")
    assert ran.code == 2 and "everything that --bits would" in ran.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bitz = 2", "Unknown option 'bitz'. Did you mean 'bits'?"),
        ("[plan]\nmetod = 'uniform'", "Unknown option of plan 'metod'. Did you mean 'method'?"),
        ("[plan]\nlimit = 3", "Unknown option of plan 'limit'"),
        ("[pln]\nbits = 3", "Unknown command 'pln'. Did you mean 'plan'?"),
        ("bits = ", "is not TOML"),
        ("bits = true", "bits = True is not a number or text"),
        ("symmetric = 'yes'", "symmetric = 'yes' is not true or false"),
        ("bits = [2, 3]", "bits takes one value, not 2"),
        ("seed = 1.9", "Invalid value for '--seed'"),
        ("pin = [true]", "pin holds True, which is not a number or text"),
        ("bits = 'many'", "Invalid value for '--bits'"),
        ("[plan]\nbits = {a = 1}", "is not a number or text"),
    ],
)
def test_a_mistake_in_a_file_is_named(alphaq: Run, tiny: Path, tmp_path: Path, text: str, said: str) -> None:
    ran = alphaq("plan", tiny, "--config", config(tmp_path, text))
    assert ran.code == 2 and said in ran.err and len(ran.err.splitlines()) == 1


def test_a_file_that_is_not_there_is_named(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    ran = alphaq("plan", tiny, "--config", tmp_path / "none.toml")
    assert ran.code == 2 and "none.toml cannot be read" in ran.err


def test_a_typed_budget_leaves_out_another_one_of_the_file(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    path = config(tmp_path, "bits = 2.5\nmethod = 'uniform'\n")
    made = alphaq("plan", tiny, "--config", path, "--size", "8MB", "--json")
    assert made.json["config"]["budget"] == {"bits": None, "bpw": None, "size_bytes": 8_000_000}, made.err


def test_a_table_s_budget_leaves_out_another_one_above_it(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    path = config(tmp_path, "size = '8MB'\n[plan]\nbits = 3\nmethod = 'uniform'\n")
    made = alphaq("plan", tiny, "--config", path, "--json")
    assert made.json["config"]["budget"]["bits"] == 3.0, made.err


def test_what_is_for_every_command_is_not_held_against_one(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    path = config(tmp_path, "bits = 3\nmethod = 'uniform'\ntext = 'nowhere.txt'\n")
    assert alphaq("plan", tiny, "--config", path, "-o", plan).code == 0
    ran = alphaq("quantize", tiny, "--config", path, "--plan", plan, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
