"""What a config.json means: its settings as the family's class in transformers understands them, defaults filled in.

The class reads old and new names, moves `rope_theta` and `rope_scaling` to `rope_parameters`, and has a default for
what is not there. Engines have defaults of their own, so what they are told is taken from here.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

from alphaq.checkpoint.families.architecture import architectures
from alphaq.checkpoint.families.formulas import current
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import ArchitectureError, first_line
from alphaq.nouns.matrix import Role
from alphaq.work.untrusted import JsonObject

HEAD = "lm_head.weight"
TIED = "tie_word_embeddings"


def effective_config(checkpoint: Checkpoint) -> JsonObject:
    """The language model's settings; what its class does not know as it stands in config.json. Not to be changed.

    The files say whether head and embedding are one, whatever the config says. A config whose class transformers
    lacks, and that of a GGUF file, is itself. Raises ArchitectureError if its class refuses the config.
    """
    text = dict(checkpoint.text_config)
    cls = None if checkpoint.gguf is not None else config_class(checkpoint)
    if cls is None:
        return text
    return {**text, **understood(cls, text), TIED: is_tied(checkpoint)}


def settings_of(checkpoint: Checkpoint) -> JsonObject:
    """The settings that an engine's files are made by: `effective_config`, with rotary settings in one place.

    Those of a GGUF file are its own.
    """
    if checkpoint.architecture.num_experts_keys:
        return effective_config(checkpoint)
    return checkpoint.settings if checkpoint.gguf is not None else current(effective_config(checkpoint))


def model_settings(checkpoint: Checkpoint) -> set[str]:
    """Settings of the model's class that describe the model, and not any config."""
    from transformers import PretrainedConfig

    cls = config_class(checkpoint)
    return set() if cls is None else (understood(cls, {}).keys() - PretrainedConfig().to_dict().keys()) | {TIED}


def config_class(checkpoint: Checkpoint) -> type | None:
    """The class of the config, or of its family if transformers has none for its `model_type`; None without either.

    The family of a language model beside others is its own before theirs.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own = str(checkpoint.text_config.get("model_type"))
    kin = architectures().get(own, checkpoint.architecture).model_types
    names = (own, *kin, *checkpoint.architecture.model_types)
    found = next((name for name in names if name in CONFIG_MAPPING), None)
    return None if found is None else CONFIG_MAPPING[found]


def understood(cls: type, settings: JsonObject) -> JsonObject:
    """Every setting of a config class, given some. Raises ArchitectureError if it refuses them."""
    return _understood(cls, json.dumps(settings, sort_keys=True))


@lru_cache(maxsize=64)
def _understood(cls: type, settings: str) -> JsonObject:
    given = json.loads(settings, object_hook=_plain_float)
    for key in ("architectures", "dtype", "torch_dtype", "quantization_config"):  # of the file, not of the model
        given.pop(key, None)
    try:
        with _quiet():
            made: JsonObject = cls(**copy.deepcopy(given)).to_dict()
    except Exception as error:  # whatever a class does with what strangers write, it only means that it refuses it
        reason = first_line(error)
        raise ArchitectureError(
            f"config.json is not one that transformers' {cls.__name__} takes ({reason:.200}). Restore the original."
        ) from error
    return made


def _plain_float(found: JsonObject) -> object:
    """transformers writes `{"__float__": "Infinity"}` for what JSON has no number for."""
    said = found.get("__float__")
    return float(said) if said in ("Infinity", "-Infinity", "NaN") and len(found) == 1 else found


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding: it is where no file holds a head.

    Raises ArchitectureError if the config says that it has weights of its own and no file holds them.
    """
    if head_of(checkpoint) is not None:
        return False
    if says_tied(checkpoint):
        return True
    raise ArchitectureError(
        f"config.json says that the head has weights of its own ({TIED} is false), but no file holds {HEAD}. Complete "
        f"the download; if the embedding is the head, set {TIED} to true."
    )


def says_tied(checkpoint: Checkpoint) -> bool:
    """What the config says of the head, or its class where it says nothing."""
    text = dict(checkpoint.text_config)
    said = [config[TIED] for config in (checkpoint.config, text) if isinstance(config.get(TIED), bool)]
    cls = None if said else config_class(checkpoint)
    if cls is None:
        return any(said)
    with suppress(ArchitectureError):  # it is told where the settings are asked for
        return understood(cls, text).get(TIED) is True
    return False


def head_of(checkpoint: Checkpoint) -> str | None:
    """The tensor of a head that is stored apart from the embedding."""
    heads = (name for name, role in checkpoint.roles.items() if role is Role.HEAD and name.endswith(".weight"))
    return next(heads, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Config classes warn of keys that they do not know; here that is decided elsewhere."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
