"""Models whose layers have different numbers of experts, which no class in transformers can be told of.

A class builds all layers by one count. So it is built once for every count that occurs, without weights, and each layer
takes the block around its experts from the model of its own count: router, experts and all that counts them are then
what the class itself makes of them.
"""

from __future__ import annotations

from typing import Any

import torch

from alphaq.checkpoint.families.architecture import architecture_of
from alphaq.checkpoint.families.routing import OWN_COUNTS, own_counts
from alphaq.checkpoint.pruned import with_count
from alphaq.errors import CheckpointError


def take_own_counts(model: Any) -> None:
    """Give the layers of a model without weights the numbers of experts that its config says they have, if it does.

    Raises CheckpointError where a layer cannot be found in the class.
    """
    described = model.config.to_dict()
    if not _tells(described):
        return
    architecture = architecture_of(described)
    by_count: dict[int, list[int]] = {}
    for layer, count in own_counts(architecture, described).items():
        by_count.setdefault(count, []).append(layer)
    whole = _shapes(model)
    for count, layers in by_count.items():
        config = type(model.config).from_dict(with_count(architecture, described, count))
        other = _hollow_like(model, config)
        changed = [name for name, shape in _shapes(other).items() if shape != whole.get(name)]
        for layer in layers:
            _take_block(model, other, [name for name in changed if f".layers.{layer}." in f".{name}"], layer)


def _tells(part: Any) -> bool:
    """Whether a config or a part of it tells counts. A model for text alone may have a config of no known family."""
    return isinstance(part, dict) and (OWN_COUNTS in part or any(map(_tells, part.values())))


def _hollow_like(model: Any, config: Any) -> Any:
    """Another model of the same class, on the meta device."""
    chosen = {"attn_implementation": model.config._attn_implementation}
    if model.config._experts_implementation == "eager":  # parts without experts refuse to be asked for any other
        chosen["experts_implementation"] = "eager"
    with torch.device("meta"):
        other = type(model)._from_config(config, dtype=model.dtype, **chosen)
    return other.train(model.training)


def _shapes(model: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict(keep_vars=True).items()}


def _take_block(model: Any, other: Any, changed: list[str], layer: int) -> None:
    """Exchange the smallest module of a layer that holds all parameters whose shapes depend on the count."""
    around = list[str]()
    for parts in zip(*(name.split(".")[:-1] for name in changed), strict=False):
        if len(set(parts)) > 1:
            break
        around.append(parts[0])
    if str(layer) not in around:
        raise CheckpointError(
            f"{type(model).__name__} has no block in layer {layer} whose number of experts could be its own. Plan the "
            "model with equal counts."
        )
    name = ".".join(around)
    model.set_submodule(name, other.get_submodule(name), strict=True)
