"""Typed values of a GGUF file's metadata, kept as their bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from alphaq.errors import OutputError

STRUCT_FORMATS = {
    # name: its format in `struct`, in the order of the numbers that stand for the types in files
    "uint8": "B",
    "int8": "b",
    "uint16": "H",
    "int16": "h",
    "uint32": "I",
    "int32": "i",
    "float32": "f",
    "bool": "?",
    "string": "",
    "array": "",
    "uint64": "Q",
    "int64": "q",
    "float64": "d",
}
VALUE_TYPES = tuple(STRUCT_FORMATS)
Scalar = int | float | bool | str


@dataclass(frozen=True)
class GgufValue:
    """One metadata value, held as its bytes so that it can be written again bit for bit.

    type: one of VALUE_TYPES. raw: what follows the type's number in a file.
    """

    type: str
    raw: bytes = field(repr=False)

    @classmethod
    def of(cls, type: str, value: Scalar) -> GgufValue:
        """A single value. Raises OutputError if it does not fit its type."""
        return cls(type, encoded(type, (value,)))

    @classmethod
    def array(cls, element: str, values: Sequence[Scalar]) -> GgufValue:
        """Values of one type. Raises OutputError if one does not fit it."""
        head = struct.pack("<IQ", VALUE_TYPES.index(element), len(values))
        return cls("array", head + encoded(element, values))

    @property
    def element(self) -> str | None:
        """Type of an array's values, None if it is no array."""
        return VALUE_TYPES[int.from_bytes(self.raw[:4], "little")] if self.type == "array" else None

    @cached_property
    def value(self) -> Scalar | tuple[Scalar, ...]:
        """The Python value, a tuple for an array."""
        if self.element is None:
            return _decoded(self.type, 1, self.raw)[0]
        return _decoded(self.element, int.from_bytes(self.raw[4:12], "little"), self.raw[12:])


def encoded(type: str, values: Sequence[Scalar]) -> bytes:
    """Bytes of values of one type, as files hold them. Raises OutputError if one does not fit it."""
    try:
        if type == "string":
            texts = [value.encode() for value in values if isinstance(value, str)]
            if len(texts) != len(values):
                raise ValueError("not all are text")
            return b"".join(part for text in texts for part in (len(text).to_bytes(8, "little"), text))
        return struct.pack(f"<{len(values)}{STRUCT_FORMATS[type]}", *values)
    except (struct.error, OverflowError, ValueError) as error:
        shown = repr(values[0] if len(values) == 1 else list(values[:3]))
        raise OutputError(
            f"{shown} cannot be written to GGUF metadata as {type} ({error}). Correct the value in config.json or "
            "the tokenizer's files."
        ) from None


def _decoded(type: str, count: int, raw: bytes) -> tuple[Scalar, ...]:
    """Values of checked bytes."""
    if type != "string":
        return struct.unpack(f"<{count}{STRUCT_FORMATS[type]}", raw)
    texts = []
    place = 0
    for _ in range(count):
        begin = place + 8
        place = begin + int.from_bytes(raw[place:begin], "little")
        texts.append(raw[begin:place].decode())
    return tuple(texts)
