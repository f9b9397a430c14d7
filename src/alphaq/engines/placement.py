"""Stored tensors that an engine has no place for: left out if it does without them, refused by name if it might not.

An engine's program for a family has parameters of known names, and many stop at any other. Buffers that are computed
anyway, and layers that only guess further words, can go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.assumptions.tables import FamilySettings, family_settings, place_pattern
from alphaq.errors import ArchitectureError

_BUFFER = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attention\.(masked_)?bias)")
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\..*")
_PREDICTION = re.compile(r"(model\.)?mtp\b.*")


def is_harmless(name: str) -> bool:
    """Whether a stored tensor is a buffer of old checkpoints, which every engine computes for itself."""
    return _BUFFER.fullmatch(name) is not None


def left_out(checkpoint: Checkpoint, engine: str) -> frozenset[str]:
    """Stored tensors that the engine's files are to be written without.

    Raises ArchitectureError for one that the engine has no place for and that the model may need.
    """
    known = family_settings(engine, checkpoint.architecture, checkpoint.text_config.get("model_type"))
    pattern = place_pattern(known, checkpoint.architecture)
    layers = checkpoint.architecture.layers(checkpoint.config)
    homeless, dropped = [], set()
    for tensor, names in _names(checkpoint):
        if is_harmless(tensor):
            dropped.add(tensor)
        elif _predicts(tensor, layers):
            if not known.lines.prediction_layers:
                dropped.add(tensor)
        elif pattern is not None and not all(map(pattern.fullmatch, names)):
            homeless.append(tensor)
    if homeless:
        raise ArchitectureError(_no_place(known, homeless))
    return frozenset(dropped)


def prediction_layers(checkpoint: Checkpoint) -> list[int]:
    """Numbers of stored layers after the last, which guess further words."""
    last = checkpoint.architecture.layers(checkpoint.config)
    numbers = {int(layer[1]) for layer in map(_LAYER.fullmatch, checkpoint.shard_of) if layer is not None}
    return sorted(number for number in numbers if number >= last)


def _names(checkpoint: Checkpoint) -> Iterator[tuple[str, list[str]]]:
    """Each stored tensor with the names of the matrices that it holds, or its own."""
    within: dict[str, list[str]] = {}
    for matrix in checkpoint.matrices:
        within.setdefault(matrix.tensor, []).append(matrix.name)
    for tensor in checkpoint.shard_of:
        yield tensor, within.get(tensor, [tensor])


def _predicts(tensor: str, layers: int) -> bool:
    """Whether a tensor is of layers after the last, which guess further words."""
    layer = _LAYER.fullmatch(tensor)
    return (layer is not None and int(layer[1]) >= layers) or _PREDICTION.fullmatch(tensor) is not None


def _no_place(known: FamilySettings, homeless: list[str]) -> str:
    more = f", nor have {len(homeless) - 1} more" if len(homeless) > 1 else ""
    return (
        f"{homeless[0]!r} has no place in a {known.family!r} model of {known.engine}{more}. Use --engine native, or "
        "remove it from the checkpoint if the model runs without it."
    )
