"""ENGINE.toml, read: what an engine makes of each family's settings, and where it has places for tensors."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.resources import files
from typing import Literal

from alphaq.checkpoint.families.architecture import Architecture
from alphaq.checkpoint.families.formulas import Assumption, names_in
from alphaq.engines.assumptions.rules import Derived, Fixed
from alphaq.work.untrusted import JsonObject

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROPE = "rope_parameters"

Verdict = Literal["carried", "neutral", "fixed"]


@dataclass(frozen=True)
class Lines:
    """What is said of all families with experts, or of one of them.

    carried: settings that the engine reads. neutral: those that change nothing it computes. fixed: those that it takes
    for granted; None lifts for one family what holds for all. rope: parameters that it reads, by type of rotary
    embedding. rope_types: those of these types that were tried with a family; all, if none are listed. tensors:
    templates of stored names that it has a place for, beside those of the family's `[gguf.tensors]`. prediction_layers:
    whether it has a place for layers after the last. written: what config.json must say and may lack. derived: settings
    that the engine looks for, made of those of the family. names: what it calls a part of a stored name, or, after ^,
    its beginning; one after another, each in what those before have left. modules: likewise what it calls a part of a
    module's name, where that is not the stored one. stacked: whether a layer's experts lie in one module. kept: parts
    of names of matrices that it must have in 16 bits, and why. taken: modules of a layer that it takes quantized, as
    regular expressions, for engines that ask. wrapped: "also" where it runs this language model inside another one,
    "always" where it has it there even if it is alone.
    """

    carried: frozenset[str] = frozenset()
    neutral: frozenset[str] = frozenset()
    fixed: Mapping[str, Fixed | None] = field(default_factory=dict)
    rope: Mapping[str, frozenset[str]] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    prediction_layers: bool = False
    written: JsonObject = field(default_factory=dict)
    derived: Mapping[str, Derived] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    stacked: bool = True
    kept: Mapping[str, str] = field(default_factory=dict)
    taken: tuple[str, ...] = ()
    wrapped: Literal["", "also", "always"] = ""

    @classmethod
    def parse(cls, table: JsonObject) -> Lines:
        """Raises TypeError for a word that is not known."""
        rules = {name: None if rule == {} else Fixed.parse(rule) for name, rule in table.get("fixed", {}).items()}
        read = {kind: frozenset(names) for kind, names in table.get("rope", {}).items()}
        sets = {key: frozenset(table.get(key, ())) for key in ("carried", "neutral")}
        made = {name: Derived.parse(entry) for name, entry in table.get("derived", {}).items()}
        own = {"fixed": rules, "rope": read, "derived": made, "tensors": tuple(table.get("tensors", ()))}
        own |= {key: tuple(table.get(key, ())) for key in ("taken", "rope_types")}
        return cls(**{**table, **sets, **own})

    def and_of(self, family: Lines) -> Lines:
        """With what is said of one family, which goes before."""
        rope = {**self.rope, **family.rope}
        return replace(
            family,
            carried=self.carried | family.carried,
            neutral=self.neutral | family.neutral,
            fixed={**self.fixed, **family.fixed},
            rope={kind: rope[kind] for kind in family.rope_types or rope},
            tensors=self.tensors + family.tensors,
            taken=self.taken + family.taken,
        )

    def called(self, tensor: str) -> str:
        """The engine's name of what the family's files call so."""
        return _renamed(tensor, self.names)

    def called_module(self, module: str) -> str:
        """The engine's name of a module of which the files have another."""
        return _renamed(module, self.modules)


def _renamed(name: str, others: Mapping[str, str]) -> str:
    for part, other in others.items():
        if not part.startswith("^"):
            name = name.replace(part, other)
        elif name.startswith(part[1:]):
            name = other + name.removeprefix(part[1:])
    return name


@dataclass(frozen=True)
class EngineTable:
    """One ENGINE.toml.

    families: those with experts whose export has been run there, by name or by `model_type`. everything: whether it
    computes with transformers' own class, which carries every setting. wrapped: whether it runs language models that
    lie beside others. architecture_file: whether the `[gguf]` table of a family's own file says more: `metadata` of
    what is carried, `config` of what is taken for granted. dense: families without experts that it loads, by
    `model_type`, and what it takes for granted of each. refused: families that it has a program for and that are not
    written for it, and what it does: it cannot load them, or computes otherwise, or does so where it was not tried.
    notes: what to know of families that it loads.
    """

    common: Lines
    families: Mapping[str, Lines]
    dense: Mapping[str, Mapping[str, Assumption]]
    everything: bool = False
    wrapped: bool = False
    architecture_file: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FamilySettings:
    """One family in one engine. lines: of all families and of this one. everything: see `EngineTable`."""

    engine: str
    family: str
    lines: Lines
    everything: bool = False

    @property
    def carried(self) -> frozenset[str]:
        """Settings that the engine reads."""
        return self.lines.carried | {name for name, rule in self.lines.fixed.items() if rule is None}

    @property
    def neutral(self) -> frozenset[str]:
        """Settings that change nothing that it computes."""
        return self.lines.neutral

    @property
    def fixed(self) -> dict[str, Fixed]:
        """Settings that it takes for granted."""
        return {name: rule for name, rule in self.lines.fixed.items() if rule is not None}

    @property
    def listed(self) -> frozenset[str]:
        """Settings that some line names, without those inside others."""
        return self.carried | self.neutral | {name.partition(".")[0] for name in self.fixed} | {ROPE}

    def verdict(self, setting: str) -> Verdict:
        """What becomes of a setting; one that no line names is fixed to the default of its class."""
        if setting in self.fixed:
            return "fixed"
        if setting in self.neutral:
            return "neutral"
        return "carried" if self.everything or setting in self.carried else "fixed"


def family_lines(engine: str, architecture: Architecture, model_type: object = None) -> Lines:
    """What is said of a family alone, or of those of its models that have a table of their own by `model_type`."""
    families = engine_table(engine).families
    own = model_type in architecture.model_types and model_type in families
    return families.get(str(model_type) if own else architecture.name, Lines())


def family_settings(engine: str, architecture: Architecture, model_type: object = None) -> FamilySettings:
    """What an engine makes of a family's settings; for one without lines of its own, what holds for all."""
    table = engine_table(engine)
    lines = table.common.and_of(family_lines(engine, architecture, model_type))
    if table.architecture_file and architecture.gguf is not None:
        mapping = architecture.gguf
        said = {name for key in mapping.metadata.values() for formula in key.config for name in names_in(formula)}
        granted = {name: Fixed((*rule.values, None)) for name, rule in mapping.config.items()}
        lines = Lines(frozenset(said), fixed=granted).and_of(lines)
    return FamilySettings(engine, architecture.name, lines, table.everything)


def place_pattern(known: FamilySettings, architecture: Architecture) -> re.Pattern[str] | None:
    """Names of stored tensors that the engine has a place for; None where no list of them exists."""
    if architecture.gguf is None:
        return None
    templates = [source for rule in architecture.gguf.tensors for source in rule.sources]
    fields = {"layer": r"(?P<layer{}>\d+)", "expert": r"\d+", "part": r"\w+"}
    patterns = []
    for number, template in enumerate([*templates, *known.lines.tensors]):
        pieces = re.split(r"\{(\w+)\}", template)
        patterns.append("".join(fields[p].format(number) if i % 2 else re.escape(p) for i, p in enumerate(pieces)))
    return re.compile("|".join(patterns))


@lru_cache(maxsize=16)
def engine_table(engine: str) -> EngineTable:
    """What lies beside this module for an engine; nothing for one that takes nothing for granted but defaults."""
    table = _read(engine)
    families = {family: Lines.parse(lines) for family, lines in table.pop("families", {}).items()}
    dense, refused, notes = (table.pop(key, {}) for key in ("dense", "refused", "notes"))
    flags = {key: table.pop(key) for key in ("everything", "wrapped", "architecture_file") if key in table}
    common = Lines(neutral=frozenset(_read("common")["neutral"])).and_of(Lines.parse(table))
    granted = {
        family: {key: Assumption.parse(entry) for key, entry in _extended(dense, family).items()} for family in dense
    }
    return EngineTable(common, families, granted, **flags, refused=refused, notes=notes)


def _extended(tables: Mapping[str, JsonObject], family: str) -> JsonObject:
    """A family's table with what it takes over from the one that it extends."""
    own = dict(tables[family])
    base = own.pop("extends", None)
    return own if base is None else {**_extended(tables, base), **own}


def _read(name: str) -> JsonObject:
    path = files("alphaq.engines") / "assumptions" / f"{name}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
