from collections.abc import Callable
from pathlib import Path

import pytest

from alphaq.cli.options import plan_settings, said_by
from alphaq.nouns.plan import Plan
from conftest import Ran

CONFIG = {"budget": {"bits": 3.0}, "engine": "llama.cpp", "method": "uniform", "choices": "Q2_K,Q4_K", "seed": 0}
CONFIG |= {"pins": [{"pattern": "down", "value": "Q4_K"}], "min_sqnr_db": 9.0}


def settings(**given: object) -> dict[str, object]:
    from inspect import signature

    return {name: one.default for name, one in signature(plan_settings).parameters.items()} | given


@pytest.mark.parametrize(
    ("given", "differing"),
    [
        ({"engine": "llama.cpp"}, set()),
        ({"engine": "mlx"}, {"engine"}),
        ({"engine": "llama.cpp", "bits": 3.0, "method": "uniform", "seed": 0}, set()),
        ({"bits": 2.0}, {"bits"}),
        ({"size": "3GiB"}, {"size"}),
        ({"choices": "Q2_K,Q4_K", "pin": ["down=Q4_K"], "min_sqnr": "9dB"}, set()),
        ({"pin": ["up=Q4_K"], "min_sqnr": "8dB", "codec": "zstd"}, {"pin", "min_sqnr", "codec"}),
        ({"stats": Path("numbers.csv"), "attention_bits": 4}, {"stats", "attention_bits"}),
    ],
)
def test_an_option_beside_a_plan_conflicts_only_if_it_differs(given: dict[str, object], differing: set[str]) -> None:
    plan = Plan(engine="llama.cpp", config=CONFIG, choices={"a": "Q4_K"})
    assert set(given) - said_by(plan, settings(**given), set(given)) == differing


def test_beside_a_plan_written_by_hand_the_engine_may_be_named() -> None:
    plan = Plan(engine="mlx", choices={"a": "4g64"})
    assert said_by(plan, settings(engine="mlx", bits=3.0), {"engine", "bits"}) == {"engine"}


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
