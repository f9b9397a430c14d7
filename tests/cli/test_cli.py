import csv
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alphaq.writing import quantizing
from conftest import DATA, Ran
from injection import Job, Place, run

Run = Callable[..., Ran]
TEXT = DATA / "texts" / "code.txt"


def test_inspect_prints_the_promised_keys(alphaq: Run, tiny: Path) -> None:
    found = alphaq("inspect", tiny, "--json").json
    assert {"architecture", "layers", "experts_per_layer", "expert_matrices", "parameters", "bytes", "roles"} <= set(
        found
    )
    assert found["roles"]["expert"]["matrices"] == found["expert_matrices"] == 96
    assert set(found["roles"]["attention"]) >= {"matrices", "parameters", "bytes"}
    assert "expert" in alphaq("inspect", tiny).out


def test_analyze_writes_one_row_per_matrix_and_plan_reads_them(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    summary = alphaq("analyze", tiny, "-o", tmp_path / "s.csv", "--json").json
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == summary["matrices"]
    assert list(rows[0])[:5] == ["name", "layer", "expert", "projection", "role"]
    options = ("--method", "alphaq", "--fast", "--bits", "2.5", "--json")
    given = alphaq("plan", tiny, "--stats", tmp_path / "s.csv", *options).json
    measured = alphaq("plan", tiny, *options).json
    assert given["choices"] == measured["choices"]
    alone = alphaq("plan", "--stats", tmp_path / "s.csv", "--bits", "2.5", "--json").json
    assert set(alone["assignment"]) == set(measured["assignment"])
    assert alone["average_bits"] <= 2.5


@pytest.mark.usefixtures("knows_tiny")
def test_plan_prints_the_promised_keys_and_file_equals_output(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    ran = alphaq("plan", tiny, "--bits", "2.5", "-o", tmp_path / "p.json", "--json")
    wanted = {"average_bits", "bits_per_weight", "size_bytes", "objective", "histogram", "assignment"}
    assert wanted <= set(ran.json)
    written = json.loads((tmp_path / "p.json").read_text())
    table = written.pop("table")
    assert ran.json == written
    assert set(table["losses"]) == set(written["assignment"])
    assert all(4 * bits == int(4 * bits) for bits in ran.json["assignment"].values())  # quarters of a bit
    assert ran.json["objective"] == pytest.approx(ran.json["lower_bound"], rel=1e-9)


def test_gamma_moves_bits_to_heavier_tails(alphaq: Run, tiny: Path) -> None:
    plan = alphaq(
        "plan", tiny, "--bits", "2.5", "--method", "alphaq", "--gamma", "20", "--noise", "analytic", "--json"
    ).json
    names = list(plan["assignment"])
    bits, alphas = ([plan[key][name] for name in names] for key in ("assignment", "alpha"))
    assert np.corrcoef(bits, alphas)[0, 1] < -0.7


def test_published_recipe_is_reproduced(alphaq: Run, shared: Path) -> None:
    stats = shared / "oracles" / "qwen3_next_2layer_stats.csv"
    plan = alphaq("plan", "--stats", stats, "--bits", "3.5", "--choices", "2,3,4", "--gamma", "10", "--json").json
    with (shared / "oracles" / "qwen3_next_2layer_recipe_gamma10_bits3.5.csv").open() as file:
        recipe = {row["name"]: int(row["bit_width"]) for row in csv.DictReader(file)}
    ours = plan["assignment"]
    assert set(ours) == set(recipe)
    assert sum(ours[name] == bits for name, bits in recipe.items()) >= 0.99 * len(recipe)
    with stats.open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    median = np.median([float(rows[name]["alpha"]) for name in ours])

    def objective(assignment: dict[str, int]) -> float:
        return sum(
            (median / float(rows[name]["alpha"])) ** 10 * float(rows[name]["variance"]) * 4.0**-bits
            for name, bits in assignment.items()
        )

    assert objective(ours) <= objective(recipe)
    assert plan["objective"] == pytest.approx(objective(ours))
    assert len(plan["unplanned"]) == 2


@pytest.mark.usefixtures("knows_tiny")
def test_quantize_verify_eval_generate(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert alphaq("plan", tiny, "--bits", "3", "-o", tmp_path / "p.json").code == 0
    made = alphaq("quantize", tiny, "--plan", tmp_path / "p.json", "-o", out, "--json").json
    assert made["size_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert alphaq("verify", out, "--reference", tiny, "--json").json["ok"] is True
    result = alphaq("eval", out, "--text", TEXT, "--reference", tiny, "--max-tokens", "600", "--json").json
    assert set(result["texts"]["code"]) >= {"perplexity", "kl", "top1", "ear", "tokens"}
    assert 0 < result["mean_kl"] < 0.2
    assert 0.8 < result["texts"]["code"]["ear"] < 1
    assert result["geomean_perplexity"] == pytest.approx(result["texts"]["code"]["perplexity"])
    text = alphaq("generate", out, "def main", "--max-new-tokens", "5").out
    assert text.startswith("def main")
    assert len(text) > len("def main\n")


def test_several_texts_after_one_option(alphaq: Run, tiny: Path) -> None:
    files = sorted((DATA / "texts").glob("*.txt"))
    result = alphaq("eval", tiny, "--text", *files, "--max-tokens", "100", "--json").json
    assert set(result["texts"]) == {"code", "dict", "tech"}
    assert result["mean_kl"] is None


def expect_user_error(ran: Ran, *parts: str) -> None:
    assert ran.code == 2
    assert ran.out == ""
    lines = ran.err.strip().splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the bundled model to damage, alone in its folder."""
    (tmp_path / "source").mkdir()
    return Path(shutil.copytree(tiny, tmp_path / "source" / "model"))


def damage_nothing(folder: Path) -> None: ...


def truncate(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def lengthen_header(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes((2**40).to_bytes(8, "little") + shard.read_bytes()[8:])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def escape_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')


def drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def garble_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def other_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


@pytest.mark.parametrize(
    ("damage", "options", "parts"),
    [
        (truncate, ["--bits", "2.5"], ["model.safetensors", "cut short"]),
        (lengthen_header, ["--bits", "2.5"], ["claims", "Download"]),
        (pickle_only, ["--bits", "2.5"], ["pickled", "safetensors"]),
        (escape_folder, ["--bits", "2.5"], ["../x.safetensors"]),
        (drop_config, ["--bits", "2.5"], ["config.json"]),
        (garble_config, ["--bits", "2.5"], ["config.json", "JSON"]),
        (other_architecture, ["--bits", "2.5"], ["gpt2", "docs/models.md"]),
        (damage_nothing, ["--bits", "0.5"], ["below", "--bits 1", "Raise"]),
        (damage_nothing, ["--bpw", "1.0"], ["below", "--bpw 1.06"]),
        (damage_nothing, ["--size", "1MiB"], ["below", "--size"]),
        (damage_nothing, ["--size", "lots"], ["not a size"]),
        (damage_nothing, [], ["exactly once"]),
        (damage_nothing, ["--bits", "2", "--size", "9MiB"], ["exactly once"]),
        (damage_nothing, ["--bits", "x"], ["--bits"]),
        (damage_nothing, ["--bitz", "2"], ["--bitz"]),
        (damage_nothing, ["--bits", "2", "--method", "alhpaq"], ["Did you mean 'alphaq'?"]),
        (damage_nothing, ["--bits", "2", "--noise", "measurd"], ["Did you mean 'measured'?"]),
        (damage_nothing, ["--bits", "2", "--choices", "2,9"], ["9 bits"]),
        (damage_nothing, ["--bits", "2", "--choices", ""], ["--choices"]),
        (damage_nothing, ["--bits", "2", "--group-size", "100"], ["100", "32, 64, 128"]),
        (damage_nothing, ["--bits", "2", "--attention-bits", "0"], ["0 bits"]),
        (damage_nothing, ["--bits", "2", "--gamma", "nan"], ["gamma"]),
        (damage_nothing, ["--bits", "2", "--method", "alphaq", "--gamma", "1e6"], ["--gamma"]),
        (damage_nothing, ["--bits", "2", "--stats", "absent.csv"], ["absent.csv"]),
        (damage_nothing, ["--plan", "absent.json"], ["absent.json"]),
        (
            damage_nothing,
            ["--plan", "absent.json", "--no-cache"],
            ["--plan already decides everything that --no-cache"],
        ),
        (damage_nothing, ["--size", "9" * 400], ["not a size"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_user_s_mistake_is_one_line_and_leaves_nothing(
    alphaq: Run, broken: Path, tmp_path: Path, damage: Callable[[Path], None], options: list[str], parts: list[str]
) -> None:
    damage(broken)
    expect_user_error(alphaq("quantize", broken, "-o", tmp_path / "out", *options), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_missing_folder(alphaq: Run, tmp_path: Path) -> None:
    for command in (["inspect"], ["plan", "--bits", "2"], ["generate"], ["eval", "--text", str(TEXT)]):
        extra = ["hello"] if command[0] == "generate" else []
        expect_user_error(alphaq(command[0], tmp_path / "no", *extra, *command[1:]), "No folder")


def test_existing_output_is_refused_before_any_work(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    expect_user_error(alphaq("quantize", tiny, "--bits", "2", "-o", tmp_path / "out"), "already exists", "Remove")
    assert list((tmp_path / "out").iterdir()) == []


def test_garbage_plan_is_refused(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"choices": 3}')
    expect_user_error(
        alphaq("quantize", tiny, "--plan", tmp_path / "p.json", "-o", tmp_path / "o"), "p.json", "choices"
    )


def test_evaluating_against_another_tokenizer_is_refused(alphaq: Run, tiny: Path, broken: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    expect_user_error(alphaq("eval", broken, "--text", TEXT, "--reference", tiny), "different tokenizers")


@pytest.mark.parametrize(
    "asking", [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50), lambda: bytearray(1 << 50)]
)
def test_what_the_system_has_no_memory_for_is_one_line(
    alphaq: Run, tiny: Path, asking: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alphaq.cli.inspect.opened", lambda *_, **__: asking())
    ran = alphaq("inspect", tiny)
    assert ran.code == 2 and ran.err.startswith("error: The system has no memory") and ran.err.count("\n") == 1


def test_a_defect_is_not_taken_for_a_lack_of_memory(alphaq: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alphaq.cli.inspect.opened", lambda *_, **__: torch.empty(2).view(3))
    with pytest.raises(RuntimeError, match="invalid for input"):
        alphaq("inspect", tiny)


def test_names_are_printed_as_they_are(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    """Square brackets are markup to the table library, and part of a name to a user."""
    out = tmp_path / "a[b].json"
    assert "a[b].json" in alphaq("plan", tiny, "--bits", "2", "--fast", "--method", "distortion", "-o", out).err
    assert out.is_file()


def test_piped_tables_are_not_cut(alphaq: Run, tiny: Path) -> None:
    ran = alphaq("eval", tiny, "--text", TEXT, "--max-tokens", "600", "--reference", tiny)
    assert "…" not in ran.out
    assert ran.err == ""


@pytest.mark.usefixtures("knows_tiny")
def test_uniform_uses_its_budget_up_with_a_mix(alphaq: Run, tiny: Path) -> None:
    ran = alphaq("plan", tiny, "--bits", "2.5", "--method", "uniform", "--json")
    assert ran.json["average_bits"] == 2.5
    assert ran.json["budget_slack"] == 0
    assert ran.json["histogram"] == {"2.5": 96}
    assert ran.err == ""


def test_a_budget_wider_than_every_choice_says_what_it_leaves_unused(alphaq: Run, tiny: Path) -> None:
    ran = alphaq("plan", tiny, "--bits", "4", "--choices", "2,3", "--method", "uniform", "--json")
    assert ran.json["average_bits"] == 3.0
    assert ran.json["budget_slack"] > 0
    assert "no choice offered is wider than 3 bits" in ran.err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_stopped_run_keeps_its_work_and_shows_no_output(tiny: Path, tmp_path: Path, number: int, code: int) -> None:
    def arm() -> None:
        quantizing.write_manifest = lambda *_: signal.raise_signal(number)  # type: ignore[assignment]

    place = Place(tmp_path, tiny).prepare()
    assert run(Job("", "quantize {model} --bits 2 --fast --method alphaq -o {out}"), place, arm).code == code
    assert not place.out.exists()
    assert place.left() == {".out.partial"}


def test_console_script_runs_and_unknown_commands_are_named() -> None:
    ran = subprocess.run([sys.executable, "-m", "alphaq", "analyse"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "analyse" in ran.stderr
    version = subprocess.run([sys.executable, "-m", "alphaq", "--version"], capture_output=True, text=True)
    assert version.stdout.startswith("alphaq ")


def test_json_output_is_alone_on_stdout(tiny: Path, tmp_path: Path) -> None:
    """In a real process, where libraries may print whatever they like."""
    command = [
        sys.executable,
        "-m",
        "alphaq",
        "quantize",
        str(tiny),
        *("--bits", "2", "--fast", "--method", "alphaq"),
        "-o",
        str(tmp_path / "o"),
        "--json",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    size = sum(path.stat().st_size for path in (tmp_path / "o").glob("*.safetensors"))
    assert json.loads(ran.stdout)["size_bytes"] == size


@pytest.mark.slow
def test_demo_tells_the_whole_story(alphaq: Run, tmp_path: Path) -> None:
    result = alphaq("demo", "-o", tmp_path / "demo", "--json").json
    rows = {row["label"]: row for row in result["rows"]}
    assert list(rows) == ["bf16", "uniform 2", "AlphaQ 2.5", "uniform 3"]
    kl = [rows[label]["mean_kl"] for label in ("bf16", "uniform 3", "AlphaQ 2.5", "uniform 2")]
    assert kl == sorted(kl)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    for part in ("Beside other methods", "Measured on text", "measured in the files", '"densities":{"bins"'):
        assert part in page
    assert (tmp_path / "demo" / "model" / "plan.json").is_file()
