"""How families name their tensors: TOML files in `architectures/`, which this module only reads.

A template such as `{model}.layers.{layer}.mlp.experts.{expert}.{projection}.weight` becomes a regular expression; the
first template that matches a name gives its role. See docs/architectures.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from typing import Any

from alphaq.checkpoint.families.wrappers import language_part
from alphaq.checkpoint.gguf.mapping import GgufMapping
from alphaq.errors import ArchitectureError
from alphaq.nouns.matrix import Role
from alphaq.work.untrusted import JsonObject

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


SETTINGS = ("text_config", "language_config", "llm_config", "thinker_config.text_config")
WRAPPERS = ("model.language_model", "language_model.model", "language_model", "language.model", "thinker.model")
ANCHORS = (Role.EXPERT, Role.DENSE_MLP, Role.ATTENTION)
"""Roles whose templates tell where the language model's tensors are."""


@dataclass(frozen=True)
class TensorRule:
    """One `[[tensors]]` entry of an architecture file."""

    template: str
    pattern: re.Pattern[str]
    role: Role
    stacked: tuple[str, ...] = ()
    transposed: bool = False
    columns: str | None = None
    """Config key that counts the columns: where they come before the rows, the tensor is transposed."""
    folded: bool = False
    """Whether disk holds [experts · rows, columns]."""
    alternating: bool = False
    """Whether the rows of what is stacked take turns."""
    per_expert: bool = False
    """Whether the first side of the tensor counts the experts."""
    name: str = ""
    """Of the matrices that come out of the tensor; "" for the usual one of experts."""


@dataclass(frozen=True)
class Architecture:
    """How one family names its tensors, and how its config counts experts."""

    name: str
    model_types: tuple[str, ...]
    models: tuple[str, ...]
    """What `{model}` stands for."""
    settings: tuple[str, ...]
    """Where the config of a multi-modal model may hold the language model's part."""
    num_layers_keys: tuple[str, ...]
    num_experts_keys: tuple[str, ...]
    """Empty for a family without routed experts."""
    fewest_experts: int
    """With fewer the class builds a dense layer."""
    top_k_keys: tuple[str, ...]
    """Config keys of the experts that each token goes to."""
    renormalises: str | bool
    """Whether the routing weights of a token's experts are divided by their sum, or a config key that says."""
    expert_scale: str
    """A layer's parameter [experts], named from the module around its experts, that multiplies routing weights after
    they are divided by their sum; "" where there is none."""
    idle_experts: str | int
    """How many more a router may know: those without weights, or shared ones. A number, or a config key that says."""
    not_prunable: str
    """Why experts cannot be taken out; "" where they can."""
    not_ranked: str
    """Why losses of experts that are taken out cannot be foretold; "" where they can."""
    expert_name: str
    projections: dict[str, str]
    router_norm: str
    """The norm whose output a layer's router sees."""
    moe_layer_rules: JsonObject
    rules: tuple[TensorRule, ...]
    gguf: GgufMapping | None = None
    """None for a family that GGUF has no name for."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the family's class takes where a config says nothing."""

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Architecture:
        """From one description, with what it extends filled in."""
        projections = data["projections"]
        models = data.get("model", ["model"])
        rules = tuple(
            TensorRule(
                entry["template"],
                compiled(entry["template"], projections, models),
                Role(entry["role"]),
                tuple(entry.get("stacked", ())),
                entry.get("transposed", False),
                entry.get("columns"),
                entry.get("folded", False),
                entry.get("alternating", False),
                entry.get("per_expert", entry["role"] == Role.ROUTER.value),
                entry.get("name", ""),
            )
            for entry in data["tensors"]
            if set(entry.get("stacked", ())) <= set(projections.values())
        )
        return cls(
            data["name"],
            tuple(data["model_types"]),
            tuple(models),
            tuple(data.get("settings", SETTINGS)),
            tuple(data.get("num_layers", ["num_hidden_layers"])),
            tuple(data["num_experts"]),
            data.get("fewest_experts", 1),
            tuple(data.get("top_k", ())),
            data.get("renormalises", True),
            data.get("expert_scale", ""),
            data.get("idle_experts", 0),
            data.get("not_prunable", ""),
            data.get("not_ranked", ""),
            data["expert_name"],
            projections,
            data.get("router_norm", "post_attention_layernorm"),
            data.get("moe_layers", {}),
            tuple(sorted(rules, key=lambda rule: rule.role is not Role.EXPERT)),  # nearly all tensors are experts
            GgufMapping.parse(data["gguf"]) if "arch" in data.get("gguf", {}) else None,
            data.get("defaults", {}),
        )

    def first_match(self, name: str) -> tuple[TensorRule | None, re.Match[str] | None]:
        """The rule that decides on a tensor, and what its template found in the name."""
        for rule in self.rules:
            if match := rule.pattern.fullmatch(name):
                return rule, match
        return None, None

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The language model's part of a config, which multi-modal models nest."""
        for path in self.settings:
            if isinstance(part := look_up(config, path), dict):
                return part
        return config

    def layers(self, config: Mapping[str, Any]) -> int:
        """Number of decoder layers; multi-token-prediction layers after them do not count."""
        text = self.text_config(config)
        if all(look_up(text, key) is None for key in self.num_layers_keys) and (kinds := self._kinds(text)):
            return len(kinds)
        return count(text, next((key for key in self.num_layers_keys if _has(text, key)), self.num_layers_keys[0]))

    def experts_per_layer(self, config: Mapping[str, Any]) -> int:
        """Routed experts in one MoE layer; 0 of a dense model, also of a dense member of a family with experts."""
        text = self.text_config(config)
        present = [key for key in self.num_experts_keys if _has(text, key)]
        counted = [key for key in present if look_up(text, key) not in (None, 0)]
        if not counted and (present or not self.num_experts_keys or self._kinds(text)):
            return 0
        experts = count(text, (counted or self.num_experts_keys)[0])
        return experts if experts >= self.fewest_experts else 0

    def moe_layers(self, config: Mapping[str, Any]) -> list[int]:
        """Layers that hold routed experts, by the config's own rules: its list of them if it has one."""
        if not self.experts_per_layer(config):
            return []
        text, rules, layers = self.text_config(config), self.moe_layer_rules, range(self.layers(config))
        if kinds := self._kinds(text):
            return [layer for layer, kind in zip(layers, kinds, strict=False) if kind in rules["moe_kinds"]]
        if listed := _indices(_list(text, rules.get("list", ""))):
            return [layer for layer in layers if layer in listed]
        first = _number(text, rules.get("first", ""), rules.get("default_first", 0))
        if isinstance(flags := look_up(text, rules.get("frequency", "")), list):
            return [layer for layer, flag in zip(layers, flags, strict=False) if flag and layer >= first]
        dense = _indices(_list(text, rules.get("dense_list", "")))
        every, frequency = (_number(text, rules.get(rule, ""), 1) or 1 for rule in ("every", "frequency"))
        offset, last = _number(text, rules.get("offset", ""), 0), _number(text, rules.get("last", ""), len(layers))
        return [
            layer
            for layer in layers
            if layer not in dense
            and (layer + 1) % every == 0
            and first <= layer <= last
            and layer % frequency == offset % frequency
        ]

    def _kinds(self, text: Mapping[str, Any]) -> list[Any]:
        """What the config calls each layer, as a list or as a letter each; empty if it does not say."""
        values = (look_up(text, key) for key in self.moe_layer_rules.get("kinds", ()))
        return next((list(value) for value in values if value and isinstance(value, list | str)), [])[: 10**5]


_INDEX = "0|[1-9][0-9]{0,5}"  # one spelling per number, and no number too long to convert
_ANY_MODEL = r"\w+(?:\.\w+){0,3}"
NUMBERED_LAYER = re.compile(rf"(?:.*\.)?(?:layers|blocks)\.({_INDEX})\..*")


def compiled(template: str, projections: Mapping[str, str], models: Iterable[str] | None) -> re.Pattern[str]:
    """The regular expression of a template; models: what `{model}` stands for, None for anything."""
    known = list(models or ())
    outer = {name for model in known for name in (model, model.rpartition(".")[0]) if name}
    fields = {
        "model": f"(?P<model>{_ANY_MODEL if models is None else '|'.join(map(re.escape, known))})",
        "outer": _ANY_MODEL if models is None else f"(?:{'|'.join(map(re.escape, sorted(outer)))})",
        "layer": rf"(?P<layer>{_INDEX})",
        "expert": rf"(?P<expert>{_INDEX})",
        "projection": f"(?P<projection>{'|'.join(map(re.escape, projections))})",
        "part": r"(?P<part>\w*)",
        "any": ".*",
    }
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(fields[piece] if odd else re.escape(piece) for odd, piece in _alternate(pieces)))


def _alternate(pieces: Iterable[str]) -> Iterable[tuple[bool, str]]:
    return ((position % 2 == 1, piece) for position, piece in enumerate(pieces))


def look_up(config: Mapping[str, Any], path: str) -> Any:
    """A config's value under a key or, with dots, deeper; None if it is not there."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _has(config: Mapping[str, Any], path: str) -> bool:
    """Whether a config says anything under a key, be it null."""
    *outer, key = path.split(".")
    part = look_up(config, ".".join(outer)) if outer else config
    return isinstance(part, dict) and key in part


def count(config: Mapping[str, Any], key: str) -> int:
    """The positive number under a key. Raises ArchitectureError."""
    value = look_up(config, key)
    if type(value) is not int or not 0 < value < 10**5:
        raise ArchitectureError(
            f"config.json: {key} is {value!r:.60}, not a positive count. Restore the model's original config.json."
        )
    return value


def _number(config: Mapping[str, Any], key: str, default: int) -> int:
    """The number of a layer, or of layers, under a key; the default if there is none, or -1."""
    value = look_up(config, key) if key else None
    if value is None or value == -1:
        return default
    return 0 if value == 0 and type(value) is int else count(config, key)


def _list(config: Mapping[str, Any], key: str) -> list[Any]:
    """The list under a key, or the parts of a string between commas; empty if there is none."""
    value = (look_up(config, key) if key else None) or []
    value = value.split(",") if isinstance(value, str) else value
    if not isinstance(value, list) or len(value) > 10**5:
        raise ArchitectureError(f"config.json: {key} is {value!r:.60}, not a list. Restore the original file.")
    return value


def _indices(values: Iterable[Any]) -> set[int]:
    """The layers that a list names, as numbers or in digits."""
    return {int(value) for value in values if re.fullmatch(rf"\s*({_INDEX})\s*", str(value))}


@lru_cache(maxsize=1)
def _described() -> dict[str, JsonObject]:
    """What every file of the folder says, by the file's name."""
    folder = files("alphaq.checkpoint") / "architectures"
    return {
        file.name.removesuffix(".toml"): tomllib.loads(file.read_text(encoding="utf-8"))
        for file in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if file.name.endswith(".toml")
    }


def unsupported() -> dict[str, str]:
    """Why a `model_type` with experts cannot be read, by `model_type`."""
    return _described()["unsupported"]


@lru_cache(maxsize=1)
def architectures() -> dict[str, Architecture]:
    """All known architectures by `model_type`."""
    described = _described()
    families = [Architecture.parse(_extended(data, described)) for data in described.values() if "model_types" in data]
    return {model_type: family for family in families for model_type in family.model_types}


def wrapped(architecture: Architecture, settings: Iterable[str], models: Iterable[str]) -> Architecture:
    """The same family where config.json nests its settings at one of these places, and more prefixes are known."""
    data = _extended(_described()[architecture.name], _described())
    every = list(dict.fromkeys([*architecture.models, *models]))
    return Architecture.parse({**data, "model": every, "settings": list(settings)})


def _extended(data: Mapping[str, Any], described: Mapping[str, Any]) -> Mapping[str, Any]:
    """A description with what it leaves out taken from the one it extends; its own templates come first."""
    if "extends" not in data:
        return data
    base = dict(_extended(described[data["extends"]], described))
    gguf = base.pop("gguf", {})
    if "gguf" in data:  # what another family is called is no matter of this one; a table for several is
        data = {**data, "gguf": data["gguf"] if "arch" in gguf else _merged(gguf, data["gguf"])}
    layers = {**base.get("moe_layers", {}), **data.get("moe_layers", {})}
    return {**base, **data, "moe_layers": layers, "tensors": [*data.get("tensors", ()), *base["tensors"]]}


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> JsonObject:
    """A table of tables, whose entries replace those of the base or follow them; "" takes one out."""
    tables = {key: {**base.get(key, {}), **one} if isinstance(one, dict) else one for key, one in own.items()}
    return {
        key: {name: value for name, value in one.items() if value != ""} if isinstance(one, dict) else one
        for key, one in {**base, **tables}.items()
    }


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config names, or that of the language model it nests.

    Raises ArchitectureError listing the known ones.
    """
    known, model_type = architectures(), str(config.get("model_type"))
    if model_type in known:
        return known[model_type]
    if model_type in unsupported():
        raise ArchitectureError(
            f"Architecture {model_type!r} (config.json, model_type) is not supported: {unsupported()[model_type]}. "
            "Choose another model; docs/models.md lists those that are."
        )
    if (nested := language_part(config, known)) is not None:
        path, family = nested
        own = known[family].models
        return wrapped(known[family], (path,), (*WRAPPERS, *(f"language_model.{model}" for model in own)))
    near = get_close_matches(model_type[:80], known, 3)
    raise ArchitectureError(
        f"Architecture {model_type!r:.80} (config.json, model_type) is unknown{f', near {near}' if near else ''}. "
        "docs/models.md lists those that are known; docs/architectures.md says how to add one, a TOML file."
    )
