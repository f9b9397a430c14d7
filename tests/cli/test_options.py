from collections.abc import Callable
from pathlib import Path

import pytest

from alphaq.cli.options import Asked
from alphaq.cli.planning import said_by
from alphaq.nouns.option import settings_of
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import PlanConfig
from conftest import Ran

CONFIG = {"budget": {"bits": 3.0}, "engine": "llama.cpp", "method": "uniform", "choices": "Q2_K,Q4_K", "seed": 0}
CONFIG |= {"pins": [{"pattern": "down", "value": "Q4_K"}], "min_sqnr_db": 9.0}


def asked_for(**typed: object) -> Asked[PlanConfig]:
    settings = settings_of(PlanConfig)
    values = {name: setting.default for name, setting in settings.items()} | typed
    return Asked(PlanConfig, values, {name: settings[name].flag for name in typed})


@pytest.mark.parametrize(
    ("typed", "differing"),
    [
        ({"engine": "llama.cpp"}, set()),
        ({"engine": "mlx"}, {"engine"}),
        ({"engine": "llama.cpp", "bits": 3.0, "method": "uniform", "seed": 0}, set()),
        ({"bits": 2.0}, {"bits"}),
        ({"size_bytes": "3GiB"}, {"size_bytes"}),
        ({"choices": "Q2_K,Q4_K", "pins": ["down=Q4_K"], "min_sqnr_db": "9dB"}, set()),
        ({"pins": ["up=Q4_K"], "min_sqnr_db": "8dB", "codec": "zstd"}, {"pins", "min_sqnr_db", "codec"}),
        ({"stats": Path("numbers.csv"), "attention_bits": 4}, {"stats", "attention_bits"}),
    ],
)
def test_an_option_beside_a_plan_conflicts_only_if_it_differs(typed: dict[str, object], differing: set[str]) -> None:
    plan = Plan(engine="llama.cpp", config=CONFIG, choices={"a": "Q4_K"})
    assert set(typed) - said_by(plan, asked_for(**typed)) == differing


def test_beside_a_plan_written_by_hand_the_engine_may_be_named() -> None:
    plan = Plan(engine="mlx", choices={"a": "4g64"})
    assert said_by(plan, asked_for(engine="mlx", bits=3.0)) == {"engine"}


def test_quantize_takes_the_engine_of_its_plan_and_refuses_another(
    alphaq: Callable[..., Ran], tiny: Path, tmp_path: Path
) -> None:
    made, plan = tmp_path / "out", tmp_path / "p.json"
    assert alphaq("plan", tiny, "--engine", "mlx", "--bits", "4", "--method", "uniform", "-o", plan).code == 0
    ran = alphaq("quantize", tiny, "--plan", plan, "--engine", "native", "--bits", "4", "-o", made)
    assert ran.code == 2 and "--engine would (it is for mlx). Drop one" in ran.err
    ran = alphaq("quantize", tiny, "--plan", plan, "--gamma", "2", "--symmetric", "--bits", "4", "-o", made)
    assert ran.code == 2 and "everything that --gamma, --symmetric would" in ran.err
    ran = alphaq("quantize", tiny, "--plan", plan, "--engine", "mlx", "--bits", "4", "-o", made)
    assert ran.code == 0, ran.err
