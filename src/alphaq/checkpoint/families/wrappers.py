"""Which part of a config describes the language model, where a model_type is unknown: a wrapper's, for images or sound.

A wrapper may be called anything, and so may the key that its language model's config lies under.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

MOST_NESTED = 4
OTHER_PARTS = re.compile(
    "vision|visual|image|video|audio|speech|sound|voice|talker|predictor|vocoder|token2wav|draft|mtp|encoder|projector"
    "|quantization"
)
"""Words in keys of what is no language model, or not the one that answers, though it may have the type of one."""
_HEAD = re.compile(r"For\w+$|Model$|LMHeadModel$")
_EXPERT_COUNTS = re.compile(r"num_(?:local_|routed_)?experts|n_routed_experts|moe_num_experts")


def language_part(config: Mapping[str, Any], known: Collection[str]) -> tuple[str, str] | None:
    """Where a config nests that of a known language model, with dots, and its `model_type`; None if nowhere.

    Of several the first with routed experts counts, else the first; those nearest to the top come first.
    """
    squeezed = {_squeezed(model_type): model_type for model_type in known}
    families = [
        (path, family, part)
        for path, part in _parts(config)
        if (family := _family_of(part, known, squeezed)) is not None
    ]
    with_experts = [one for one in families if any(_EXPERT_COUNTS.fullmatch(key) and one[2][key] for key in one[2])]
    for path, family, _ in (*with_experts, *families):
        return path, family
    return None


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The configs inside a config, by their path, level by level."""
    level = [("", config)]
    for _ in range(MOST_NESTED):
        level = [
            (f"{path}.{key}".lstrip("."), value)
            for path, part in level
            for key, value in part.items()
            if isinstance(value, dict) and "." not in key and not OTHER_PARTS.search(key.lower())
        ]
        yield from level


def _family_of(part: Mapping[str, Any], known: Collection[str], squeezed: Mapping[str, str]) -> str | None:
    """The known `model_type` of a nested config: as it says, or that of its class where it says none."""
    model_type = part.get("model_type")
    if isinstance(model_type, str):
        return model_type if model_type in known else None
    classes = part.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    return squeezed.get(_squeezed(_HEAD.sub("", name))) if isinstance(name, str) else None


def _squeezed(name: str) -> str:
    """A name by which a class and a `model_type` can be compared: DeepseekV2, deepseek_v2."""
    return name.replace("_", "").lower()
