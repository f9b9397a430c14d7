"""What the documentation says to type exists, and what can be run here does run."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import documentation
from alphaq.planning import passes
from conftest import DATA, ROOT, USUAL_WINDOWS, Ran
from documentation import HISTORY, OTHER_OPTIONS, PAGES, PARSED_ONLY, Block, blocks, only_parsed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Run = Callable[..., Ran]
PLACEHOLDERS = {model: str(DATA / "tiny") for model in ("MODEL", "Qwen/Qwen3-30B-A3B", "src/alphaq/data/tiny")}
PLACEHOLDERS |= {
    f"src/alphaq/data/texts{end}": str(DATA / "texts") + end
    for end in ("", *(f"/{x.name}" for x in DATA.glob("t*/*.txt")))
}
CONTEXT = 1024  # the longest of the bundled model
TEXTS = ("my", "your", "code", "dict", "tech", "eval", "mixed")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def pages(*without: str) -> list[object]:
    return [pytest.param(page, id=name_of(page)) for page in PAGES if name_of(page) not in without]


def complaint(error: Exception) -> str:
    return error.format_message() if hasattr(error, "format_message") else str(error)


@pytest.mark.parametrize("page", pages())
def test_every_command_exists_with_its_options_and_values(page: Path) -> None:
    wrong = []
    for block in blocks(page):
        for line in block.commands():
            if line.startswith("alphaq ") and not re.match(r"alphaq +[\d.]+ ", line) and "KIND RUN" not in line:
                values = "GAMMA" not in line  # a command of the log with letters for its numbers
                try:
                    documentation.check_command(line) if values else documentation.parsed(re.sub("BITS", "2", line))
                except Exception as error:
                    wrong.append(f"{block.where}: {line}: {complaint(error)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "alphaq plann MODEL --bits 2.5",
        "alphaq plan MODEL --bitz 2.5",
        "alphaq plan MODEL --bits two",
        "alphaq plan MODEL",
        "alphaq plan MODEL --bits 2.5 --size 1GiB",
        "alphaq plan MODEL --bits 2.5 --method alhpaq",
        "alphaq plan MODEL --bits 2.5 --engine llama",
        "alphaq plan MODEL --bits 2.5 --choices 2g99",
        "alphaq plan MODEL --bits 2.5 --tail hills",
        "alphaq plan MODEL --bits 2.5 --pin down",
        "alphaq quantize MODEL --bits 2.5",
        "alphaq quantize MODEL --bits 2.5 -o OUT --quantizer gptx",
        "alphaq compare MODEL --text my.txt --methods uniform,alphaq:gama=1 -o RESULTS",
        "alphaq plot bitz OUT -o bits.svg",
        "alphaq recode OUT -o SMALL --codec zip",
    ],
)
def test_a_mistake_in_a_command_is_found(line: str) -> None:
    with pytest.raises(Exception) as found:
        documentation.check_command(line)
    assert complaint(found.value)  # type: ignore[arg-type]


@pytest.mark.parametrize("page", pages(*HISTORY))
def test_options_and_commands_in_the_text_exist(page: Path) -> None:
    known = documentation.every_option() | set(OTHER_OPTIONS)
    wrong = []
    for code in documentation.inline_code(page):
        if re.match(r"python (scripts|benchmarks)/", code):
            continue  # the next test looks into the script
        wrong += [
            f"{option} in `{code}`" for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code) if option not in known
        ]
        words = code.split()
        if words[:1] == ["alphaq"] and len(words) > 1 and not words[1].startswith("-"):
            command = documentation.command_line().commands.get(words[1])
            if command is None:
                wrong.append(f"command in `{code}`")
                continue
            own = documentation.options_of(command)
            wrong += [f"{word} in `{code}`" for word in words if re.match("--[a-z]", word) and word not in own]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", pages())
def test_make_targets_extras_and_scripts_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    lines = [line for block in blocks(page) for line in block.commands()]
    lines += [code for code in documentation.inline_code(page) if re.match(r"(make|pip|python) ", code)]
    wrong = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "make" and words[1] not in targets:
            wrong.append(line)
        elif words[0] == "pip":
            asked = re.findall(r"(?:alphaq|\.)\[([\w,-]+)\]", line)
            wrong += [line for extra in ",".join(asked).split(",") if extra and extra not in extras]
        elif words[0] == "python" and re.match(r"(scripts|benchmarks)/", words[1]):
            script = ROOT / words[1]
            options = [word for word in words[2:] if re.match("--[a-z]", word)]
            texts = [path.read_text() for path in (script, ROOT / "benchmarks" / "common.py") if path.is_file()]
            if not script.is_file() or any(f'"{option}"' not in "".join(texts) for option in options):
                wrong.append(line)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", pages())
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in documentation.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in documentation.anchors(target)):
            wrong.append(link)
    assert not wrong, f"{name_of(page)}: {', '.join(wrong)}"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    here = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(here | {"CONTRIBUTING.md", "CHANGELOG.md"})


def test_a_wrong_anchor_is_found() -> None:
    known = documentation.anchors(ROOT / "docs" / "planning.md")
    assert "the-budget" in known and "γ" in known and "why-this-matrix" in known
    assert "the-bugdet" not in known


@pytest.mark.parametrize("page", pages())
def test_python_and_toml_blocks_are_sound(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, block.where, "exec")
        elif block.language == "toml":
            tomllib.loads(block.text)


def test_what_is_only_parsed_is_still_there() -> None:
    """A pattern that names nothing any more would hide a new command from the tests."""
    every = [line for page in PAGES for block in blocks(page) for line in (*block.commands(), block.text)]
    for pattern in PARSED_ONLY:
        assert any(re.search(pattern, text) for text in every), pattern


def names_in_reference() -> list[str]:
    return re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", names_in_reference())
def test_names_of_the_reference_are_there_and_have_docstrings(name: str) -> None:
    if name == "alphaq.errors":
        found = importlib.import_module(name)
    else:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
    assert isinstance(found, dict) or (found.__doc__ or "").strip()


def test_functions_of_the_python_page_are_in_the_reference() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    asked = re.findall(r"^\| `(\w+)\(", page, re.MULTILINE)
    assert {"open_checkpoint", "quantize", "compare"} <= set(asked)
    assert set(asked) <= {name.rpartition(".")[2] for name in names_in_reference()}


# Running what is documented


@pytest.fixture(scope="session")
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages share measurements, as a user's runs would."""
    return tmp_path_factory.mktemp("docs-cache")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_cache: Path, tiny_quantized: Path) -> Path:
    """A folder with what pages take for granted: a quantized model, its plan, short texts."""
    monkeypatch.setenv("ALPHAQ_CACHE", str(one_cache))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_quantized, "OUT")
    shutil.copy(tiny_quantized / "plan.json", "plan.json")
    bundled = sorted((DATA / "texts").glob("*.txt"))
    for at, name in enumerate(TEXTS):
        Path(f"{name}.txt").write_text(bundled[at % 3].read_text(encoding="utf-8")[:5000], encoding="utf-8")
    return tmp_path


def typed(line: str) -> list[str]:
    """A command's words, with a small model and a small budget for what the page leaves open."""
    line = re.sub(r"--size [\d.]+GiB", "--size 9MiB", line)
    line = re.sub(r"--context \d+", f"--context {CONTEXT}", line)
    return [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)[1:]]


def make_room(words: list[str]) -> None:
    """Remove a folder of an earlier command that this one would write anew."""
    if "-o" in words:
        there = Path(words[words.index("-o") + 1])
        if there.is_dir():
            shutil.rmtree(there)


def run_block(block: Block, alphaq: Run, scripts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run what a block says; returns how many commands or scripts that were."""
    done = 0
    page_text = block.page.read_text(encoding="utf-8")
    if block.language == "python":
        saved = re.search(rf"{re.escape(block.text)}\n```\n\nSave it as `(\w+\.py)`", page_text)
        if saved:
            scripts[saved[1]] = block.text
        elif only_parsed(block.text) is None:
            exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})
            done += 1
        return done
    for line in block.commands():
        words = typed(line)
        if line.startswith("python ") and words[0] in scripts:
            Path(words[0]).write_text(scripts[words[0]])
            told = io.StringIO()
            with monkeypatch.context() as patched, contextlib.redirect_stdout(told):
                patched.setattr(sys, "argv", words)
                for name, windows in USUAL_WINDOWS.items():  # what is printed is shown as a user sees it
                    patched.setattr(passes, name, windows)
                runpy.run_path(words[0], run_name="__main__")
            printed = re.search(
                rf"^    {re.escape(line)}\n\nIt prints[^\n]*:\n\n((?:    .*\n)+)", page_text, re.MULTILINE
            )
            assert printed, f"{block.where}: what {words[0]} prints is not shown"
            compare_printed(printed[1], told.getvalue(), block.where)
            done += 1
        elif line.startswith("alphaq ") and not re.match(r"alphaq +[\d.]+ ", line) and only_parsed(line) is None:
            make_room(words)
            ran = alphaq(*words)
            assert ran.code == 0, f"{block.where}: {line}\n{ran.err}"
            done += 1
    return done


def compare_printed(shown: str, told: str, where: str) -> None:
    """Words must be the same; numbers may differ a little between machines."""
    apart = re.compile(r"[\s{}:,]+")
    expected, found = (list(filter(None, apart.split(text))) for text in (shown, told))
    assert len(expected) == len(found), f"{where} prints\n{told}"
    for old, new in zip(expected, found, strict=True):
        if re.fullmatch(r"[\d.]+", old):
            slack = 0.0005 if "." in old else 2
            assert float(new) == pytest.approx(float(old), rel=0.02, abs=slack), f"{where} prints\n{told}"
        else:
            assert old == new, f"{where} prints\n{told}"


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(*HISTORY, "CONTRIBUTING.md"))
def test_the_commands_of_a_page_run_in_their_order(
    page: Path, desk: Path, alphaq: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts: dict[str, str] = {}
    done = sum(run_block(block, alphaq, scripts, monkeypatch) for block in blocks(page))
    print(f"{name_of(page)}: {done} run")  # noqa: T201, told by pytest -s


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat comes with the extra docs")
    nbclient = pytest.importorskip("nbclient", reason="nbclient comes with the extra docs")
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra plot")
    notebook = nbformat.read(ROOT / "docs" / "demo.ipynb", as_version=4)
    stored = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert any(stored), "the notebook has no outputs stored"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(output.output_type != "error" for cell in notebook.cells for output in cell.get("outputs", ()))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    import subprocess

    pytest.importorskip("mkdocs", reason="mkdocs comes with the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "measure_for_plan" in page and "What the request's method needs to know" in page
