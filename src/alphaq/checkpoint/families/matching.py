"""From tensor names to matrices: what a checkpoint stores, by the rules of its architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from alphaq.checkpoint.encoded.encodings import unfolded as unfolded_tensor
from alphaq.checkpoint.families.architecture import NUMBERED_LAYER, Architecture, TensorRule, count
from alphaq.checkpoint.families.routing import check_routing, experts_in
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import ArchitectureError, CheckpointError
from alphaq.nouns.matrix import MatrixRef, Role

MAX_MATRICES = 500_000  # seven times those of Kimi-K2
READABLE_WEIGHTS = ("F32", "F16", "BF16")
QUANTIZABLE = (Role.EXPERT, Role.SHARED_EXPERT, Role.ATTENTION, Role.MIXER, Role.DENSE_MLP)


def match_tensors(
    architecture: Architecture, config: Mapping[str, Any], tensors: Iterable[TensorInfo]
) -> tuple[list[MatrixRef], dict[str, Role]]:
    """Every matrix in a checkpoint with its role, and the role of every stored tensor.

    Tensors of layers beyond `num_hidden_layers` (multi-token prediction) get role `other`. Raises
    ArchitectureError if a tensor looks like an expert but matches no template, if the experts
    found are not exactly those the config promises, or if routers are for another number of them.
    """
    layers = architecture.layers(config)
    matrices: list[MatrixRef] = []
    per_expert: list[TensorInfo] = []
    roles: dict[str, Role] = {}
    for tensor in tensors:
        match = _matched(architecture, tensor, layers)
        roles[tensor.name] = match.rule.role if match is not None else Role.OTHER
        if match is None:
            continue
        if match.rule.per_expert:
            per_expert.append(tensor)
        if 0 in tensor.shape:
            raise ArchitectureError(f"{tensor.name!r} has no elements, shape {list(tensor.shape)}. Download it again.")
        if len(matrices) > MAX_MATRICES:
            raise ArchitectureError(
                f"More than {MAX_MATRICES} matrices. Do not use this checkpoint; it may be hostile."
            )
        matrices.extend(_matrices_of(architecture, config, tensor, match))
    _check_expert_count(architecture, config, matrices)
    check_routing(architecture, config, per_expert)
    return matrices, roles


@dataclass(frozen=True)
class _Match:
    """The rule that decides on a tensor, what its template found in the name, and the layer."""

    rule: TensorRule
    fields: Mapping[str, str]
    layer: int | None


def _matched(architecture: Architecture, tensor: TensorInfo, layers: int) -> _Match | None:
    """None for tensors that are no part of a plan. Raises ArchitectureError for what looks like an unknown expert."""
    rule, match = architecture.first_match(tensor.name)
    fields = match.groupdict() if match else {}
    numbered = NUMBERED_LAYER.fullmatch(tensor.name)
    layer = int(fields["layer"]) if fields.get("layer") else int(numbered[1]) if numbered else None
    if layer is not None and layer >= layers:
        return None
    if rule is None and ".experts." in tensor.name:
        raise ArchitectureError(
            f"Tensor {tensor.name!r} looks like an expert but matches no template of "
            f"{architecture.name!r}. Add its template to architectures/{architecture.name}.toml."
        )
    return None if rule is None else _Match(rule, fields, layer)


def _matrices_of(
    architecture: Architecture, config: Mapping[str, Any], tensor: TensorInfo, match: _Match
) -> Iterable[MatrixRef]:
    """The matrices in a tensor: those of a stack, one, or none if it is no weight."""
    rule, fields = match.rule, match.fields
    if rule.columns and len(tensor.shape) > 1:
        columns = count(architecture.text_config(config), rule.columns)
        rule = replace(rule, transposed=tensor.shape[-1] != columns and tensor.shape[-2] == columns)
    if rule.stacked:
        yield from _unstack(architecture, tensor, rule, fields, experts_in(architecture, config, match.layer))
    elif len(tensor.shape) == 2 and rule.role is not Role.OTHER and not _is_table(tensor, rule.role):
        rows, columns = tensor.shape[::-1] if rule.transposed else tensor.shape
        projection = fields.get("projection")
        yield MatrixRef(
            tensor.name,
            (rows, columns),
            tensor.dtype,
            match.layer,
            int(fields["expert"]) if fields.get("expert") else None,
            architecture.projections[projection] if projection else fields.get("part"),
            rule.role,
            tensor.name,
            transposed=rule.transposed,
        )


def require_readable(matrices: Iterable[MatrixRef]) -> None:
    """Raise CheckpointError for a weight that is stored in a dtype which nothing here quantizes."""
    for matrix in matrices:
        if matrix.dtype not in READABLE_WEIGHTS and matrix.role in QUANTIZABLE:
            coded = matrix.dtype.startswith("F8")
            remedy = (
                "Restore config.json, whose quantization_config says how to decode it"
                if coded
                else "Convert it to bf16"
            )
            raise CheckpointError(
                f"{matrix.name} is stored as {matrix.dtype}; readable: {', '.join(READABLE_WEIGHTS)}. {remedy}."
            )


def _is_table(tensor: TensorInfo, role: Role) -> bool:
    """Whether a router's tensor says which experts a token goes to (DeepSeek-V4's tid2eid), and is no weight."""
    return role is Role.ROUTER and tensor.dtype in ("I64", "I32", "I16", "BOOL")


def unfolded(
    architecture: Architecture, config: Mapping[str, Any], shards: dict[str, dict[str, TensorInfo]]
) -> dict[str, dict[str, TensorInfo]]:
    """Shards whose tensors [experts · rows, columns] are [experts, rows, columns], the same bytes."""

    def unfold(tensor: TensorInfo) -> TensorInfo:
        rule, match = architecture.first_match(tensor.name)
        if rule is None or match is None or not rule.folded or len(tensor.shape) != 2:
            return tensor
        experts = experts_in(architecture, config, int(match["layer"]))
        rows = tensor.shape[0]
        if not experts or rows % experts:
            raise ArchitectureError(f"{tensor.name!r}: {rows} rows cannot hold {experts} experts. Correct config.json.")
        return unfolded_tensor(tensor, experts)

    if not any(rule.folded for rule in architecture.rules):
        return shards
    return {shard: {name: unfold(tensor) for name, tensor in tensors.items()} for shard, tensors in shards.items()}


def _unstack(
    architecture: Architecture, tensor: TensorInfo, rule: TensorRule, fields: Mapping[str, str], per_layer: int
) -> Iterable[MatrixRef]:
    """Matrices of a fused tensor [experts, stacked · rows, columns] ([experts, columns, …] if transposed).

    Outside the routed experts there may be any number in a stack, or one without an axis for it.
    """
    routed, parts = rule.role is Role.EXPERT, len(rule.stacked)
    alone = not routed and len(tensor.shape) == 2
    if len(tensor.shape) != 3 and not alone:
        raise ArchitectureError(
            f"{tensor.name!r} should be [experts, rows, columns] but has shape {list(tensor.shape)}. "
            "The checkpoint does not follow its architecture."
        )
    experts, first, second = (1, *tensor.shape) if alone else tensor.shape
    if routed and experts != per_layer:
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
    name = rule.name or architecture.expert_name
    for expert in range(experts):
        for position, projection in enumerate(rule.stacked):
            yield MatrixRef(
                name.format_map({**fields, "expert": expert, "projection": stored_names[projection]}),
                (rows, columns),
                tensor.dtype,
                int(fields["layer"]),
                expert if routed else None,
                projection,
                rule.role,
                tensor.name,
                None if alone else expert,
                position if rule.alternating else position * rows,
                rule.transposed,
                parts if rule.alternating else 1,
            )


def _check_expert_count(architecture: Architecture, config: Mapping[str, Any], matrices: Iterable[MatrixRef]) -> None:
    experts = [matrix for matrix in matrices if matrix.role is Role.EXPERT]
    by_place = {(matrix.layer, matrix.expert, matrix.projection): matrix for matrix in experts}
    shapes: dict[tuple[int | None, str | None], MatrixRef] = {}
    for matrix in experts:
        other = by_place[matrix.layer, matrix.expert, matrix.projection]
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
    per_layer = architecture.experts_per_layer(config)
    layers = architecture.moe_layers(config)
    promised = len(layers) * per_layer * len(projections)  # at most
    if promised > 2 * len(by_place) + 1000:  # before building a set as large as the config says
        raise ArchitectureError(
            f"Found {len(by_place)} expert matrices but config.json promises {promised}. "
            "Complete the download or correct config.json."
        )
    expected = {
        (layer, expert, projection)
        for layer in layers
        for expert in range(experts_in(architecture, config, layer))
        for projection in projections
    }
    if by_place.keys() != expected:
        missing, extra = sorted(expected - by_place.keys()), sorted(by_place.keys() - expected)
        layer, expert, projection = (missing or extra)[0]
        problem = "missing" if missing else "not promised by config.json"
        raise ArchitectureError(
            f"Found {len(by_place)} expert matrices but config.json promises {len(expected)}; first {problem}: "
            f"layer {layer}, expert {expert}, {projection}. Complete the download or correct config.json."
        )
