"""The GGUF container: checked headers, and layouts whose size is known before any data exists.

A file is a magic word, a version and two counts; metadata, as keys with typed values; of every tensor its
name, dimensions, type and offset; then the tensors' bytes, each beginning at a multiple of the alignment.
Everything is little endian. Dimensions are stored fastest first; a shape here is the other way round, as
NumPy and torch have it: [experts, rows, columns]. The header comes from strangers, so every number in it is
checked before it is used. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from alphaq.checkpoint.files import check_link, open_file
from alphaq.checkpoint.gguf.values import STRUCT_FORMATS, VALUE_TYPES, GgufValue, encoded
from alphaq.errors import CheckpointError, OutputError
from alphaq.formats.ggml import GGML_TYPES

MAGIC = b"GGUF"
VERSION = 3
READABLE_VERSIONS = (2, 3)  # laid out alike; 3 only adds that a file may be big endian
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
HEAD_BYTES = 24  # a file begins with so many
ENTRY_BYTES = 24  # of a tensor's entry, beside its name and 8 for each dimension
MAX_HEADER_BYTES = 100_000_000  # ten times that of a vocabulary of 250 000 tokens with its merges
MAX_ENTRIES = 100_000  # a large model has a hundred keys and a few thousand tensors
MAX_TEXTS = 4_000_000  # of all arrays together; a large vocabulary with its merges has half a million
MAX_NAME_BYTES = 1000  # llama.cpp's own limit for tensors is 63
MAX_DIMENSIONS = 4  # ggml's own
MAX_WRITTEN_NAME_BYTES = 63  # llama.cpp loads no longer name of a tensor

_TYPE_NAMES = {kind.number: name for name, kind in GGML_TYPES.items()}
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: bytes [begin, end) of its file, padding not included.

    type: a name in GGML_TYPES. shape: [..., rows, columns]. file: the part of a split model that holds it.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    begin: int
    end: int
    file: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.begin


@dataclass(frozen=True)
class GgufFile:
    """A model's header: of one file, or of all the parts that it is split into.

    files: names of the parts, in `folder`. metadata: in file order, without the keys that only tell how the model is
    split. tensors: in file order. fingerprint: SHA-256 over names, sizes and headers of the parts.
    """

    folder: Path
    files: tuple[str, ...]
    metadata: dict[str, GgufValue]
    tensors: dict[str, GgufTensor]
    alignment: int
    fingerprint: str

    @property
    def name(self) -> str:
        """The file's name without its ending and part number."""
        part = _PART_NAME.fullmatch(self.files[0])
        return Path(self.files[0]).stem if part is None else part["stem"]


class _Header:
    """A file read field by field; no field reaches beyond the file, nor beyond the longest header allowed."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.place = 0
        self.texts = 0

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name} is damaged: {why}. Download the file again.")

    @property
    def left(self) -> int:
        """Bytes that a field may still take."""
        return min(self.size, MAX_HEADER_BYTES) - self.place

    def take(self, nbytes: int) -> bytes:
        data = self.file.read(nbytes) if nbytes <= self.left else b""
        if len(data) < nbytes:
            limit = f"{self.size} bytes" if self.size <= MAX_HEADER_BYTES else f"{MAX_HEADER_BYTES} bytes allowed"
            raise self.damaged(f"at byte {self.place} its header claims {nbytes} bytes, beyond the {limit}")
        self.place += nbytes
        return data

    def uint32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def uint64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def text(self) -> str:
        raw = self.take(self.uint64())
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.damaged(f"the text that ends at byte {self.place} is not UTF-8") from None

    def new_name(self, what: str, known: Container[str]) -> str:
        name = self.text()
        # Control characters cannot be shown.
        if not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise self.damaged(f"{what} {name[:80]!r} is not printable text of 1 to {MAX_NAME_BYTES} bytes")
        if name in known:
            raise self.damaged(f"{what} {name!r} appears twice")
        return name

    def count(self, what: str, least_bytes: int, most: int = MAX_HEADER_BYTES) -> int:
        """A number of items; bounded by what fits into the bytes left, so that nothing loops over a mere claim."""
        count = self.uint64()
        if count > min(most, self.left // least_bytes):
            raise self.damaged(f"it claims {count} {what}, more than can be there")
        return count

    def type(self, where: str) -> str:
        number = self.uint32()
        if number >= len(VALUE_TYPES):
            raise self.damaged(f"{where} has a value of the unknown type {number}")
        return VALUE_TYPES[number]

    def value(self, key: str) -> GgufValue:
        type = self.type(key)
        begin = self.place
        element, count = type, 1
        if type == "array":
            element = self.type(key)
            if element == "array":
                raise self.damaged(f"{key} is an array of arrays, which no model has")
            count = self.count(
                f"values of {key}", 8 if element == "string" else struct.calcsize(STRUCT_FORMATS[element])
            )
        if element == "string":
            self.texts += count
            if self.texts > MAX_TEXTS:
                raise self.damaged(f"with {key} it claims {self.texts} texts, more than any vocabulary has")
            for _ in range(count):
                self.text()
        else:
            self.take(count * struct.calcsize(f"<{STRUCT_FORMATS[element]}"))
        self.file.seek(begin)
        return GgufValue(type, self.file.read(self.place - begin))

    def metadata(self, count: int) -> dict[str, GgufValue]:
        values: dict[str, GgufValue] = {}
        for _ in range(count):
            key = self.new_name("the key", values)
            values[key] = self.value(key)
        return values

    def tensors(self, count: int) -> dict[str, GgufTensor]:
        """Tensors with offsets from the beginning of the data, which is not yet known."""
        tensors: dict[str, GgufTensor] = {}
        for _ in range(count):
            name = self.new_name("the tensor", tensors)
            dimensions = self.uint32()
            if dimensions > MAX_DIMENSIONS:
                raise self.damaged(f"tensor {name!r} has {dimensions} dimensions, more than {MAX_DIMENSIONS}")
            shape = tuple(self.uint64() for _ in range(dimensions))[::-1]
            number, offset = self.uint32(), self.uint64()
            if number not in _TYPE_NAMES:
                raise CheckpointError(
                    f"{self.path.name}: tensor {name!r} has the ggml type {number}, which cannot be read. Readable: "
                    f"{', '.join(GGML_TYPES)}. Convert the model again with a current llama.cpp."
                )
            if 0 in shape:
                raise self.damaged(f"tensor {name!r} of shape {list(shape)} has no elements")
            type = _TYPE_NAMES[number]
            block = GGML_TYPES[type].block_weights
            if (shape[-1] if shape else 1) % block:
                raise self.damaged(f"tensor {name!r} of shape {list(shape)} has no whole {type} blocks of {block}")
            end = offset + GGML_TYPES[type].storage_bytes(shape)
            tensors[name] = GgufTensor(name, type, shape, offset, end, self.path.name)
        return tensors


def read_gguf(path: Path) -> GgufFile:
    """Parse and check a model's header without touching its data.

    path: a file, or any part of a split model (`…-00001-of-00003.gguf`); the others lie beside it. Raises
    CheckpointError with the file's name if the header cannot be true.
    """
    opened = _read_part(path)
    parts = _count_of(opened, "split.count")
    if parts is None or parts < 2:
        return replace(opened, metadata=_of_whole(opened))
    name = _PART_NAME.fullmatch(path.name)
    if name is None or int(name["parts"]) != parts:
        raise CheckpointError(
            f"{path.name} is part of a model split into {parts} files, but is not named so "
            f"(NAME-00001-of-{parts:05d}.gguf). Give the parts their original names."
        )
    return _merge(_parts(path, name["stem"], parts), parts)


def first_part(path: Path) -> Path:
    """The file that tells of all parts of a split model, going by its name; any other file itself."""
    part = _PART_NAME.fullmatch(path.name)
    return path if part is None else path.with_name(f"{part['stem']}-00001-of-{part['parts']}.gguf")


def _parts(path: Path, stem: str, count: int) -> Iterable[GgufFile]:
    for part in range(1, count + 1):
        beside = path.with_name(f"{stem}-{part:05d}-of-{count:05d}.gguf")
        if beside != path:
            check_link(beside)
        yield _read_part(beside)


def _merge(parts: Iterable[GgufFile], count: int) -> GgufFile:
    first: GgufFile | None = None
    files: list[str] = []
    tensors: dict[str, GgufTensor] = {}
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        (file,) = part.files
        files.append(file)
        first = first or part
        for key, expected in (("split.no", number), ("split.count", count)):
            if (found := _count_of(part, key)) != expected:
                raise CheckpointError(f"{file}: {key} is {found}, not {expected}. Download the file again.")
        if twice := tensors.keys() & part.tensors.keys():
            name = min(twice)
            raise CheckpointError(f"{name!r} is in both {tensors[name].file} and {file}. Download the model again.")
        tensors |= part.tensors
        digest.update(part.fingerprint.encode())
    assert first is not None  # there are at least two
    promised = _count_of(first, "split.tensors.count")
    if promised is not None and promised != len(tensors):
        raise CheckpointError(
            f"{first.files[0]} promises {promised} tensors, but its parts hold {len(tensors)}. Download them again."
        )
    whole = replace(first, files=tuple(files), tensors=tensors, fingerprint=digest.hexdigest())
    return replace(whole, metadata=_of_whole(first))


def _of_whole(part: GgufFile) -> dict[str, GgufValue]:
    """Metadata of the model, without those that only tell how its file is split."""
    return {key: value for key, value in part.metadata.items() if not key.startswith("split.")}


def _count_of(part: GgufFile, key: str) -> int | None:
    """A whole number in the metadata, None if the key is not there."""
    if key not in part.metadata:
        return None
    entry = part.metadata[key]
    value = None if entry.element else entry.value
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{part.files[0]}: {key} is not a count. Download the file again.")
    return value


def _read_part(path: Path) -> GgufFile:
    try:
        with open_file(path) as file:
            return _parse(_Header(path, file))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Complete the download.") from None


def _parse(header: _Header) -> GgufFile:
    path = header.path
    if header.size < HEAD_BYTES or header.take(4) != MAGIC:
        raise CheckpointError(
            f"{path.name} is not a GGUF file: it does not begin with {MAGIC.decode()!r}. Check the path."
        )
    version = header.uint32()
    if version not in READABLE_VERSIONS:
        order = " (big endian)" if version & 0xFFFF == 0 else ""
        raise CheckpointError(
            f"{path.name} has GGUF version {version}{order}; readable: little endian, {READABLE_VERSIONS}. "
            "Convert the model again with a current llama.cpp."
        )
    tensor_count = header.count("tensors", 24, MAX_ENTRIES)
    metadata = header.metadata(header.count("keys", 13, MAX_ENTRIES))
    tensors = header.tensors(tensor_count)
    alignment = _alignment(metadata)
    if alignment is None:
        raise header.damaged(f"{ALIGNMENT_KEY} is not a power of two in 32 bits")
    data_begin = padded(header.place, alignment)
    position = data_begin
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        begin, end = data_begin + tensor.begin, data_begin + tensor.end
        if tensor.begin % alignment:
            raise header.damaged(f"tensor {tensor.name!r} begins at no multiple of {alignment}")
        if begin < position:
            raise header.damaged(f"tensor {tensor.name!r} overlaps another")
        if end > header.size:
            raise header.damaged(f"tensor {tensor.name!r} ends at byte {end}, but the file has {header.size}")
        tensors[tensor.name] = replace(tensor, begin=begin, end=end)
        position = end
    digest = hashlib.sha256(os.fsencode(path.name) + f"\0{header.size}\0".encode())
    header.file.seek(0)
    digest.update(header.file.read(header.place))
    return GgufFile(path.parent, (path.name,), metadata, tensors, alignment, digest.hexdigest())


def _alignment(metadata: Mapping[str, GgufValue]) -> int | None:
    """What every tensor's offset is a multiple of, in bytes; None if the metadata name no power of two."""
    if ALIGNMENT_KEY not in metadata:
        return DEFAULT_ALIGNMENT
    entry = metadata[ALIGNMENT_KEY]
    value = entry.value if entry.type == "uint32" else None
    return value if isinstance(value, int) and value.bit_count() == 1 else None


def padded(nbytes: int, alignment: int) -> int:
    """Bytes up to the next multiple of the alignment."""
    return -(-nbytes // alignment) * alignment


# -- writing: sizes first -------------------------------------------------------------------------


def metadata_bytes(metadata: Mapping[str, GgufValue]) -> bytes:
    """The keys and their values as a file holds them."""
    return b"".join(
        encoded("string", (key,)) + struct.pack("<I", VALUE_TYPES.index(value.type)) + value.raw
        for key, value in metadata.items()
    )


def layout(
    metadata: Mapping[str, GgufValue], tensors: Mapping[str, tuple[str, Sequence[int]]]
) -> tuple[bytes, dict[str, GgufTensor], int]:
    """Header bytes, places and total size of a file with these tensors, their data in the order given.

    tensors: ggml type and shape [..., rows, columns] by name. The header is padded up to the first tensor; each
    tensor, the last one too, is to be padded to the alignment, which is `general.alignment` of the metadata or else
    32 bytes. Raises OutputError for what no reader would load.
    """
    alignment = _alignment(metadata)
    if alignment is None:
        raise OutputError(f"{ALIGNMENT_KEY} is not a power of two in 32 bits. Remove it from the metadata.")
    entries = []
    sizes = {}
    offset = 0
    for name, (type, shape) in tensors.items():
        kind = GGML_TYPES[type]
        if len(name.encode()) > MAX_WRITTEN_NAME_BYTES or not 1 <= len(shape) <= MAX_DIMENSIONS:
            raise OutputError(
                f"{name!r} of shape {list(shape)} cannot be a GGUF tensor: llama.cpp loads names of up to "
                f"{MAX_WRITTEN_NAME_BYTES} bytes and 1 to {MAX_DIMENSIONS} dimensions. Rename or reshape it."
            )
        if shape[-1] % kind.block_weights:
            raise OutputError(
                f"{name!r}: rows of {shape[-1]} weights are not whole {type} blocks of {kind.block_weights}. "
                "Choose another type for it."
            )
        sizes[name] = kind.storage_bytes(shape)
        entries.append(
            encoded("string", (name,))
            + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind.number, offset)
        )
        offset += padded(sizes[name], alignment)
    head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)) + metadata_bytes(metadata)
    header = b"".join((head, *entries))
    header = header.ljust(padded(len(header), alignment), b"\0")
    places = {}
    begin = len(header)
    for name, (type, shape) in tensors.items():
        places[name] = GgufTensor(name, type, tuple(shape), begin, begin + sizes[name])
        begin += padded(sizes[name], alignment)
    return header, places, begin
