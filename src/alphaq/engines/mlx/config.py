"""What mlx-lm must read in config.json: settings that it has a default of its own for, and those of older names."""

from __future__ import annotations

from typing import Any

from alphaq.checkpoint.families.formulas import looked_up
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.assumptions.tables import ROPE, FamilySettings, family_settings
from alphaq.engines.effective import model_settings, settings_of
from alphaq.engines.settings import require_settings
from alphaq.errors import ArchitectureError
from alphaq.work.untrusted import JsonObject

NAME = "mlx"
WRAPPED = "text_config"


def told(checkpoint: Checkpoint) -> JsonObject:
    """Settings as mlx-lm must read them, where config.json says otherwise or nothing.

    It says nothing of a rotary base or a type that it does not find. Raises ArchitectureError for what cannot be told.
    """
    found = _of_experts(checkpoint) if checkpoint.architecture.num_experts_keys else _of_dense(checkpoint)
    own = checkpoint.text_config
    changed = {key: value for key, value in found.items() if key not in own or own[key] != value}
    if not is_wrapped(checkpoint):
        return changed
    changed.pop("model_type", None)  # of the whole
    return {WRAPPED: {**own, **changed}, "vocab_size": found["vocab_size"]}  # which Gemma's class reads outside


def is_wrapped(checkpoint: Checkpoint) -> bool:
    """Whether a model holds its language model beside others.

    Raises ArchitectureError if its settings lie where mlx-lm does not look for them.
    """
    if checkpoint.text_config == checkpoint.config:
        return False
    if checkpoint.config.get(WRAPPED) != checkpoint.text_config:
        raise ArchitectureError(
            f"config.json has the language model's settings elsewhere than under {WRAPPED}, where alone mlx-lm looks "
            "for them. Use --engine native."
        )
    return True


def _of_experts(checkpoint: Checkpoint) -> JsonObject:
    """Settings that are carried, the number of experts by the name that mlx-lm looks for, and rotary ones."""
    known, config = _known(checkpoint), require_settings(checkpoint, NAME)
    carried = {key.rpartition(".")[2]: looked_up(key, config) for key in known.carried}
    found = {key: value for key, value in carried.items() if value is not None}
    counted = checkpoint.architecture.num_experts_keys[0]
    if "." not in counted:
        found[counted] = checkpoint.architecture.experts_per_layer(checkpoint.config)
    rope = {key: value for key, value in (config.get(ROPE) or {}).items() if value is not None}
    rope = {key: value for key, value in rope.items() if key != "type" and key not in carried}
    if rope and not any(isinstance(part, dict) for part in rope.values()):  # else each kind of layer has its own
        found["rope_theta"] = rope.pop("rope_theta", None)
        found["rope_scaling"] = _scaling(rope)
    return found | {key: one.value(config) for key, one in known.lines.derived.items()}


def _known(checkpoint: Checkpoint) -> FamilySettings:
    return family_settings(NAME, checkpoint.architecture, checkpoint.text_config.get("model_type"))


def _of_dense(checkpoint: Checkpoint) -> JsonObject:
    """Every setting of the family's class, and rotary ones by their older names."""
    settings = settings_of(checkpoint)
    found = {key: settings[key] for key in model_settings(checkpoint) if settings.get(key) is not None}
    rope = found.pop(ROPE, None) or settings.get(ROPE)
    parts: Any = {} if rope is None else rope
    if isinstance(parts, dict) and isinstance(local := parts.get("sliding_attention"), dict):
        found["rope_local_base_freq"] = local.get("rope_theta")
        parts = parts.get("full_attention")
    if not isinstance(parts, dict):
        raise ArchitectureError(f"config.json: {ROPE} is {rope!r:.80}, not an object. Restore the original file.")
    parts = {key: value for key, value in parts.items() if value is not None and not isinstance(value, dict)}
    found["rope_theta"] = parts.pop("rope_theta", None)
    parts.pop("type", None)
    found["rope_scaling"] = _scaling(parts)
    return found


def _scaling(rope: JsonObject) -> JsonObject | None:
    """Rotary parameters under their older name, the type under both names; None for the usual embedding."""
    rest = dict(rope)
    kind = rest.pop("rope_type", "default")
    return None if kind == "default" else {"type": kind, "rope_type": kind, **rest}
