"""Write docs/engines/settings.md: `PYTHONPATH=src:tests:tests/engines python scripts/settings_table.py`.

Each cell is what an engine's export says of a tiny random model whose config has that setting; the slow tests of
tests/engines/test_settings.py run every model that is not refused.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import transformers
from flips import ENGINES, FLIPS, engines_of, named_setting, refusal, save_flipped

from alphaq.checkpoint.families.architecture import architectures
from alphaq.engines.assumptions.tables import family_settings

PAGE = Path(__file__).parents[1] / "docs" / "engines" / "settings.md"
HEAD = """# Settings by engine

A config has settings that an engine may overlook: it loads the file and answers otherwise. So each is carried over, or
proven to change nothing, or refused by its name before any work. What an engine takes for granted of a family is a list
beside its code (`src/alphaq/engines/assumptions/ENGINE.toml`; for llama.cpp also `[gguf.config]` of the
[architecture file](../architectures.md#gguf)). A setting that no line names must have the default of the family's class
in transformers.

The tables show tiny random models whose config differs in one setting (tests/engines/flips.py). *carried*: the
engine's logits are those of transformers {version} with the restored weights. *neutral*: the engine does not read it,
and it changes nothing there. *refused*: `plan` and `quantize` stop and name the setting.

llama.cpp, mlx-lm and our runtime (native) are run by the test suite, vLLM's files by transformers with
compressed-tensors, and by vLLM itself in `make test-vllm`; what vLLM carries was otherwise read in its source (0.32).
GPTQModel fills transformers' own class. This page is written by `scripts/settings_table.py`.

Whether an engine computes with one model what it should, with any setting, is what
`alphaq verify OUT --reference MODEL --run` shows. A dash: files of this
family are not written for the engine from a folder.
"""


def verdict(folder: Path, engine: str, family: str, flip: str) -> str:
    """One cell."""
    if (why := refusal(folder, engine)) is not None:
        named = named_setting(why)
        return "refused" if named.partition(".")[0] == next(iter(FLIPS[family][flip])) else f"refused ({named})"
    known = family_settings(engine, architectures()[family])
    return "neutral" if set(FLIPS[family][flip]) <= known.neutral else "carried"


def flip_rows(family: str) -> Iterator[str]:
    """A line for each flip of a family."""
    for flip, changes in FLIPS[family].items():
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(open(os.devnull, "w")):  # noqa: PTH123
            folder = save_flipped(Path(scratch), family, flip)
            cells = [verdict(folder, one, family, flip) if one in engines_of(family) else "–" for one in ENGINES]
        names = ", ".join(f"`{name}`" for name in changes)
        shown = f"`{flip}`" if flip in changes else f"{flip} ({names})"
        yield f"| {shown} | {' | '.join(cells)} |"


def fixed_rows(engine: str) -> Iterator[str]:
    """What an engine takes for granted, by family."""
    for family in (one for one in FLIPS if engine in engines_of(one)):
        known = family_settings(engine, architectures()[family])
        rules = "; ".join(f"`{name}`: {rule}" for name, rule in sorted(known.fixed.items()))
        kinds = ", ".join(sorted(known.lines.rope))
        if not known.everything:
            yield f"| {family} | {kinds} | {rules} |"


def page() -> str:
    """The whole page."""
    lines = [HEAD.format(version=transformers.__version__)]
    for family in FLIPS:
        lines += [f"## {family}", "", f"| setting | {' | '.join(ENGINES)} |", f"|---|{'---|' * len(ENGINES)}"]
        lines += [*flip_rows(family), ""]
    lines += ["## What an engine takes for granted", ""]
    for engine in ENGINES:
        if rows := list(fixed_rows(engine)):
            lines += [
                f"### {engine}",
                "",
                "| family | rotary embeddings | settings and their values |",
                "|---|---|---|",
            ]
            lines += [*rows, ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    PAGE.write_text(page(), encoding="utf-8")
