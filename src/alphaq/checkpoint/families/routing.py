"""What a config and a router say of the experts must agree with the experts that are there.

Tools that prune experts forget one or the other. Nothing loads such a checkpoint, and some engines crash on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from alphaq.checkpoint.families.architecture import NUMBERED_LAYER, Architecture, look_up
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import ArchitectureError
from alphaq.work.untrusted import shown

OWN_COUNTS = "alphaq_experts_in_layers"
"""Key of config.json, in its part for the language model, which some classes are given alone: how many experts each
layer has, by its number, where layers differ. The family's own key has the most of any layer then."""
_GROUPS = ("n_group", "num_expert_group")
_CHOSEN_GROUPS = "topk_group"


def check_routing(architecture: Architecture, config: Mapping[str, Any], per_expert: Iterable[TensorInfo]) -> None:
    """Raise ArchitectureError unless routers have a row for each expert and no token goes to more than there are.

    per_expert: the tensors of decoder layers in which one side counts the experts.
    """
    text, experts = architecture.text_config(config), architecture.experts_per_layer(config)
    if not experts:
        return
    idle_key = architecture.idle_experts
    idle = next(iter(_numbers(look_up(text, idle_key) if isinstance(idle_key, str) else idle_key)), 0)
    counts = own_counts(architecture, config)
    for tensor in per_expert:
        numbered = NUMBERED_LAYER.fullmatch(tensor.name)
        own = counts.get(int(numbered[1]), experts) if numbered else experts
        _check_rows(tensor, own, own + idle)
    for key in architecture.top_k_keys:
        for chosen in _numbers(look_up(text, key)):
            for count in sorted({experts, *counts.values()}):
                _check_top_k(key, chosen, count + idle, text)


def own_counts(architecture: Architecture, config: Mapping[str, Any]) -> dict[int, int]:
    """How many experts each layer has, where config.json says that layers differ; else nothing.

    Raises ArchitectureError for numbers that cannot be.
    """
    told = architecture.text_config(config).get(OWN_COUNTS)
    if told is None:
        return {}
    most = architecture.experts_per_layer(config)
    layers = {str(layer): layer for layer in architecture.moe_layers(config)}
    if not isinstance(told, dict) or not all(
        layer in layers and type(count) is int and 0 < count <= most for layer, count in told.items()
    ):
        raise ArchitectureError(
            f"config.json: {OWN_COUNTS} is {shown(str(told))}, not 1 to {most} experts for layers that have some. "
            "Restore config.json as it was written."
        )
    return {layers[layer]: count for layer, count in told.items()}


def experts_in(architecture: Architecture, config: Mapping[str, Any], layer: int | None) -> int:
    """Routed experts in one layer that has some."""
    return own_counts(architecture, config).get(-1 if layer is None else layer, architecture.experts_per_layer(config))


def experts_per_token(architecture: Architecture, config: Mapping[str, Any]) -> int:
    """The most experts that a layer sends a token to; all of them where a config does not say, 0 without experts."""
    text, experts = architecture.text_config(config), architecture.experts_per_layer(config)
    said = (one for key in architecture.top_k_keys for one in _numbers(look_up(text, key)))
    return min(max(said, default=experts), experts)  # some of those chosen may have no weights


def renormalises(architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether the weights of the experts that a token goes to are divided by their sum, up to a factor for all."""
    says = architecture.renormalises
    value = look_up(architecture.text_config(config), says) if isinstance(says, str) else says
    return value is None or bool(value)


def _check_rows(tensor: TensorInfo, experts: int, most: int) -> None:
    sides = [side for side in tensor.shape if side != 1] or [1]
    if sides[0] not in (experts, most):
        raise ArchitectureError(
            f"{tensor.name} has {sides[0]} rows for {experts} experts, shape {list(tensor.shape)}. If experts were "
            "removed, remove their rows too; else restore the original config.json."
        )


def expert_groups(architecture: Architecture, config: Mapping[str, Any]) -> int:
    """Groups of experts that a router chooses among before it chooses experts; 1 where it knows none."""
    return _groups(architecture.text_config(config))


def fewest_experts(architecture: Architecture, config: Mapping[str, Any]) -> int:
    """How many experts a layer needs at least, so that a router finds as many as a token goes to among the groups that
    it chooses, and two in each: it may rate groups by their best two."""
    text, chosen, groups = (
        architecture.text_config(config),
        experts_per_token(architecture, config),
        expert_groups(architecture, config),
    )
    allowed = next(iter(_numbers(look_up(text, _CHOSEN_GROUPS))), groups) if groups > 1 else 1
    return groups * max(2, -(-chosen // allowed))


def _groups(text: Mapping[str, Any]) -> int:
    groups = next((count for name in _GROUPS for count in _numbers(look_up(text, name))), 1)
    return 1 if groups <= 1 or look_up(text, "topk_method") == "greedy" else groups  # greedy knows no groups


def _check_top_k(key: str, chosen: int, experts: int, text: Mapping[str, Any]) -> None:
    if not 0 < chosen <= experts:
        raise ArchitectureError(
            f"config.json: {key} is {chosen}, but a layer has {experts} experts. Correct it to at most {experts}."
        )
    groups = _groups(text)
    if groups == 1:
        return
    allowed = next(iter(_numbers(look_up(text, _CHOSEN_GROUPS))), groups)
    if experts % groups or not 0 < allowed <= groups or chosen > allowed * (experts // groups):
        raise ArchitectureError(
            f"config.json: {experts} experts in {groups} groups, of which {allowed} are chosen from, cannot give "
            f"{chosen} to a token ({key}). Correct n_group, {_CHOSEN_GROUPS} or {key}."
        )


def _numbers(value: Any) -> list[int]:
    """A config's number, or a number for each layer; none if there is none."""
    return [one for one in (value if isinstance(value, list) else [value]) if type(one) is int]
