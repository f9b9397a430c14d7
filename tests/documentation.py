"""What the documentation says to type: its blocks, the commands in them, and what of it is only read, not run."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HISTORY = ("docs/research/log.md", "CHANGELOG.md")
"""Pages that tell what was; commands there were true then."""

PARSED_ONLY = {
    r"--imatrix imatrix\.gguf": "needs a file that alphaq imatrix made",
    r"--converter ": "needs a checkout of llama.cpp",
    r"(model-bf16|some-other-\S+)\.gguf": "needs a GGUF file from elsewhere",
    r"certify .*--tasks": "needs the extra eval; tests/evaluation/test_tasks.py runs it",
    r"compare .*--skip-tokens (16384|24000)": "needs longer texts than those bundled, and hours",
    r"--cluster ray|(s3|gs|hf)://": "needs a cluster or a store; test_cluster.py and tests/checkpoint run them",
    r"plot KIND RUN": "a synopsis",
    r"alphaq refine MODEL|refined\.json": "minutes; tests/trials/test_refine.py runs it",
    r"^alphaq demo": "tests/cli/test_cli.py runs it",
    r"^alphaq bench$|--min-speed": "times the machine, which other work spoils; tests/trials/test_rates.py runs it",
    r"from gptqmodel import": "needs GPTQModel, which asks for another torch",
}
"""Commands (and Python) that the tests read but do not run: a pattern of the text, and why."""

OTHER_OPTIONS = {
    "--tensor-type-file": "llama-quantize",
    "--target-bpw": "proposed for llama.cpp",
    "--target-size": "proposed for llama.cpp",
    "--enforce-eager": "vLLM",
    "--load-format": "vLLM",
    "--tensor-parallel-size": "vLLM",
    "--enable-expert-parallel": "vLLM",
    "--data-parallel-size": "vLLM",
    "--pipeline-parallel-size": "vLLM",
    "--no-deps": "pip",
    "--layers": "benchmarks",
    "--cases": "benchmarks",
    "--only": "benchmarks",
    "--scratch": "benchmarks",
    "--strict": "mkdocs",
}
"""Options of other programs that the text mentions."""


@dataclass(frozen=True)
class Block:
    """Code of a page. language: of a fenced block; empty for an indented one."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> Iterator[str]:
        """Its lines with continuations joined, without those that are no command."""
        joined = re.sub(r"\\\n\s*|,\n(?=\S*,?)(?=[a-z-]+[,:\s])", lambda m: " " if m[0][0] == "\\" else ",", self.text)
        for line in joined.split("\n"):
            if re.match(r"(alphaq|pip|make|python) ", line.strip()):
                yield line.strip()


@functools.cache
def blocks(page: Path) -> tuple[Block, ...]:
    """Fenced and indented blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").split("\n")
    at = 0
    while at < len(lines):
        start, fence = at, re.match(r"( *)```(\w*)", lines[at])
        if fence:
            at += 1
            while not lines[at].strip().startswith("```"):
                at += 1
            text = "\n".join(line[len(fence[1]) :] for line in lines[start + 1 : at])
            found.append(Block(page, start + 2, fence[2], text))
        elif lines[at].startswith("    ") and not (at and lines[at - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            text = "\n".join(line[4:] for line in lines[start:at]).rstrip()
            found.append(Block(page, start + 1, "", text))
            continue
        at += 1
    return tuple(found)


def prose(page: Path) -> str:
    """A page without its blocks."""
    lines = page.read_text(encoding="utf-8").split("\n")
    for block in blocks(page):
        for at in range(block.line - 1, block.line - 1 + block.text.count("\n") + 1):
            lines[at] = ""
    return "\n".join(lines)


def inline_code(page: Path) -> list[str]:
    """Code within the text of a page."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page).replace("```", ""))]


def only_parsed(text: str) -> str | None:
    """Why this command or Python block is not run, or None if it is."""
    return next((why for pattern, why in PARSED_ONLY.items() if re.search(pattern, text)), None)


@functools.cache
def command_line() -> Any:
    from alphaq.cli.app import app

    return typer.main.get_command(app)


def options_of(command: Any) -> set[str]:
    return {"--help"} | {name for one in command.params for name in (*one.opts, *one.secondary_opts)}


def every_option() -> set[str]:
    """Options of any command."""
    return {"--version", "--install-completion", "--show-completion"}.union(
        *(options_of(one) for one in command_line().commands.values())
    )


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """A command's name and its parameters. Raises what the command line would raise for a mistake."""
    words = shlex.split(line, comments=True)[1:]
    known = command_line().commands
    if words[0] not in known:
        raise ValueError(f"no command {words[0]!r}")
    return words[0], known[words[0]].make_context(words[0], words[1:]).params


def check_command(line: str) -> None:
    """Raise if `alphaq …` names a command, option or value that does not exist, or lacks one it must have."""
    from alphaq.cli.inputs import Inputs
    from alphaq.cli.options import Asked
    from alphaq.cli.planning import plan_config
    from alphaq.cli.plot import KINDS
    from alphaq.formats.versions import CODECS
    from alphaq.nouns.option import settings_of
    from alphaq.nouns.settings import Budget, PlanConfig
    from alphaq.quantizers.base import QUANTIZERS
    from alphaq.registry import lookup
    from alphaq.sensitivity.methods import method

    name, given = parsed(line)
    for quantizer in filter(None, (given.get("quantizer") or given.get("quantizers") or "").split(",")):
        lookup("--quantizer", QUANTIZERS, quantizer)
    for one in filter(None, (given.get("methods") or "").split(",")):
        method(one.partition(":")[0])
        for setting in one.split(":")[1:]:
            if (key := setting.partition("=")[0]) not in PlanConfig.model_fields:
                raise ValueError(f"no setting {key!r} of a method")
    if "kind" in given:
        lookup("kind of plot", KINDS, given["kind"])
    if name == "recode":
        lookup("--codec", dict.fromkeys(CODECS), given["codec"])
    if name in ("plan", "slice", "quantize") and not given.get("plan_file"):
        if given.get("min_speed"):
            given["bandwidth"] = given["bandwidth"] or "10GB/s"  # the machine's own would be measured, for minutes
        settings = settings_of(PlanConfig)
        asked = Asked(PlanConfig, {key: given.get(one.parameter, one.default) for key, one in settings.items()}, {})
        inputs = Inputs(calibration=given.get("calibration") and "self")  # a file would not be here
        later = given.get("ear") or given.get("memory")  # a budget that only a model tells
        budget = None if later is None else Budget(bpw=4.0)
        plan_config(asked, inputs, given.get("model", "") is not None, budget)


def slug(heading: str) -> str:
    """The anchor of a heading, as the code host makes it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    found: dict[str, int] = {}
    every = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(page), re.MULTILINE):
        name = slug(heading)
        every.add(name if name not in found else f"{name}-{found[name]}")
        found[name] = found.get(name, 0) + 1
    return frozenset(every)


def links(page: Path) -> list[str]:
    """Relative links and images of a page."""
    return re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", prose(page))
