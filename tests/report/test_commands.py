import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from alphaq.calibration.text import Text
from alphaq.cli import app as cli
from alphaq.cli.inputs import Inputs
from alphaq.engines.output import QuantizeOptions
from alphaq.nouns.plan import Plan, Refinement, SourceIdentity
from alphaq.nouns.rates import Rates
from alphaq.nouns.settings import Budget, PlanConfig, Rule
from alphaq.planning import resolve
from alphaq.report.commands import Names, remake, reproduce
from alphaq.report.tables import refined_words
from alphaq.writing.rounding import Rounding
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
@pytest.mark.usefixtures("knows_tiny")
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
    steps = dict(reproduce(plan, names=Names(stats="numbers.csv")))
    assert steps["Plan"] == "alphaq plan --bits 2.5 --method alphaq --gamma 2.0 --stats numbers.csv -o plan.json"
    assert "Quantize" not in steps


def test_a_plan_without_an_importance_matrix_says_so_where_the_command_would_make_one() -> None:
    source = SourceIdentity(name="m", fingerprint="0")

    def words(**settings: str) -> str:
        config = PlanConfig(budget=Budget(bits=3), **settings)  # type: ignore[arg-type]
        return reproduce(Plan(engine=config.engine, source=source, config=config, choices={"a": "Q4_0"}))[0][1]

    assert " --imatrix none " in words(engine="llama.cpp")
    assert " --imatrix self " in words(engine="llama.cpp", imatrix="self losses-0")
    assert "--imatrix" not in words(engine="llama.cpp", method="alphaq") + words()


class Flip(NamedTuple):
    """A value that a setting does not have by itself, and what else it takes for it to be one."""

    value: Any
    needs: Mapping[str, Any] = MappingProxyType({})


LLAMA = {"engine": "llama.cpp"}
# One for every setting of a plan: whoever adds a setting adds a line here.
FLIPS: dict[str, list[Flip]] = {
    "budget": [Flip(Budget(bits=2.75)), Flip(Budget(bpw=3.125)), Flip(Budget(size_bytes=7_340_033))],
    "engine": [Flip("mlx"), Flip("llama.cpp"), Flip("vllm"), Flip("gptqmodel")],
    "method": [Flip("uniform"), Flip("paper"), Flip("mint"), Flip("random"), Flip("hessian", {"calibration": "self"})],
    "noise": [Flip("analytic")],
    "gamma": [Flip(2.5, {"method": "alphaq"}), Flip(0.1 + 0.2, {"method": "paper"}), Flip(-1.0, {"method": "alphaq"})],
    "spectrum": [Flip("whole")],
    "tail": [Flip("ks")],
    "choices": [Flip("2,3g64,4"), Flip("Q2_K,Q4_K", LLAMA)],
    "fast": [Flip(True, LLAMA)],
    "group_size": [Flip(64)],
    "symmetric": [Flip(True)],
    "attention_bits": [Flip(8)],
    "shared_bits": [Flip(16)],
    "embedding_bits": [Flip(8, LLAMA)],
    "head_bits": [Flip(8, LLAMA)],
    "roles": [Flip("fixed")],
    "pins": [Flip((Rule(pattern="layers.0.*", value="4"), Rule(pattern="a b; rm", value="2g64")))],
    "min_bits": [Flip((Rule(pattern="*", value="2"), Rule(pattern="down", value="3")))],
    "max_bits": [Flip((Rule(pattern="expert", value="5"),))],
    "min_sqnr_db": [Flip(9.5)],
    "min_speed": [Flip(12.5, {"bandwidth": Rates(memory=80_000_000_001)})],
    "bandwidth": [Flip(Rates(memory=80_000_000_001)), Flip(Rates(memory=10**9, formats=(("3g128", 7),), layer_ns=5))],
    "per_layer": [Flip(True)],
    "unweighted": [Flip(True)],
    "seed": [Flip(7, {"method": "random"})],
    "stats": [Flip("numbers.csv")],
    "calibration": [Flip("self", {"method": "baq"}), Flip("notes.txt", {"method": "baq"})],
    "imatrix": [Flip("importance.gguf 0123456789abcdef", LLAMA), Flip("self losses-0123", LLAMA)],
    "split_bytes": [Flip(2_000_000_001, LLAMA)],
    "share": [Flip(0.015, {"method": "typical"})],
    "drop": [Flip(True)],
    "drop_counts": [Flip("own", {"drop": True})],
    "max_drop": [Flip(0.125, {"drop": True})],
    "max_drop_loss": [Flip(0.02, {"drop": True})],
    "codec": [Flip("zstd")],
    "bos": [Flip(False)],
    "check": [Flip(False)],
}


def test_every_setting_of_a_plan_is_tried() -> None:
    assert FLIPS.keys() == PlanConfig.model_fields.keys()


class Parsed(Exception):
    """Ends a command as soon as its settings are known."""


@pytest.mark.parametrize(
    ("name", "flip"), [pytest.param(name, flip, id=f"{name}-{flip.value}") for name in FLIPS for flip in FLIPS[name]]
)
def test_the_command_says_every_setting_of_the_plan(
    name: str, flip: Flip, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that a report shows is parsed by the command line itself."""
    monkeypatch.chdir(tmp_path)
    for file in ("notes.txt", "numbers.csv"):
        Path(file).write_text("x")
    asked = PlanConfig.model_validate({"budget": Budget(bits=3), **flip.needs, name: flip.value})
    assert getattr(asked, name) != PlanConfig.model_fields[name].default
    expected = resolve(asked).config
    plan = Plan(
        engine=asked.engine,
        source=SourceIdentity(name=str(tiny), fingerprint="0"),
        config=expected.model_dump(mode="json"),
        choices={"a": "2"},
    )
    seen: list[PlanConfig] = []

    def stop(checkpoint: Any, config: PlanConfig, inputs: Inputs, *rest: Any) -> Any:
        seen.append(resolve(config.model_copy(update=inputs.names)).config)
        raise Parsed

    class Given:
        name, digest = "importance.gguf", "0123456789abcdef"

    class Own:
        name, digest = "self", "losses-0123"

    monkeypatch.setattr("alphaq.cli.plan.build_plan", stop)
    monkeypatch.setattr("alphaq.checkpoint.gguf.imatrix.read_imatrix", lambda path: Given)
    monkeypatch.setattr("alphaq.writing.observing.importance_by_losses", lambda *given: Own)
    words = shlex.split(dict(reproduce(plan))["Plan"])
    with pytest.raises(Parsed):
        cli.main([*words[1:], "--workers", "1"])
    assert seen == [expected]


def test_a_setting_that_is_on_by_default_is_turned_off_by_its_no() -> None:
    from alphaq.report.commands import plan_options

    assert plan_options(PlanConfig(budget=Budget(bits=3), check=False), "measured") == ["--bits", "3.0", "--no-check"]
    assert plan_options(PlanConfig(budget=Budget(bits=3)), "measured") == ["--bits", "3.0"]


@pytest.mark.parametrize(
    ("rounding", "words"),
    [
        (Rounding.of("native"), []),
        (Rounding.of("native", "hqq"), ["--quantizer", "hqq"]),
        (
            Rounding.of("native", "gptq", Text(Path("texts/my.txt"), 4096)),
            ["--quantizer", "gptq", "--calibration", "my.txt", "--calibration-tokens", "4096"],
        ),
        (
            Rounding.of("native", "learned", Text("self")),
            ["--quantizer", "learned", "--calibration", "self", "--calibration-tokens", "16384"],
        ),
    ],
    ids=["usual", "hqq", "gptq", "learned"],
)
def test_quantizing_is_repeated_with_its_own_options(rounding: Rounding, words: list[str]) -> None:
    plan = Plan(choices={"a": "2"}, config={"imatrix": "i m.gguf 0123"})
    steps = dict(remake(plan, rounding.options("native"), Names("m", "out")))
    shown = shlex.split(steps["Quantize"])
    assert shown == [*["alphaq", "quantize", "m", "--plan", "plan.json", "--imatrix"], "i m.gguf", *words, "-o", "out"]


@pytest.mark.usefixtures("knows_tiny")
def test_report_and_card_repeat_what_an_output_was_quantized_with(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--bits", "3", "--method", "uniform", "--codec", "zstd", "--noise", "measured", "--choices", "2,3,4")
    inputs = ("--calibration", "self", "--calibration-tokens", "512")
    made = alphaq("quantize", tiny, *options, "--quantizer", "gptq", *inputs, "-o", out)
    assert made.code == 0, made.err
    assert alphaq("report", out, "-o", tmp_path / "report.html").code == 0
    card = alphaq("card", out, "--base-model", "someone/tiny", "-o", "-").out
    for text in ((tmp_path / "report.html").read_text(), card):
        assert "--plan plan.json --quantizer gptq --calibration self --calibration-tokens 512 -o" in text
        assert "--bits 3.0 --method uniform --choices 2,3,4 --codec zstd -o plan.json" in text
    assert "alphaq plan someone/tiny --bits" in card


def test_the_rule_that_cuts_words_is_repeated_in_both_steps() -> None:
    plan = Plan.model_validate(
        {"source": {"name": "m", "fingerprint": "0"}, "config": {"budget": {"bits": 3}}, "choices": {"a": "2"}}
    )
    steps = dict(reproduce(plan, QuantizeOptions(pre_tokenizer="llama-bpe")))
    assert "--pre-tokenizer llama-bpe" in steps["Plan"] and "--pre-tokenizer llama-bpe" in steps["Quantize"]


REFINED = Refinement(
    before=0.02,
    after=0.01,
    tokens=12_240,
    rounds=2,
    moved=1_234,
    hidden=0,
    seed=3,
    gradients=16,
    gradient_tokens=2048,
    by="groups",
)


def test_a_refined_plan_is_made_in_two_steps_of_which_none_overwrites_what_it_reads() -> None:
    plan = Plan(
        engine="llama.cpp",
        source=SourceIdentity(name="m", fingerprint="0"),
        config=PlanConfig(budget=Budget(bits=3), engine="llama.cpp", imatrix="self losses-0123456789abcdef"),
        choices={"a": "Q4_0"},
        refined=REFINED,
    )
    steps = dict(reproduce(plan, QuantizeOptions(pre_tokenizer="llama-bpe")))
    assert steps["Plan"].endswith("--pre-tokenizer llama-bpe -o unrefined.json")
    assert steps["Refine"] == (
        "alphaq refine m --plan unrefined.json --seed 3 --imatrix self --gradients 16 --by groups --tokens 2048 "
        "--pre-tokenizer llama-bpe -o plan.json"
    )
    assert steps["Quantize"].startswith("alphaq quantize m --plan plan.json ")


def test_the_refine_step_is_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    plan = Plan(
        source=SourceIdentity(name="m", fingerprint="0"),
        config=PlanConfig(budget=Budget(bits=3)),
        choices={"a": "2"},
        refined=REFINED,
    )
    (tmp_path / "unrefined.json").write_text(plan.model_copy(update={"refined": None}).to_json())
    seen: list[Any] = []

    def stop(*given: Any) -> Any:
        seen.append(given[2])
        raise Parsed

    monkeypatch.setattr("alphaq.cli.refine.opened", lambda *given: None)
    monkeypatch.setattr("alphaq.trials.refine.refine", stop)
    with pytest.raises(Parsed):
        cli.main(shlex.split(dict(reproduce(plan))["Refine"])[1:])
    assert [(one.seed, one.samples, one.tokens, one.by) for one in seen] == [(3, 16, 2048, "groups")]


def test_what_refining_did_is_put_into_words() -> None:
    assert refined_words(REFINED) == "KL on 12,240 tokens of its own writing: 0.02 → 0.01, 1,234 units changed"
    as_it_was = REFINED.model_copy(update={"moved": 0, "after": 0.02})
    assert refined_words(as_it_was) == "KL on 12,240 tokens of its own writing: 0.02; nothing better was found"


def test_a_card_shows_both_steps_of_a_refined_plan(alphaq: Run, tiny_quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_quantized, out)
    plan = Plan.read(out / "plan.json").model_copy(update={"refined": REFINED})
    (out / "plan.json").write_text(plan.to_json())
    card = alphaq("card", out, "--base-model", "someone/tiny", "-o", "-").out
    plan_line, refine_line = card.partition("The plan was made by\n\n")[2].splitlines()[:2]
    assert plan_line.startswith("    alphaq plan someone/tiny ") and plan_line.endswith(" -o unrefined.json")
    assert refine_line.startswith("    alphaq refine someone/tiny --plan unrefined.json --seed 3 ")


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
