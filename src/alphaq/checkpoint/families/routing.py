"""What a config and a router say of the experts must agree with the experts that are there.

Tools that prune experts forget one or the other. Nothing loads such a checkpoint, and some engines crash on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from alphaq.checkpoint.families.architecture import Architecture, look_up
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import ArchitectureError

_GROUPS = ("n_group", "num_expert_group")
_CHOSEN_GROUPS = "topk_group"


def check_routing(architecture: Architecture, config: Mapping[str, Any], per_expert: Iterable[TensorInfo]) -> None:
    """Raise ArchitectureError unless routers have a row for each expert and no token goes to more than there are.

    per_expert: the tensors of decoder layers in which one side counts the experts.
    """
    text, experts = architecture.text_config(config), architecture.experts_per_layer(config)
    if not experts:
        return
    idle = architecture.idle_experts
    most = experts + next(iter(_numbers(look_up(text, idle) if isinstance(idle, str) else idle)), 0)
    for tensor in per_expert:
        _check_rows(tensor, experts, most)
    for key in architecture.top_k_keys:
        for chosen in _numbers(look_up(text, key)):
            _check_top_k(key, chosen, most, text)


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
