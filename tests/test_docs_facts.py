"""What the documents say of the code is what the code says: limits, fields, keys, layers, figures."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from alphaq.checkpoint import remote, safetensors_format
from alphaq.checkpoint.families import architecture, matching
from alphaq.checkpoint.gguf import format as gguf_format
from alphaq.checkpoint.gguf import imatrix
from alphaq.checkpoint.gguf import source as gguf_source
from alphaq.engines.gguf import model as gguf_model
from alphaq.engines.output import Manifest, Record
from alphaq.engines.profiles import ENGINES
from alphaq.evaluation.certificate import Certificate, ModelIdentity, Settings, TaskFigures, Tasks, TextFigures
from alphaq.formats import coding
from alphaq.formats.versions import NATIVE_FORMAT_VERSION
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan, PlanTable, RateDistortion
from alphaq.nouns.settings import PlanConfig
from alphaq.quantizers.rounded import SAMPLE_VALUES
from alphaq.spectra.measure import COLUMNS, PANEL_VALUES
from alphaq.trials.results import Row
from alphaq.trials.search import Curve, Point
from alphaq.work import untrusted
from conftest import ROOT, Ran
from families import FAMILIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SECURITY, FORMATS = ROOT / "docs" / "security.md", ROOT / "docs" / "formats.md"
ARCHITECTURES = ROOT / "docs" / "architectures.md"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def section(page: Path, heading: str) -> str:
    """The text below a heading, up to the next one of its level."""
    level = heading.partition(" ")[0]
    text = page.read_text(encoding="utf-8")
    assert f"\n{heading}\n" in text, heading
    return re.split(rf"\n{level} ", text.partition(f"\n{heading}\n")[2])[0]


def test_the_table_of_engines_says_what_their_tables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx_lm")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from engines_table import BEGIN, END, PAGE, table

    assert PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0] == table()


def rows(text: str) -> dict[str, str]:
    """First and second column of every table, without their heads."""
    cells = [line.strip("|\n").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): row[1].strip() for row in cells if len(row) > 1 and not set(row[0]) <= set("|- ")}


def named(text: str) -> set[str]:
    """What stands in backquotes."""
    return set(re.findall(r"`([^`]+)`", text))


def listed(text: str) -> list[str]:
    """Words between commas, without what stands in brackets."""
    plain = re.sub(r"\([^()]*\)", "", text)
    return [word.strip(" `") for word in re.split(r",| and ", plain) if word.strip(" `")]


def grouped(number: int) -> str:
    return f"{number:,}"


# Limits


def test_limits_in_the_security_page_are_the_code_s() -> None:
    told = rows(SECURITY.read_text(encoding="utf-8"))
    megabytes = {untrusted.MAX_JSON_BYTES, safetensors_format.MAX_HEADER_BYTES, gguf_format.MAX_HEADER_BYTES}
    assert {f"{nbytes // 10**6} MB" for nbytes in megabytes} == {told["safetensors header, GGUF header, any JSON file"]}
    assert told["JSON values, depth"] == f"{grouped(untrusted.MAX_JSON_VALUES)}, {untrusted.MAX_JSON_DEPTH}"
    assert told["matrices of a checkpoint"] == grouped(matching.MAX_MATRICES)
    entries = (gguf_format.MAX_ENTRIES, gguf_format.MAX_ENTRIES, gguf_format.MAX_TEXTS, gguf_source.MAX_MATRICES)
    assert told["GGUF keys, tensors, texts in arrays, matrices"] == ", ".join(map(grouped, entries))
    assert safetensors_format.MAX_NAME_CHARACTERS == gguf_format.MAX_NAME_BYTES
    assert told["name of a tensor"].startswith(f"{grouped(gguf_format.MAX_NAME_BYTES)} characters")
    dimensions = f"{safetensors_format.MAX_DIMENSIONS} (GGUF: {gguf_format.MAX_DIMENSIONS}), with fewer than 2^"
    assert told["dimensions"].startswith(f"{dimensions}{safetensors_format.MAX_TENSOR_BYTES.bit_length() - 1} bytes")
    older = f"half of the memory (older format: {imatrix.MAX_BINARY_BYTES >> 30} GiB)"
    assert told["importance matrix"] == f"{grouped(imatrix.MAX_ENTRIES)} entries, {older}" and imatrix.MAX_SHARE == 2
    claims = f"{coding._ALWAYS >> 20} MiB, or {coding._MOST_TIMES} times"
    assert told["what coded tensors stand for"].startswith(claims)
    assert told["what coded tensors stand for"].endswith(f"{coding._MOST_PLANES} planes each")
    assert f"weights are {grouped(remote.MOST_SIDE_FILES)} at most" in SECURITY.read_text(encoding="utf-8")


def test_sizes_in_the_text_are_the_code_s() -> None:
    text = " ".join((ROOT / "docs" / "large-models.md").read_text(encoding="utf-8").split())
    assert f"Matrices beyond {round(2 * PANEL_VALUES / 1e6 - 0.5)} million weights" in text
    assert f"beyond {SAMPLE_VALUES:,} weights".replace(",", " ") in text
    assert f"its entry, {safetensors_format._ENTRY_MARGIN} bytes for offsets" in FORMATS.read_text(encoding="utf-8")
    runtime = (ROOT / "docs" / "runtime.md").read_text(encoding="utf-8")
    assert f"All [{len(FAMILIES)} families and variants](models.md)" in runtime


# Files


@pytest.mark.parametrize(
    ("heading", "model"), [("## plan.json", Plan), ("## certificate.json", Certificate), ("## curve.json", Curve)]
)
def test_fields_of_a_file_are_those_of_its_record(heading: str, model: type[BaseModel]) -> None:
    text = section(FORMATS, heading).partition("\n`table` is what")[0]
    found = {name for cell in rows(text) for name in named(cell)}
    assert found == set(model.model_fields)


def test_parts_of_the_files_are_listed_whole() -> None:
    plan, certificate = rows(section(FORMATS, "## plan.json")), rows(section(FORMATS, "## certificate.json"))
    curve = rows(section(FORMATS, "## curve.json"))
    settings = plan["`config`"].removeprefix("the settings: ").partition("; null or")[0]
    assert set(listed(settings)) == set(PlanConfig.model_fields)
    assert named(plan["`rate_distortion`"]) == set(RateDistortion.model_fields)
    table = section(FORMATS, "## plan.json").partition("\n`table` is what")[2]
    assert {name for cell in rows(table) for name in named(cell)} == set(PlanTable.model_fields)
    identity = certificate["`model`, `reference`"]
    assert set(ModelIdentity.model_fields) <= set(re.findall(r"\w+", identity))
    assert set(listed(certificate["`settings`"])) == set(Settings.model_fields)
    assert set(TextFigures.model_fields) <= set(re.findall(r"\w+", certificate["`texts`"]))
    told = certificate["`tasks`"]
    assert set(Tasks.model_fields) | set(TaskFigures.model_fields) <= set(re.findall(r"\w+", told))
    assert set(Point.model_fields) <= set(re.findall(r"\w+", curve["`points`"]))


def test_the_manifest_and_the_config_entry_are_shown_whole() -> None:
    text = section(FORMATS, "## alphaq_manifest.json")
    shown = set(re.findall(r'"(\w+)":', text))
    assert shown == set(Manifest.model_fields) | set(Record.model_fields)
    entry = next(line for line in FORMATS.read_text(encoding="utf-8").splitlines() if "`quant_method`" in line)
    assert f"`format_version` ({NATIVE_FORMAT_VERSION}" in entry


def test_the_stats_columns_are_listed_in_their_order() -> None:
    text = " ".join(section(FORMATS, "## Stats CSV").split())
    assert f"Columns: `{', '.join(COLUMNS)}`." in text


def test_coded_kinds_and_engines_are_listed() -> None:
    kinds = rows(section(FORMATS, "## Coded tensor"))["4"]
    assert kinds == "what it holds: " + ", ".join(
        f"{number} {'a block' if kind == 'block' else kind}" for number, kind in enumerate(coding._KINDS)
    )
    assert named(rows(section(FORMATS, "## plan.json"))["`engine`"]) == set(ENGINES)


def test_columns_of_a_comparison_are_those_of_its_rows() -> None:
    text = section(ROOT / "docs" / "comparing.md", "## Output").partition("Columns of the CSV")[2]
    found = {name for cell in rows(text) for name in named(cell)}
    assert {name.replace("perplexity_NAME", "perplexity") for name in found} == {field.name for field in fields(Row)}


# Architecture files


def descriptions() -> list[dict[str, Any]]:
    folder = ROOT / "src" / "alphaq" / "checkpoint" / "architectures"
    found = [tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.toml"))]
    return [one for one in found if "name" in one]


def documented(heading: str) -> set[str]:
    return {name for cell in rows(section(ARCHITECTURES, heading)) for name in named(cell)}


def test_every_key_of_an_architecture_file_is_documented_and_no_other() -> None:
    used = {key for one in descriptions() for key in one} - {"moe_layers", "tensors", "gguf", "projections"}
    assert documented("## Top level") - {"[projections]"} == used
    rules = {key for one in descriptions() for key in one.get("moe_layers", {})}
    assert documented("## `[moe_layers]`") == rules
    entries = {key for one in descriptions() for rule in one.get("tensors", ()) for key in rule}
    templates = {"{model}", "{outer}", "{layer}", "{expert}", "{projection}", "{part}", "{any}"}
    assert documented("## `[[tensors]]`") == entries | templates
    assert set(listed(rows(section(ARCHITECTURES, "## `[[tensors]]`"))["`role`"].replace(" or ", ", "))) == {
        role.value for role in Role
    }


def test_defaults_of_an_architecture_file_are_the_code_s() -> None:
    told = rows(section(ARCHITECTURES, "## Top level"))
    assert ", ".join(f'"{path}"' for path in architecture.SETTINGS) in told["`settings`"]
    source = Path(architecture.__file__).read_text(encoding="utf-8")
    for key in ("num_layers", "router_norm"):
        default = re.search(rf'data\.get\("{key}", \[?"(\w+)"', source)
        assert default and default[1] in told[f"`{key}`"]
    transforms = {name for name in documented("## `[gguf]`") if re.fullmatch(r"(permute|kv|plus)_\w+", name)}
    assert transforms == set(gguf_model._TRANSFORMS) - {"", "llama3_factors"}  # made of the config alone


# Contributing


def test_the_layers_in_contributing_are_the_contract_s() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = contract["tool"]["importlinter"]["contracts"][0]["layers"]
    told = re.search(r"\n    (cli > [^\n]*(?:\n    [^\n]+)*)", CONTRIBUTING)
    assert told
    assert re.split(r"\s*>\s*", " ".join(told[1].split())) == [re.sub(r" *[|:] *", ", ", layer) for layer in layers]


def test_every_room_is_described() -> None:
    told = {room.strip("`") for room in rows(section(ROOT / "CONTRIBUTING.md", "## Rooms"))} - {"room"}
    assert told == {path.parent.name for path in (ROOT / "src" / "alphaq").glob("*/__init__.py")}


WRITES = re.compile(
    r"\b(atomic_file|atomic_folder|resumable_folder|create_file|write_at|copy_file|TemporaryFile)\(|"
    r"\.(write_text|write_bytes|mkdir)\(|\.open\(\"(w|r\+b)"
)


def test_only_modules_that_contributing_names_write_files() -> None:
    told = re.search(r"Only (.*?)\s+write files", CONTRIBUTING, re.DOTALL)
    assert told
    allowed = named(told[1])
    root = ROOT / "src" / "alphaq"
    writers = {
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in root.rglob("*.py")
        if WRITES.search(path.read_text(encoding="utf-8"))
    }
    assert {name for name in writers if not any(name == one or name.startswith(f"{one}.") for one in allowed)} == set()
    assert {one for one in allowed if not any(name == one or name.startswith(f"{one}.") for name in writers)} == set()


# Figures


def test_speeds_are_the_same_on_every_page() -> None:
    text = (ROOT / "docs" / "research" / "benchmarks.md").read_text(encoding="utf-8")
    layer = text.partition("### One layer of Mixtral 8x7B's shape")[2].partition("\n###")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in layer.splitlines() if "| native" in line]
    by_name = {row[0]: row for row in cells if len(row) == 12 and row[5]}  # llama.cpp has no trellis codes
    bf16 = {name: float(row[4]) for name, row in by_name.items()}
    llama = {name: float(row[5]) for name, row in by_name.items()}
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"decodes {bf16['native 2']:.1f} times as fast as in bf16 at 2 bits and {bf16['native 3.5']:.1f} times at 3.5"
        in readme
    )
    low = [name for name in bf16 if name != "native 4"]
    choosing = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    told = f"decodes {min(bf16[n] for n in low):.1f} to {max(bf16[n] for n in low):.1f} times as fast as bf16 there"
    against = f"{min(llama[n] for n in low):.2f} to {max(llama[n] for n in low):.2f} times as fast as llama.cpp"
    assert told in choosing and against in choosing


# What `--json` prints


TEXT_FREE = [
    "inspect",
    "analyze",
    "plan",
    "engines",
    "methods",
    "quantizers",
    "explain",
    "quantize",
    "recode",
    "slice",
    "verify",
    "bench",
    "price",
    "cache",
]
WITH_TEXT = [
    "card",
    "certify",
    "refine",
    "eval",
    "generate",
    "skip",
    "report",
    "plot",
    "compare",
    "demo",
    "imatrix",
    "prune",
    "fit",
]


def promised(command: str) -> set[str]:
    """The keys that formats.md names for a command."""
    told = rows(section(FORMATS, "## JSON output"))[f"`{command}`"]
    without_table = set(Plan.model_fields) - {"table"}
    if told.startswith("as `"):
        return promised(told.split("`")[1])
    if told == "the certificate":
        return set(Certificate.model_fields)
    if told.startswith("a list, the rows of"):
        return {field.name for field in fields(Row)}
    told, plan = re.subn("^the plan without `table`(, and )?", "", told.removeprefix("a list: ").partition(";")[0])
    return (without_table if plan else set()) | set(listed(told))


@pytest.fixture(scope="module")
def made(save_family: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A small model and what commands need of it."""
    folder = tmp_path_factory.mktemp("json")
    return {"MODEL": save_family("qwen2_moe"), "FOLDER": folder}


def printed(alphaq: Callable[..., Ran], *words: object) -> set[str]:
    ran = alphaq(*words, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    return set(found[0] if isinstance(found, list) else found)


def keys_of(alphaq: Callable[..., Ran], command: str, made: Mapping[str, Path], scratch: Path) -> Iterable[set[str]]:
    """The keys of every form of a command."""
    model, out = made["MODEL"], made["FOLDER"] / "out"
    fast = ("--bits", 4, "--method", "alphaq", "--group-size", 32, "--workers", 1)
    if not out.exists():
        alphaq("quantize", model, *fast, "--choices", "3g32-nest,4g32-nest", "-o", out)
    calls: dict[str, tuple[object, ...]] = {
        "inspect": ("inspect", model),
        "price": ("price", model, "--choices", "2g32,4g32", "--share", "5%", "--workers", 1),
        "analyze": ("analyze", model, "-o", scratch / "stats.csv", "--workers", 1),
        "plan": ("plan", model, *fast),
        "engines": ("engines",),
        "methods": ("methods",),
        "quantizers": ("quantizers",),
        "bench": ("bench",),
        "cache": ("cache",),
        "explain": ("explain", out / "plan.json"),
        "quantize": ("quantize", model, *fast, "-o", scratch / "again"),
        "recode": ("recode", out, "--codec", "zstd", "-o", scratch / "coded"),
        "slice": ("slice", out, *fast, "-o", scratch / "slice"),
        "verify": ("verify", out, "--reference", model, "--workers", 1),
    }
    yield printed(alphaq, *calls[command])
    if command == "quantize":
        yield printed(alphaq, *calls[command][:-1], scratch / "coded", "--codec", "zstd")
    if command == "verify":
        yield printed(alphaq, *calls[command][:2], "--workers", 1)


@pytest.mark.parametrize(  # bench measures every kernel, for two minutes
    "command", [pytest.param(name, marks=[pytest.mark.slow] * (name == "bench")) for name in TEXT_FREE]
)
def test_json_has_the_documented_keys(
    alphaq: Callable[..., Ran], made: Mapping[str, Path], tmp_path: Path, command: str
) -> None:
    for found in keys_of(alphaq, command, made, tmp_path):
        assert found - {"codec"} == promised(command) - {"codec"}


@pytest.mark.slow
@pytest.mark.parametrize("command", WITH_TEXT)
def test_json_of_commands_that_run_the_model_has_the_documented_keys(
    alphaq: Callable[..., Ran], tiny: Path, tiny_quantized: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_quantized, out)
    text = tmp_path / "text.txt"
    text.write_text("def main():\n    return 1\n\n" * 60)
    scored = ("--text", text, "--max-tokens", 128, "--window", 64)
    few = ("--gradients", 8, "--tokens", 256)
    calls: dict[str, tuple[object, ...]] = {
        "card": ("card", out),
        "certify": ("certify", out, "--reference", tiny, *scored, "-o", tmp_path / "certificate.json"),
        "eval": ("eval", out, "--reference", tiny, *scored),
        "generate": ("generate", out, "def"),
        "skip": ("skip", out, *scored, "--shares", "0.5", "--prompt", 4, "--steps", 2, "--rounds", 1),
        "prune": ("prune", tiny, "--experts", 7, "-o", tmp_path / "pruned"),
        "report": ("report", out, "-o", tmp_path / "report.html"),
        "plot": ("plot", "bits", out, "-o", tmp_path / "bits.svg"),
        "compare": ("compare", tiny, *scored, "--methods", "uniform", "--bits", "2", "-o", tmp_path / "compared"),
        "demo": ("demo", "-o", tmp_path / "demo"),
        "refine": ("refine", tiny, "--plan", tiny_quantized / "plan.json", *few, "-o", tmp_path / "refined.json"),
        "imatrix": ("imatrix", tiny, "--tokens", 64, "--window", 32, "-o", tmp_path / "imatrix.gguf"),
        "fit": ("fit", tiny, "--method", "distortion", "--choices", "Q4_0,Q8_0", "--memory", "1GiB"),
    }
    found = printed(alphaq, *calls[command])
    if command == "plot":
        assert {"kind", "output"} <= found <= {"kind", "output", "matrices", "runs"}
    else:
        assert found == promised(command)


def test_every_command_that_prints_json_is_documented() -> None:
    import documentation

    commands = documentation.command_line().commands
    with_json = {name for name, one in commands.items() if any("--json" in parameter.opts for parameter in one.params)}
    assert {name.strip("`") for name in rows(section(FORMATS, "## JSON output"))} - {"command"} == with_json
    assert with_json == {*TEXT_FREE, *WITH_TEXT}
