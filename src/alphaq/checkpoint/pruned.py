"""A checkpoint without some of its experts, as if its files had never held them.

Experts that stay are numbered anew, routers lose the rows of those that go, and config.json counts what is left, so
that whoever reads, plans or writes such a checkpoint need not know of it. A token whose expert is gone goes to the next
best: a router without a row computes what one with −∞ in it would.

Families have one count of experts for all layers. Where layers keep different ones, config.json has the most of any
under the family's key, and each layer's under `OWN_COUNTS`, which only our own runtime reads (calibration/uneven.py).
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alphaq.checkpoint.families.architecture import NUMBERED_LAYER, Architecture, look_up
from alphaq.checkpoint.families.routing import OWN_COUNTS, check_routing, expert_groups, fewest_experts, own_counts
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import ITEM_BYTES, TORCH_DTYPES, TensorSpec, entry_bytes
from alphaq.checkpoint.tensors import Encoding, TensorInfo, with_slices
from alphaq.errors import PlanError
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.work.untrusted import JsonObject

Dropped = Mapping[int, Collection[int]]
"""Numbers of experts that go, by layer."""
_NUMBERED_EXPERT = re.compile(r"(.*\bexperts\.(?:mlp\.)?)([0-9]+)(\..*)")
_PREDICTION_COUNTS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
    "num_mtp_modules",
)
"""Config keys of the layers that guess further words."""
_ROUTER_LOGITS = "output_router_logits"


def without_experts(checkpoint: Checkpoint, dropped: Dropped, uneven: bool = False) -> Checkpoint:
    """The checkpoint without experts `dropped`; itself if there are none.

    Every layer must lose as many, but where `uneven`, and every group of experts that a router chooses among. Raises
    PlanError for anything else, and for a model whose experts cannot be taken out.
    """
    if not any(map(len, dropped.values())):
        return checkpoint
    require_prunable(checkpoint)
    kept = _kept(checkpoint, dropped)
    if not uneven:
        _require_even(checkpoint, kept)
    config = _counting(checkpoint, {layer: len(experts) for layer, experts in kept.items()})
    cut = _Cut(checkpoint, kept)
    if any(map(cut.predicts, checkpoint.shard_of)):
        _without_prediction(config)
        _without_prediction(checkpoint.architecture.text_config(config))
    shards = {
        shard: {one.name: one for info in tensors.values() if (one := cut.tensor(info)) is not None}
        for shard, tensors in checkpoint.shards.items()
    }
    named = ",".join(f"{layer}:{sorted(experts)}" for layer, experts in sorted(dropped.items()))
    pruned = replace(
        checkpoint,
        config=config,
        shards={shard: tensors for shard, tensors in shards.items() if tensors},
        matrices=tuple(left for matrix in checkpoint.matrices if (left := cut.matrix(matrix)) is not None),
        roles={name: role for old, role in checkpoint.roles.items() if (name := cut.name(old)) is not None},
        fingerprint=hashlib.sha256(f"{checkpoint.fingerprint} without {named}".encode()).hexdigest(),
        dropped={layer: tuple(sorted(experts)) for layer, experts in sorted(dropped.items())},
    )
    check_routing(pruned.architecture, config, cut.per_expert)
    return pruned


def require_prunable(checkpoint: Checkpoint) -> None:
    """Raise PlanError for a model whose experts cannot be taken out."""
    architecture = checkpoint.architecture
    why = architecture.not_prunable
    if checkpoint.planned_role is not Role.EXPERT:
        why = "it has no routed experts"
    elif checkpoint.gguf is not None:
        why = "it is a GGUF file; start from the Hugging Face folder"
    elif own_counts(architecture, checkpoint.config):
        why = "its layers differ in how many experts they have already"
    elif not why and any(_is_table(checkpoint, name) for name in checkpoint.roles):
        why = "a table says which experts a token goes to"
    if why:
        raise PlanError(f"Experts of {checkpoint.name} cannot be dropped: {why}.")


def _is_table(checkpoint: Checkpoint, name: str) -> bool:
    if checkpoint.roles[name] is not Role.ROUTER:
        return False
    return checkpoint.info(name).dtype not in ("F64", "F32", "F16", "BF16")


def _kept(checkpoint: Checkpoint, dropped: Dropped) -> dict[int, tuple[int, ...]]:
    """The experts of each layer that stay, in their order. Raises PlanError where layers or groups would differ."""
    architecture, config = checkpoint.architecture, checkpoint.config
    count, layers = architecture.experts_per_layer(config), architecture.moe_layers(config)
    if unknown := sorted(set(dropped) - set(layers)):
        raise PlanError(f"Layer {unknown[0]} of {checkpoint.name} has no routed experts to drop.")
    fewest, groups = fewest_experts(architecture, config), expert_groups(architecture, config)
    kept = {layer: tuple(expert for expert in range(count) if expert not in dropped.get(layer, ())) for layer in layers}
    for layer, experts in kept.items():
        if len(experts) + len(set(dropped.get(layer, ()))) != count:
            raise PlanError(
                f"Layer {layer} of {checkpoint.name} has no expert {max(dropped[layer])} to drop: it has {count}."
            )
        if len(experts) < fewest:
            raise PlanError(
                f"Layer {layer} of {checkpoint.name} would keep {len(experts)} of {count} experts, too few for its "
                f"router to choose from. Keep at least {fewest}."
            )
        sizes = {sum(expert * groups // count == group for expert in experts) for group in range(groups)}
        if len(sizes) > 1:
            raise PlanError(
                f"Layer {layer} of {checkpoint.name} chooses among {groups} groups of experts, which would differ in "
                "size. Drop as many of each."
            )
    return kept


def _require_even(checkpoint: Checkpoint, kept: Mapping[int, tuple[int, ...]]) -> None:
    """Raise PlanError unless all layers keep as many experts."""
    first = min(kept)
    for layer, experts in kept.items():
        if len(experts) != len(kept[first]):
            raise PlanError(
                f"Layer {layer} of {checkpoint.name} would keep {len(experts)} experts, layer {first} "
                f"{len(kept[first])}. Drop as many in every layer, or plan with --engine native."
            )


def _counting(checkpoint: Checkpoint, counts: Mapping[int, int]) -> JsonObject:
    """config.json for so many experts in each layer."""
    most = max(counts.values())
    config = with_count(checkpoint.architecture, checkpoint.config, most)
    own = {str(layer): count for layer, count in counts.items() if count != most}
    if own:
        text: Any = checkpoint.architecture.text_config(config)
        text[OWN_COUNTS] = own
        for part in (config, text):  # classes join all layers' logits, which have as many columns in each
            if part.get(_ROUTER_LOGITS):
                part[_ROUTER_LOGITS] = False
    return config


def with_count(architecture: Architecture, config: JsonObject, count: int) -> JsonObject:
    """A copy of config.json with another number of experts, the same in every layer, wherever it states it."""
    config = copy.deepcopy(config)
    text: Any = architecture.text_config(config)
    text.pop(OWN_COUNTS, None)
    before = architecture.experts_per_layer(config)
    for path in architecture.num_experts_keys:
        *outer, key = path.split(".")
        part = look_up(text, ".".join(outer)) if outer else text
        if isinstance(part, dict) and part.get(key) == before:
            part[key] = count
    return config


def _without_prediction(part: Any) -> None:
    """Have a part of config.json promise no layers that guess further words: engines would look for their tensors."""
    for key in _PREDICTION_COUNTS:
        if part.get(key):
            part[key] = 0


@dataclass(frozen=True)
class _KeptRows:
    """Reads some rows of a tensor that is stored whole. axis: the one that counts experts."""

    dtype: str
    shape: tuple[int, ...]
    axis: int
    rows: tuple[int, ...]

    def __call__(self, stored: Tensor, name: str) -> Tensor:
        values = stored.view(TORCH_DTYPES[self.dtype]).view(self.shape)
        return values.index_select(self.axis, torch.tensor(self.rows))


@dataclass(frozen=True)
class Spared:
    """Bytes that go beside experts' matrices. rows: with each expert of a layer, of its router. tensors: how many of
    them count experts, by layer. prediction: with the first expert of any layer."""

    rows: Mapping[int, int]
    tensors: Mapping[int, int]
    prediction: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Spared:
        """Of 16-bit values as they are stored."""
        architecture, config = checkpoint.architecture, checkpoint.config
        every = tuple(range(architecture.experts_per_layer(config)))
        cut = _Cut(checkpoint, dict.fromkeys(architecture.moe_layers(config), every))
        rows, tensors, prediction = Counter[int](), Counter[int](), 0
        for name in checkpoint.shard_of:
            info, layer = checkpoint.info(name), _layer_of(name)
            nbytes = math.prod(info.shape) * ITEM_BYTES[info.dtype]
            if cut.predicts(name):
                prediction += nbytes + entry_bytes(name, TensorSpec(info.dtype, info.shape))
            elif layer is not None and name not in cut.of_experts and cut.counts_experts(name):
                rows[layer] += nbytes // info.shape[_expert_axis(info)]
                tensors[layer] += 1
        return cls(rows, tensors, prediction)


class _Cut:
    """What becomes of names, tensors and matrices. kept: experts that stay, by layer."""

    def __init__(self, checkpoint: Checkpoint, kept: Mapping[int, tuple[int, ...]]) -> None:
        self.checkpoint, self.kept = checkpoint, kept
        architecture, config = checkpoint.architecture, checkpoint.config
        self.count, self.layers = architecture.experts_per_layer(config), architecture.layers(config)
        outer = {model.rpartition(".")[0] for model in architecture.models} - {""}
        prefixes, wider = (
            "|".join(map(re.escape, some)) for some in (architecture.models, {*architecture.models, *outer})
        )
        self.decoder = re.compile(rf"(?:(?:{prefixes})\.)?(?:layers|blocks)\..*")
        self.prediction = re.compile(rf"(?:(?:{wider})\.)?mtp(?:_\w+)?\..*")
        self.of_experts = {matrix.tensor for matrix in checkpoint.matrices if matrix.role is Role.EXPERT}
        self.per_expert: list[TensorInfo] = []

    def predicts(self, name: str) -> bool:
        """Whether a tensor is of layers that guess further words: they have as many experts as before, so they go."""
        after = (_layer_of(name) or 0) >= self.layers and self.decoder.fullmatch(name) is not None
        return after or self.prediction.fullmatch(name) is not None

    def name(self, name: str) -> str | None:
        """A tensor's or an expert's matrix' name; None if it goes."""
        if self.predicts(name):
            return None
        layer, numbered = _layer_of(name), _NUMBERED_EXPERT.fullmatch(name)
        if layer is None or layer not in self.kept or numbered is None or "shared_experts." in numbered[1]:
            return name
        if not (self.decoder.fullmatch(name) or self._is_expert(name)):
            return name  # of another model
        expert = int(numbered[2])
        return f"{numbered[1]}{self.kept[layer].index(expert)}{numbered[3]}" if expert in self.kept[layer] else None

    def matrix(self, matrix: MatrixRef) -> MatrixRef | None:
        """A matrix under its new name and number; None if it goes."""
        if matrix.role is Role.EXPERT and matrix.expert is not None:
            kept = self.kept.get(matrix.layer or 0, ())
            if matrix.expert not in kept:
                return None
            number = kept.index(matrix.expert)
            name, tensor = self.name(matrix.name), self.name(matrix.tensor)
            assert name is not None and tensor is not None  # since its number is kept
            index = None if matrix.index is None else number
            return replace(matrix, name=name, expert=number, tensor=tensor, index=index)
        if not self.counts_experts(matrix.tensor):
            return None if self.name(matrix.name) is None else matrix
        info = self.tensor(self.checkpoint.info(matrix.tensor))
        assert info is not None and len(info.shape) == 2  # a matrix
        return replace(matrix, shape=info.shape[::-1] if matrix.transposed else info.shape)

    def tensor(self, info: TensorInfo) -> TensorInfo | None:
        """A stored tensor under its new name, without the rows of experts that go; None if it goes."""
        name, layer = self.name(info.name), _layer_of(info.name)
        if name is None:
            return None
        stacked = len(info.shape) > 2 and info.name in self.of_experts
        if layer is None or layer not in self.kept or not (stacked or self.counts_experts(info.name)):
            return replace(info, name=name)
        if stacked:
            return with_slices(info, self.kept[layer])
        if info.encoding is not None:
            raise PlanError(f"{info.name} is stored in codes, so rows cannot be taken out. Convert the model to bf16.")
        axis = _expert_axis(info)
        rows = (*self.kept[layer], *range(self.count, info.shape[axis]))  # what has no weights of its own stays
        shape = (*info.shape[:axis], len(rows), *info.shape[axis + 1 :])
        reads = _KeptRows(info.dtype, info.shape, axis, rows)
        cut = replace(info, name=name, shape=shape, encoding=Encoding("plain", (1, 1), decoder=reads))
        self.per_expert.append(cut)
        return cut

    def _is_expert(self, name: str) -> bool:
        rule, _ = self.checkpoint.architecture.first_match(name)
        return rule is not None and rule.role is Role.EXPERT

    def counts_experts(self, tensor: str) -> bool:
        """Whether a side of a tensor counts the experts of its layer."""
        rule, _ = self.checkpoint.architecture.first_match(tensor)
        return rule is not None and rule.per_expert and _layer_of(tensor) in self.kept


def _expert_axis(info: TensorInfo) -> int:
    """Of a router's tensor, the axis that counts experts."""
    return next((number for number, side in enumerate(info.shape) if side != 1), 0)


def _layer_of(name: str) -> int | None:
    numbered = NUMBERED_LAYER.fullmatch(name)
    return None if numbered is None else int(numbered[1])
