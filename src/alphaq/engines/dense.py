"""Families without experts that an engine loads, and what it takes for granted about each: dense.toml, read."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.resources import files
from typing import Any

from alphaq.checkpoint.families.formulas import Assumption, looked_up
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.effective import settings_of
from alphaq.errors import ArchitectureError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def dense_families(engine: str) -> dict[str, dict[str, Assumption]]:
    """What an engine takes for granted, by `model_type` and config key."""
    return {
        family: {key: Assumption.parse(entry) for key, entry in _settings(engine, family).items()}
        for family in _tables().get(engine, {})
    }


def require_assumptions(checkpoint: Checkpoint, engine: str, family: str, assumed: dict[str, Assumption]) -> None:
    """Raise ArchitectureError if a model of a family has a setting that an engine computes otherwise."""
    config, layers = settings_of(checkpoint), checkpoint.architecture.layers(checkpoint.config)
    for key, assumption in assumed.items():
        if not assumption.holds(key, config, layers):
            raise ArchitectureError(
                f"config.json: {key} is {looked_up(key, config)!r:.80}, but {engine} computes every {family!r} model "
                f"with {assumption.shown(config, layers)}: it would not load this one, or answer wrongly. Use another "
                "engine for this model."
            )


def _settings(engine: str, family: str) -> dict[str, Any]:
    own = dict(_tables()[engine][family])
    base = own.pop("extends", None)
    return own if base is None else {**_settings(engine, base), **own}


@lru_cache(maxsize=1)
def _tables() -> dict[str, dict[str, dict[str, Any]]]:
    return tomllib.loads((files("alphaq.engines") / "dense.toml").read_text(encoding="utf-8"))
