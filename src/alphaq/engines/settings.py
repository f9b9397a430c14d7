"""What an engine makes of a config's settings: each is carried, changes nothing, or is taken for granted.

An engine has its own program for each family. It reads some settings, and computes with a fixed value of others
whatever the config says. What is what lies beside this module, in `assumptions/ENGINE.toml`, by family; a setting that
no line names must have the default of the family's class in transformers, so that one which is new there is refused
instead of ignored.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from alphaq.checkpoint.families.architecture import Architecture
from alphaq.checkpoint.families.formulas import evaluated, looked_up, names_in
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.dense import require_assumptions
from alphaq.engines.effective import config_class, effective_config, settings_of, understood
from alphaq.errors import ArchitectureError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UNSET = "none"
"""How a table of allowed values writes null, which TOML lacks."""
ROPE = "rope_parameters"
RUN_BY_THE_CLASS = ("native", "gptqmodel")
"""Engines that run the model's own class in transformers."""
_ATTENTION_BIAS = re.compile(r".*\.self_attn\.[qkvo]_proj\.bias")
_BIASES = {
    "attention_bias": _ATTENTION_BIAS,
    "qkv_bias": _ATTENTION_BIAS,
    "mlp_bias": re.compile(r".*\.mlp\.(gate|up|down)_proj\.bias"),
}
"""Settings that switch biases, and what these are called."""
_ROPE_ALWAYS = ("rope_type", "type", "rope_theta")

Verdict = Literal["carried", "neutral", "fixed"]


@dataclass(frozen=True)
class Fixed:
    """What an engine takes for granted of one setting.

    values: what it may be. equals: a formula of other settings that it may be, too. never: what it may not be. when,
    unless: values of other settings under which this holds, or does not; always by default.
    """

    values: tuple[Any, ...] = ()
    equals: str = ""
    never: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unless: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, entry: Any) -> Fixed:
        """A list of values, or a table."""
        table = entry if isinstance(entry, dict) else {"values": entry}
        values, never = (tuple(_value(one) for one in table.get(key, ())) for key in ("values", "never"))
        when, unless = (
            {name: tuple(map(_value, given)) for name, given in table.get(key, {}).items()}
            for key in ("when", "unless")
        )
        return cls(values, table.get("equals", ""), never, when, unless)

    def allows(self, value: Any, config: Mapping[str, Any]) -> bool:
        """Whether the engine computes with this value."""
        if not all(looked_up(name, config) in given for name, given in self.when.items()):
            return True
        if any(looked_up(name, config) in given for name, given in self.unless.items()):
            return True
        allowed = [*self.values, *([evaluated(self.equals, config)] if self.equals else [])]
        if allowed and not any(_same(value, one) for one in allowed):
            return False
        return not any(_same(value, one) for one in self.never)

    def __str__(self) -> str:
        """What is allowed, in words."""
        said = [f"the value of {self.equals}"] if self.equals else [_listed(self.values)] if self.values else []
        said += [f"anything but {_listed(self.never)}"] if self.never else []
        under = "".join(f", with {name} {_listed(given)}" for name, given in self.when.items())
        other = "".join(f", unless {name} is {_listed(given)}" for name, given in self.unless.items())
        return " or ".join(said) + under + other


@dataclass(frozen=True)
class FamilySettings:
    """One family in one engine.

    carried: settings that the engine reads. neutral: those that change nothing it computes. fixed: those that it takes
    for granted. rope: parameters that it reads, by type of rotary embedding. tensors: templates of stored names that
    it has a place for, beside those of the family's `[gguf.tensors]`. prediction_layers: whether it has a place for
    layers after the last. written: what config.json must say and may lack. everything: whether it computes with
    transformers' own class, which carries every setting.
    """

    engine: str
    family: str
    carried: frozenset[str]
    neutral: frozenset[str]
    fixed: Mapping[str, Fixed]
    rope: Mapping[str, frozenset[str]]
    tensors: tuple[str, ...] = ()
    prediction_layers: bool = False
    written: Mapping[str, Any] = field(default_factory=dict)
    everything: bool = False

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


def family_settings(engine: str, architecture: Architecture) -> FamilySettings:
    """What an engine makes of a family's settings; for one without lines of its own, what holds for all."""
    room = _room(engine)
    own = room.get("families", {}).get(architecture.name, {})
    both = [room, own]
    entries = {name: entry for part in both for name, entry in part.get("fixed", {}).items()}
    carried = {name for part in both for name in part.get("carried", ())}
    carried |= {name for name, entry in entries.items() if entry == {}}  # fixed in other families
    fixed = {name: Fixed.parse(entry) for name, entry in entries.items() if entry != {}}
    if engine == "llama.cpp" and architecture.gguf is not None:
        mapping = architecture.gguf
        carried |= {name for key in mapping.metadata.values() for said in key.config for name in names_in(said)}
        fixed = {name: Fixed((*said.values, None)) for name, said in mapping.config.items()} | fixed
    return FamilySettings(
        engine,
        architecture.name,
        frozenset(carried),
        frozenset({*_common()["neutral"], *(name for part in both for name in part.get("neutral", ()))}),
        fixed,
        {kind: frozenset(names) for part in both for kind, names in part.get("rope", {}).items()},
        tuple(template for part in both for template in part.get("tensors", ())),
        own.get("prediction_layers", False),
        own.get("written", {}),
        room.get("everything", False),
    )


def require_settings(checkpoint: Checkpoint, engine: str) -> dict[str, Any]:
    """The config as the engine must be told it. Raises ArchitectureError for a setting that it computes otherwise.

    A GGUF file's own metadata are carried over as they are, so nothing is asked of them.
    """
    if engine not in RUN_BY_THE_CLASS:
        _require_no_idle_biases(checkpoint, engine)
    if not checkpoint.architecture.num_experts_keys:
        if engine == "llama.cpp" and (mapping := checkpoint.architecture.gguf) is not None:
            require_assumptions(checkpoint, engine, mapping.arch, mapping.config)
        return settings_of(checkpoint)  # other engines' assumptions are asked for with the family (dense.py)
    config = effective_config(checkpoint)
    known = family_settings(engine, checkpoint.architecture)
    if checkpoint.gguf is None:
        _require_plain(checkpoint, engine)
        for name, value in _refused(checkpoint, known, config):
            raise ArchitectureError(_why(known, name, value))
    return {**config, **{key: value for key, value in known.written.items() if config.get(key) is None}}


def _require_no_idle_biases(checkpoint: Checkpoint, engine: str) -> None:
    """ArchitectureError for stored biases that the config switches off: the class leaves them out, engines do not."""
    config = settings_of(checkpoint)
    for setting, pattern in _BIASES.items():
        stored = next((name for name in checkpoint.shard_of if pattern.fullmatch(name)), None)
        if config.get(setting) is False and stored is not None and checkpoint.gguf is None:
            raise ArchitectureError(
                f"config.json: {setting} is false, so the model's class leaves {stored} out, and {engine} would use "
                "it. Remove the biases from the checkpoint, or correct the setting."
            )


def _require_plain(checkpoint: Checkpoint, engine: str) -> None:
    if engine != "native" and checkpoint.text_config != checkpoint.config:
        raise ArchitectureError(
            f"config.json: {checkpoint.config.get('model_type')!r} holds its language model beside others. It is only "
            f"known how {engine} runs language models alone. Use --engine native."
        )


def _refused(checkpoint: Checkpoint, known: FamilySettings, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings that the engine computes otherwise, with their values."""
    for name, rule in known.fixed.items():
        value = looked_up(name, config)
        if not rule.allows(value, config):
            yield name, value
    if known.everything:
        return
    yield from _refused_rope(known, config)
    cls = config_class(checkpoint)
    if cls is None:
        return
    # What follows from the settings that are listed, such as a list of one kind of attention, counts as default.
    defaults = understood(cls, {key: value for key, value in config.items() if key in known.listed})
    for name in understood(cls, {}).keys() - known.listed:
        if not _same(config.get(name), defaults.get(name)):
            yield name, config[name]


def _refused_rope(known: FamilySettings, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Rotary embeddings of a type that the engine lacks, or parameters that it does not read."""
    rope = config.get(ROPE)
    if not isinstance(rope, dict):
        return
    nested = {f"{ROPE}.{kind}": part for kind, part in rope.items() if isinstance(part, dict)}
    for path, part in (nested or {ROPE: rope}).items():
        kind = part.get("rope_type", "default")
        if not isinstance(kind, str) or kind not in known.rope:
            yield f"{path}.rope_type", kind
            continue
        for name, value in part.items():
            read = name in _ROPE_ALWAYS or name in known.rope[kind] or f"{path}.{name}" in known.fixed
            if not read and value is not None:
                yield f"{path}.{name}", value


def _why(known: FamilySettings, name: str, value: Any) -> str:
    shown = f"config.json: {name} is {value!r:.80}, but {known.engine}"
    remedy = "Use --engine native, which runs the model's own class."
    if name in known.fixed:
        return (
            f"{shown} computes every {known.family!r} model with {known.fixed[name]}: it would not load this one, or "
            f"answer wrongly. {remedy}"
        )
    if name.endswith(".rope_type"):
        return f"{shown} runs {known.family!r} models with {', '.join(known.rope)} only. {remedy}"
    return f"{shown} is not known to read it for {known.family!r} models, so it might answer wrongly. {remedy}"


def place_pattern(known: FamilySettings, architecture: Architecture) -> re.Pattern[str] | None:
    """Names of stored tensors that the engine has a place for; None where no list of them exists."""
    if architecture.gguf is None:
        return None
    templates = [source for rule in architecture.gguf.tensors for source in rule.sources]
    fields = {"layer": r"(?P<layer{}>\d+)", "expert": r"\d+", "part": r"\w+"}
    patterns = []
    for number, template in enumerate([*templates, *known.tensors]):
        pieces = re.split(r"\{(\w+)\}", template)
        patterns.append("".join(fields[p].format(number) if i % 2 else re.escape(p) for i, p in enumerate(pieces)))
    return re.compile("|".join(patterns))


def _value(written: Any) -> Any:
    return None if written == UNSET else written


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, filter(lambda value: value is not None, values))) or UNSET


def _same(one: Any, other: Any) -> bool:
    """Equal, and of one kind: 1 is not true, but 1.0 is 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


@cache
def _room(engine: str) -> Mapping[str, Any]:
    return _read(engine)


@cache
def _common() -> Mapping[str, Any]:
    return _read("common")


def _read(name: str) -> Mapping[str, Any]:
    path = files("alphaq.engines") / "assumptions" / f"{name}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))
