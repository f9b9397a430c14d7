"""What is asked of a model's settings before it is given to an engine: each is carried, or changes nothing, or fits.

An engine has its own program for each family. It reads some settings, and computes with a fixed value of others
whatever the config says. What is what lies in `assumptions/ENGINE.toml`, by family; a setting that no line names must
have the default of the family's class in transformers, so that one which is new there is refused instead of ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from alphaq.checkpoint.families.formulas import Assumption, looked_up
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.assumptions.rules import same
from alphaq.engines.assumptions.tables import ROPE, FamilySettings, engine_table, family_settings
from alphaq.engines.effective import config_class, effective_config, settings_of, understood
from alphaq.errors import ArchitectureError
from alphaq.work.untrusted import JsonObject

_ATTENTION_BIAS = re.compile(r".*\.self_attn\.[qkvo]_proj\.bias")
_BIASES = {
    "attention_bias": _ATTENTION_BIAS,
    "qkv_bias": _ATTENTION_BIAS,
    "mlp_bias": re.compile(r".*\.mlp\.(gate|up|down)_proj\.bias"),
}
"""Settings that switch biases, and what these are called."""
_ROPE_ALWAYS = ("rope_type", "type", "rope_theta")


def require_settings(checkpoint: Checkpoint, engine: str) -> JsonObject:
    """The config as the engine must be told it. Raises ArchitectureError for a setting that it computes otherwise.

    A GGUF file's own metadata are carried over as they are, so nothing is asked of them.
    """
    table = engine_table(engine)
    known = family_settings(engine, checkpoint.architecture, checkpoint.text_config.get("model_type"))
    experts = bool(checkpoint.architecture.num_experts_keys)
    if experts and checkpoint.gguf is None and not (table.wrapped or known.lines.wrapped):
        _require_plain(checkpoint, engine)  # before biases, which the models beside it may have
    if not table.everything:
        _require_no_idle_biases(checkpoint, engine)
    if not experts:
        if table.architecture_file and (mapping := checkpoint.architecture.gguf) is not None:
            require_assumptions(checkpoint, engine, mapping.arch, mapping.config)
        return settings_of(checkpoint)  # what else is assumed of these is asked for with the family's name
    config = effective_config(checkpoint)
    if checkpoint.gguf is None:
        for name, value in _refused(checkpoint, known, config):
            raise ArchitectureError(_why(known, name, value))
    return {**config, **{key: value for key, value in known.lines.written.items() if config.get(key) is None}}


def require_assumptions(checkpoint: Checkpoint, engine: str, family: str, assumed: Mapping[str, Assumption]) -> None:
    """Raise ArchitectureError if a model without experts has a setting that an engine computes otherwise."""
    config, layers = settings_of(checkpoint), checkpoint.architecture.layers(checkpoint.config)
    for key, assumption in assumed.items():
        if not assumption.holds(key, config, layers):
            raise ArchitectureError(
                f"config.json: {key} is {looked_up(key, config)!r:.80}, but {engine} computes every {family!r} model "
                f"with {assumption.shown(config, layers)}: it would not load this one, or answer wrongly. Use another "
                "engine for this model."
            )


def _require_no_idle_biases(checkpoint: Checkpoint, engine: str) -> None:
    """ArchitectureError for stored biases that the config switches off: the class leaves them out, engines do not."""
    config = settings_of(checkpoint)
    for setting, pattern in _BIASES.items():
        stored = next((name for name in checkpoint.shard_of if pattern.fullmatch(name)), None)
        if config.get(setting) is False and stored is not None and checkpoint.gguf is None:
            raise ArchitectureError(
                f"config.json: {setting} is false, so the model's class leaves {stored} out, and {engine} would use "
                "it. Remove the biases from the checkpoint, or correct the setting."
            )


def _require_plain(checkpoint: Checkpoint, engine: str) -> None:
    if checkpoint.text_config != checkpoint.config:
        raise ArchitectureError(
            f"config.json: {checkpoint.config.get('model_type')!r} holds its language model beside others. It is only "
            f"known how {engine} runs language models alone. Use --engine native."
        )


def _refused(checkpoint: Checkpoint, known: FamilySettings, config: JsonObject) -> Iterator[tuple[str, Any]]:
    """Settings that the engine computes otherwise, with their values."""
    for name, rule in known.fixed.items():
        value = looked_up(name, config)
        if not rule.allows(value, config):
            yield name, value
    if known.everything:
        return
    yield from _refused_rope(known, config)
    cls = config_class(checkpoint)
    if cls is None:
        return
    # What follows from the settings that are listed, such as a list of one kind of attention, counts as default.
    defaults = understood(cls, {key: value for key, value in config.items() if key in known.listed})
    for name in understood(cls, {}).keys() - known.listed:
        if not same(config.get(name), defaults.get(name)):
            yield name, config[name]


def _refused_rope(known: FamilySettings, config: JsonObject) -> Iterator[tuple[str, Any]]:
    """Rotary embeddings of a type that the engine lacks, or parameters that it does not read."""
    rope = config.get(ROPE)
    if not isinstance(rope, dict):
        return
    nested = {f"{ROPE}.{kind}": part for kind, part in rope.items() if isinstance(part, dict)}
    for path, part in (nested or {ROPE: rope}).items():
        kind = part.get("rope_type", "default")
        if not isinstance(kind, str) or kind not in known.lines.rope:
            yield f"{path}.rope_type", kind
            continue
        for name, value in part.items():
            read = name in _ROPE_ALWAYS or name in known.lines.rope[kind] or f"{path}.{name}" in known.fixed
            if not read and value is not None:
                yield f"{path}.{name}", value


def _why(known: FamilySettings, name: str, value: Any) -> str:
    shown = f"config.json: {name} is {value!r:.80}, but {known.engine}"
    remedy = "Use --engine native, which runs the model's own class."
    if name in known.fixed:
        remedy = known.fixed[name].remedy or remedy
        return (
            f"{shown} computes every {known.family!r} model with {known.fixed[name]}: it would not load this one, or "
            f"answer wrongly. {remedy}"
        )
    if name.endswith(".rope_type"):
        return f"{shown} runs {known.family!r} models with {', '.join(known.lines.rope)} only. {remedy}"
    return f"{shown} is not known to read it for {known.family!r} models, so it might answer wrongly. {remedy}"
