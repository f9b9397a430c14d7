"""A GGUF file written in parts, as llama.cpp's gguf-split names and marks them.

The first part holds the metadata, each its own tensors. `split.count` says how many parts there are, `split.no` which
one a file is, `split.tensors.count` how many tensors they hold together. Source: tools/gguf-split of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from alphaq.checkpoint.gguf.format import (
    DEFAULT_ALIGNMENT,
    ENTRY_BYTES,
    HEAD_BYTES,
    GgufTensor,
    layout,
    metadata_bytes,
    padded,
)
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.errors import OutputError
from alphaq.formats.ggml import GGML_TYPES

MOST_PARTS = 2**16 - 1  # `split.count` has 16 bits
PART_BYTES = 144
"""A part adds less: 24 bytes of a header, 82 of its keys, at most 31 of padding."""

Shapes = Mapping[str, tuple[str, Sequence[int]]]
"""ggml type and shape [..., rows, columns] of tensors, by name."""


@dataclass(frozen=True)
class Parts:
    """files: header and size of each, by name, in order. tensors: where each lies."""

    files: dict[str, tuple[bytes, int]]
    tensors: dict[str, GgufTensor]


def parts_layout(metadata: Mapping[str, GgufValue], tensors: Shapes, stem: str, most_bytes: int | None) -> Parts:
    """Files of at most so many bytes each, header included, with the tensors in their order; one file for None.

    A part holds one tensor at least, however large. Where all fits into one file, that is written as ever. Raises
    OutputError as `layout` does, and where there would be too many parts.
    """
    header, places, nbytes = layout(metadata, tensors)
    if most_bytes is None or nbytes <= most_bytes or len(tensors) < 2:
        file = f"{stem}.gguf"
        return Parts({file: (header, nbytes)}, {name: replace(place, file=file) for name, place in places.items()})
    cut = list(_cut(metadata, tensors, most_bytes))
    if len(cut) > MOST_PARTS:
        raise OutputError(
            f"--split-size {most_bytes} makes {len(cut)} files, more than {MOST_PARTS}. Give a larger one."
        )
    files: dict[str, tuple[bytes, int]] = {}
    found: dict[str, GgufTensor] = {}
    for number, names in enumerate(cut):
        file = f"{stem}-{number + 1:05d}-of-{len(cut):05d}.gguf"
        own = {name: tensors[name] for name in names}
        header, places, nbytes = layout(_metadata(metadata, number, len(cut), len(tensors)), own)
        files[file] = header, nbytes
        found |= {name: replace(place, file=file) for name, place in places.items()}
    return Parts(files, found)


def _metadata(metadata: Mapping[str, GgufValue], number: int, count: int, tensors: int) -> dict[str, GgufValue]:
    """Of one part."""
    return {
        **(metadata if number == 0 else {}),
        "split.no": GgufValue.of("uint16", number),
        "split.count": GgufValue.of("uint16", count),
        "split.tensors.count": GgufValue.of("int32", tensors),
    }


def _cut(metadata: Mapping[str, GgufValue], tensors: Shapes, most_bytes: int) -> Iterator[list[str]]:
    """Names of each part's tensors. The numbers in a part's keys do not change their length, so any will do."""
    first, further = (HEAD_BYTES + len(metadata_bytes(_metadata(metadata, number, 1, 1))) for number in (0, 1))
    names: list[str] = []
    header, data = first, 0
    for name, (type, shape) in tensors.items():
        entry = len(name.encode()) + ENTRY_BYTES + 8 * len(shape)
        own = padded(GGML_TYPES[type].storage_bytes(shape), DEFAULT_ALIGNMENT)
        if names and padded(header + entry, DEFAULT_ALIGNMENT) + data + own > most_bytes:
            yield names
            names, header, data = [], further, 0
        names.append(name)
        header, data = header + entry, data + own
    yield names
