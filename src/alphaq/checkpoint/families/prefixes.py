"""What stands before `layers.0…` where a checkpoint has other prefixes than its family's file says.

Two kinds are put right. A base model was saved without the model around it, so that its names lack the beginning; they
are read as if they had it, as transformers reads them. A wrapper for images or sound may call its language model
anything; the prefix that its layers have is taken.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from alphaq.checkpoint.families.architecture import ANCHORS, Architecture, compiled, wrapped
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import ArchitectureError
from alphaq.nouns.matrix import Role

Shards = dict[str, dict[str, TensorInfo]]


def fitted(architecture: Architecture, config: Mapping[str, Any], shards: Shards) -> tuple[Architecture, Shards]:
    """The architecture and the tensors under names that it knows; both unchanged where it knows them already."""
    if any(_is_anchor(architecture, name) for tensors in shards.values() for name in tensors):
        return architecture, shards
    names = [name for tensors in shards.values() for name in tensors]
    for lacking in _beginnings(architecture.models):
        if any(_is_anchor(architecture, f"{lacking}.{name}") for name in names):
            return architecture, {shard: _completed(architecture, infos, lacking) for shard, infos in shards.items()}
    prefix = _prefix_of_layers(architecture, architecture.layers(config), names)
    return (wrapped(architecture, architecture.settings, (prefix,)) if prefix else architecture), shards


def language_prefix(architecture: Architecture, names: Iterable[str]) -> str:
    """What stands before the language model's own tensors, with its dot; "" where its layers have no such prefix."""
    for name in names:
        if _is_anchor(architecture, name):
            match = architecture.first_match(name)[1]
            model = match.groupdict().get("model") if match is not None else None
            return f"{model}." if model else ""
    return ""


def _is_anchor(architecture: Architecture, name: str) -> bool:
    """Whether a name is one of the language model's layers."""
    rule, match = architecture.first_match(name)
    return rule is not None and rule.role in ANCHORS and match is not None and "layer" in match.groupdict()


def _beginnings(models: Iterable[str]) -> list[str]:
    """What names may lack: `model.language_model`, or only `model` of it. The longest that fits is the right one."""
    pieces = {".".join(model.split(".")[:length]) for model in models for length in range(1, model.count(".") + 2)}
    return sorted(pieces, key=lambda piece: (piece not in models, piece.count("."), piece))


def _completed(architecture: Architecture, tensors: Mapping[str, TensorInfo], lacking: str) -> dict[str, TensorInfo]:
    """A shard's tensors with the beginning that their names lack; a head has none."""
    made: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        rule, _ = architecture.first_match(name)
        whole = name if rule is not None and rule.role is not Role.OTHER else f"{lacking}.{name}"
        if whole in made:
            raise ArchitectureError(f"{whole} is stored twice, as {name} too. Keep one of them.")
        made[whole] = replace(info, name=whole)
    return made


def _prefix_of_layers(architecture: Architecture, layers: int, names: Iterable[str]) -> str | None:
    """The prefix under which most experts, or else all layers of a dense model, are; None if there is none."""
    patterns: dict[Role, list[re.Pattern[str]]] = defaultdict(list)
    for rule in architecture.rules:
        if rule.role in ANCHORS and rule.template.startswith("{model}."):
            patterns[rule.role].append(compiled(rule.template, architecture.projections, None))
    for role in ANCHORS:
        layers_of: dict[str, list[int]] = defaultdict(list)
        for match in (pattern.fullmatch(name) for name in names for pattern in patterns[role]):
            if match is not None:
                layers_of[match["model"]].append(int(match["layer"]))
        whole = {prefix: len(own) for prefix, own in layers_of.items() if max(own) == layers - 1}
        if whole:
            return max(sorted(whole), key=lambda prefix: whole[prefix])
    return None
