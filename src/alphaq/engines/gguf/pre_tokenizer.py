"""The rule by which a tokenizer cuts a text into words, by llama.cpp's name for it.

llama.cpp knows these rules by name only. The names of common ones are in pre_tokenizers.toml, beside the rules as
tokenizer.json spells them.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from alphaq.errors import CheckpointError
from alphaq.work.untrusted import JsonObject

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class PreTokenizer:
    """One rule that llama.cpp has.

    steps: as `steps_of` spells them. normalizer: a normalizer that the tokenizer must have; ignore_merges: what it must
    say of merges; None for whatever.
    """

    name: str
    steps: tuple[str, ...]
    normalizer: str | None = None
    ignore_merges: bool | None = None


@lru_cache(maxsize=1)
def pre_tokenizers() -> tuple[PreTokenizer, ...]:
    """The table, in its order: the first that fits counts."""
    text = (files("alphaq.engines.gguf") / "pre_tokenizers.toml").read_text(encoding="utf-8")
    entries = tomllib.loads(text)["pre_tokenizer"]
    return tuple(PreTokenizer(**{**entry, "steps": tuple(entry["steps"])}) for entry in entries)


def recognised(tokenizer: JsonObject, folder: Path) -> str:
    """llama.cpp's name for the pre-tokenizer. Raises CheckpointError if it has none that is known."""
    steps = tuple(steps_of(tokenizer))
    normalizers = [part["type"] for part in parts_of(tokenizer.get("normalizer"))]
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    for rule in pre_tokenizers():
        if (
            rule.steps == steps
            and rule.normalizer in (None, *normalizers)
            and rule.ignore_merges in (None, ignore_merges)
        ):
            return rule.name
    rules, known = " then ".join(steps) or "nothing", ", ".join(rule.name for rule in pre_tokenizers())
    raise CheckpointError(
        f"{folder / 'tokenizer.json'} cuts texts into words by {rules}, a rule whose name in llama.cpp is not known "
        f"here. Name it with --pre-tokenizer NAME; llama.cpp has {known} and more."
    )


def steps_of(tokenizer: JsonObject) -> Iterator[str]:
    """A pre-tokenizer's steps as pre_tokenizers.toml spells them."""
    for part in parts_of(tokenizer.get("pre_tokenizer")):
        if part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
            if part.get("use_regex", True):
                yield "ByteLevel"
        elif part["type"] == "Digits" and part.get("individual_digits"):
            yield "Digits"
        elif part["type"] == "Split" and (part["behavior"], part["invert"]) in (("Isolated", False), ("Removed", True)):
            regex = part["pattern"].get("Regex") or re.escape(part["pattern"]["String"])
            yield unicodedata.normalize("NFC", regex).replace("\r", r"\r").replace("\n", r"\n")
        else:
            yield json.dumps(part, ensure_ascii=False)


def parts_of(entry: JsonObject | None) -> Iterator[JsonObject]:
    """A rule of tokenizer.json, or all that it is made of."""
    if entry is None:
        return
    if entry["type"] != "Sequence":
        yield entry
    for key in ("normalizers", "pretokenizers", "decoders"):
        for part in entry.get(key, []):
            yield from parts_of(part)
