"""The `[gguf]` table of an architecture file: what its configs and tensors are called in a GGUF file.

Both ways read it: an export goes from config and checkpoint names to GGUF's, opening a GGUF file goes back. See
docs/architectures.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alphaq.checkpoint.families.formulas import Assumption
from alphaq.work.untrusted import JsonObject


@dataclass(frozen=True)
class GgufKey:
    """Where a metadata value comes from.

    config: config keys, dots for nesting, of which the first present counts; the first is also what a GGUF file's
    value is read back as, unless it is a formula such as `kv_lora_rank + qk_rope_head_dim`. values: what the config
    says → what the file says, "" for nothing. default: what the config says by saying nothing; None if that is nothing.
    required: whether llama.cpp would take something else for nothing. when: values of other settings without which the
    key is not written.
    """

    config: tuple[str, ...]
    values: JsonObject
    default: Any
    required: bool = False
    when: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def parse(cls, entry: Any) -> GgufKey:
        """A name, a list of names, or a table."""
        table = entry if isinstance(entry, dict) else {"config": entry}
        return cls(
            _names(table.get("config", ())),
            table.get("values", {}),
            table.get("default"),
            table.get("required", False),
            table.get("when", {}),
        )


@dataclass(frozen=True)
class GgufTensorRule:
    """A kind of tensor: its name in a GGUF file and in a checkpoint.

    name: with the field `{layer}` if each layer has one. sources: templates of the checkpoint's names, of which the
    first present counts; `{expert}` means one matrix per expert, stacked in the file. transform: how values change on
    the way, "" if they do not. made: what makes the tensor out of the config where no source is stored, "" for nothing.
    """

    name: str
    sources: tuple[str, ...]
    transform: str
    made: str = ""

    @classmethod
    def parse(cls, name: str, entry: Any) -> GgufTensorRule:
        """A template, a list of templates, or a table."""
        table = entry if isinstance(entry, dict) else {"source": entry}
        return cls(name, _names(table["source"]), table.get("transform", ""), table.get("made", ""))


@dataclass(frozen=True)
class GgufMapping:
    """A family's `[gguf]` table.

    arch: the architecture's name in GGUF. metadata: keys without the leading `arch.`. config: what llama.cpp takes for
    granted about this family, by config key. tensors: in the order of an exported file. present: config flags, which no
    key of a file says, by the tensor that is there if they are set.
    """

    arch: str
    metadata: dict[str, GgufKey]
    config: dict[str, Assumption]
    tensors: tuple[GgufTensorRule, ...]
    present: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, table: Mapping[str, Any]) -> GgufMapping:
        """Read the table."""
        return cls(
            table["arch"],
            {key: GgufKey.parse(entry) for key, entry in table["metadata"].items()},
            {key: Assumption.parse(entry) for key, entry in table.get("config", {}).items()},
            tuple(GgufTensorRule.parse(name, entry) for name, entry in table["tensors"].items()),
            table.get("present", {}),
        )


def _names(entry: str | list[str]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry)
