"""From tensor names to matrices: architectures are TOML files, this module only reads them.

A template such as `model.layers.{layer}.mlp.experts.{expert}.{projection}.weight` becomes a regular
expression; the first template that matches a name gives its role. See docs/architectures.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from alphaq.checkpoint.gguf_mapping import GgufMapping
from alphaq.checkpoint.safetensors_format import TensorInfo
from alphaq.errors import ArchitectureError
from alphaq.records import MatrixRef, Role

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class TensorRule:
    """One `[[tensors]]` entry of an architecture file."""

    pattern: re.Pattern[str]
    role: Role
    stacked: tuple[str, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class Architecture:
    """How one family names its tensors, and how its config counts experts."""

    name: str
    model_types: tuple[str, ...]
    num_experts_keys: tuple[str, ...]
    expert_name: str
    projections: dict[str, str]
    moe_layer_rules: dict[str, str]
    rules: tuple[TensorRule, ...]
    gguf: GgufMapping | None = None
    """None for a family that GGUF has no name for."""

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """Read one TOML description."""
        data = tomllib.loads(text)
        projections = data["projections"]
        rules = tuple(
            TensorRule(
                _compile(entry["template"], projections),
                Role(entry["role"]),
                tuple(entry.get("stacked", ())),
                entry.get("transposed", False),
            )
            for entry in data["tensors"]
        )
        return cls(
            data["name"],
            tuple(data["model_types"]),
            tuple(data["num_experts"]),
            data["expert_name"],
            projections,
            data.get("moe_layers", {}),
            rules,
            GgufMapping.parse(data["gguf"]) if "gguf" in data else None,
        )

    def layers(self, config: Mapping[str, Any]) -> int:
        """Number of decoder layers; multi-token-prediction layers after them do not count."""
        return _count(config, "num_hidden_layers")

    def experts_per_layer(self, config: Mapping[str, Any]) -> int:
        """Routed experts in one MoE layer."""
        present = [key for key in self.num_experts_keys if key in config]
        return _count(config, present[0] if present else self.num_experts_keys[0])

    def moe_layers(self, config: Mapping[str, Any]) -> list[int]:
        """Layers that hold routed experts, by the config's own rules."""
        rules = self.moe_layer_rules
        dense = config.get(rules.get("dense_list", "")) or []
        if not isinstance(dense, list):
            raise ArchitectureError(
                f"config.json: {rules['dense_list']} is {dense!r}, not a list. Restore the original file."
            )
        every, first, frequency = (
            _count(config, rules[rule]) if config.get(rules.get(rule, "")) else default
            for rule, default in (("every", 1), ("first_dense", 0), ("frequency", 1))
        )
        return [
            layer
            for layer in range(self.layers(config))
            if layer not in dense and (layer + 1) % every == 0 and layer >= first and layer % frequency == 0
        ]


_INDEX = "0|[1-9][0-9]{0,5}"  # one spelling per number, and no number too long to convert


def _compile(template: str, projections: Mapping[str, str]) -> re.Pattern[str]:
    fields = {
        "layer": rf"(?P<layer>{_INDEX})",
        "expert": rf"(?P<expert>{_INDEX})",
        "projection": f"(?P<projection>{'|'.join(map(re.escape, projections))})",
        "part": r"(?P<part>\w*)",
    }
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(fields[piece] if odd else re.escape(piece) for odd, piece in _alternate(pieces)))


def _alternate(pieces: Iterable[str]) -> Iterable[tuple[bool, str]]:
    return ((position % 2 == 1, piece) for position, piece in enumerate(pieces))


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value < 10**5:
        raise ArchitectureError(
            f"config.json: {key} is {value!r}, not a positive count. Restore the model's original config.json."
        )
    return value


@lru_cache(maxsize=1)
def architectures() -> dict[str, Architecture]:
    """All known architectures by `model_type`."""
    folder = files("alphaq.checkpoint") / "architectures"
    found = {}
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".toml"):
            architecture = Architecture.parse(file.read_text(encoding="utf-8"))
            found.update({model_type: architecture for model_type in architecture.model_types})
    return found


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config names. Raises ArchitectureError listing the known ones."""
    model_type = config.get("model_type")
    known = architectures()
    if not isinstance(model_type, str) or model_type not in known:
        raise ArchitectureError(
            f"Architecture {model_type!r} (config.json, model_type) is unknown. Known: {', '.join(known)}. "
            "To add one, write a TOML file as docs/architectures.md explains."
        )
    return known[model_type]


def match_tensors(
    architecture: Architecture, config: Mapping[str, Any], tensors: Iterable[TensorInfo]
) -> tuple[list[MatrixRef], dict[str, Role]]:
    """Every matrix in a checkpoint with its role, and the role of every stored tensor.

    Tensors of layers beyond `num_hidden_layers` (multi-token prediction) get role `other`. Raises
    ArchitectureError if a tensor looks like an expert but matches no template, or if the experts
    found are not exactly those the config promises.
    """
    layers = architecture.layers(config)
    matrices: list[MatrixRef] = []
    roles: dict[str, Role] = {}
    for tensor in tensors:
        rule, match = _first_match(architecture, tensor.name)
        fields = match.groupdict() if match else {}
        layer = int(fields["layer"]) if fields.get("layer") else None
        beyond = re.match(rf"model\.layers\.({_INDEX})\.", tensor.name)
        if beyond and int(beyond[1]) >= layers:
            roles[tensor.name] = Role.OTHER
            continue
        if rule is None:
            if ".experts." in tensor.name:
                raise ArchitectureError(
                    f"Tensor {tensor.name!r} looks like an expert but matches no template of "
                    f"{architecture.name!r}. Add its template to architectures/{architecture.name}.toml."
                )
            roles[tensor.name] = Role.OTHER
            continue
        roles[tensor.name] = rule.role
        if 0 in tensor.shape:
            raise ArchitectureError(f"{tensor.name!r} has no elements, shape {list(tensor.shape)}. Download it again.")
        if rule.stacked:
            matrices.extend(_unstack(architecture, tensor, rule, layer, architecture.experts_per_layer(config)))
        elif len(tensor.shape) == 2 and rule.role is not Role.OTHER:
            rows, columns = tensor.shape[::-1] if rule.transposed else tensor.shape
            projection = fields.get("projection")
            matrices.append(
                MatrixRef(
                    tensor.name,
                    (rows, columns),
                    tensor.dtype,
                    layer,
                    int(fields["expert"]) if fields.get("expert") else None,
                    architecture.projections[projection] if projection else fields.get("part"),
                    rule.role,
                    tensor.name,
                    transposed=rule.transposed,
                )
            )
    _check_expert_count(architecture, config, matrices)
    return matrices, roles


def _first_match(architecture: Architecture, name: str) -> tuple[TensorRule | None, re.Match[str] | None]:
    for rule in architecture.rules:
        if match := rule.pattern.fullmatch(name):
            return rule, match
    return None, None


def _unstack(
    architecture: Architecture, tensor: TensorInfo, rule: TensorRule, layer: int | None, per_layer: int
) -> Iterable[MatrixRef]:
    """Matrices of a fused tensor [experts, stacked · rows, columns] ([experts, columns, …] if transposed)."""
    parts = len(rule.stacked)
    if len(tensor.shape) != 3:
        raise ArchitectureError(
            f"{tensor.name!r} should be [experts, rows, columns] but has shape {list(tensor.shape)}. "
            "The checkpoint does not follow its architecture."
        )
    experts, first, second = tensor.shape
    if experts != per_layer:
        raise ArchitectureError(
            f"{tensor.name!r} holds {experts} experts but config.json promises {per_layer}. Correct config.json."
        )
    total_rows, columns = (second, first) if rule.transposed else (first, second)
    if total_rows % parts:
        raise ArchitectureError(
            f"{tensor.name!r}: {total_rows} rows cannot hold {parts} equal projections. "
            "The checkpoint does not follow its architecture."
        )
    rows = total_rows // parts
    stored_names = {role: stored for stored, role in architecture.projections.items()}
    for expert in range(experts):
        for position, projection in enumerate(rule.stacked):
            yield MatrixRef(
                architecture.expert_name.format(layer=layer, expert=expert, projection=stored_names[projection]),
                (rows, columns),
                tensor.dtype,
                layer,
                expert,
                projection,
                rule.role,
                tensor.name,
                expert,
                position * rows,
                rule.transposed,
            )


def _check_expert_count(architecture: Architecture, config: Mapping[str, Any], matrices: Iterable[MatrixRef]) -> None:
    experts = [matrix for matrix in matrices if matrix.role is Role.EXPERT]
    found = {(matrix.layer, matrix.expert, matrix.projection): matrix for matrix in experts}
    shapes: dict[tuple[int | None, str | None], MatrixRef] = {}
    for matrix in experts:
        other = found[matrix.layer, matrix.expert, matrix.projection]
        if other is not matrix:
            raise ArchitectureError(
                f"{matrix.name} is stored twice, in {matrix.tensor!r} and {other.tensor!r}. Keep one layout only."
            )
        first = shapes.setdefault((matrix.layer, matrix.projection), matrix)
        if first.shape != matrix.shape:
            raise ArchitectureError(
                f"{matrix.name} has shape {list(matrix.shape)} but {first.name} has {list(first.shape)}. "
                "Experts of a layer must agree; the checkpoint is damaged."
            )
    projections = sorted(set(architecture.projections.values()))
    layers, per_layer = architecture.moe_layers(config), architecture.experts_per_layer(config)
    promised = len(layers) * per_layer * len(projections)
    if promised > 2 * len(found) + 1000:  # before building a set as large as the config says
        raise ArchitectureError(
            f"Found {len(found)} expert matrices but config.json promises {promised}. "
            "Complete the download or correct config.json."
        )
    expected = {
        (layer, expert, projection) for layer in layers for expert in range(per_layer) for projection in projections
    }
    if found.keys() != expected:
        missing, extra = sorted(expected - found.keys()), sorted(found.keys() - expected)
        layer, expert, projection = (missing or extra)[0]
        problem = "missing" if missing else "not promised by config.json"
        raise ArchitectureError(
            f"Found {len(found)} expert matrices but config.json promises {len(expected)}; first {problem}: "
            f"layer {layer}, expert {expert}, {projection}. Complete the download or correct config.json."
        )
