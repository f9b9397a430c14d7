"""The safetensors container: checked headers, and layouts whose size is known before any data exists.

A file is an 8-byte little-endian header length, a JSON header, then the tensors' bytes without holes.
The header comes from strangers, so every number in it is checked before it is used.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from alphaq.checkpoint.files import open_file
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.errors import CheckpointError
from alphaq.work.untrusted import MAX_POINTER_BYTES, POINTER_BEGIN, parse_json, pointer, shown

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_DIMENSIONS = 8
MAX_TENSOR_BYTES = 2**62  # sizes and places are 64-bit numbers
MAX_NAME_CHARACTERS = 1000

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,  # exponents; torch has had a type for them since 2.7 only
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ITEM_BYTES = {name: torch.empty((), dtype=dtype, device="meta").element_size() for name, dtype in TORCH_DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def read_header(path: Path) -> tuple[dict[str, TensorInfo], bytes]:
    """Parse and check a file's header without touching its data.

    Returns the tensors in file order and the raw header bytes. Raises CheckpointError with the file's
    name if the file cannot be read, or the header is longer than the file, is not JSON, or describes data that is not
    exactly there.
    """

    with open_file(path) as file:

        def read(begin: int, nbytes: int) -> bytes:
            file.seek(begin)
            return file.read(nbytes)

        return parse_header(path.name, os.fstat(file.fileno()).st_size, read)


def parse_header(file_name: str, size: int, read: Callable[[int, int], bytes]) -> tuple[dict[str, TensorInfo], bytes]:
    """`read_header` of a file that lies anywhere: `read(begin, nbytes)` gives bytes of it, asked for twice at most."""
    raw = _header_bytes(file_name, size, read)
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise _damaged(file_name, f"its header is not valid JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(header, dict):
        raise _damaged(file_name, "its header is not a JSON object")
    data_begin = 8 + len(raw)
    known: dict[tuple[int, ...], tuple[int, ...]] = {}  # a shape is kept once, however many tensors have it
    tensors = [
        _checked_entry(file_name, name, entry, data_begin, known)
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    tensors.sort(key=attrgetter("begin", "end"))
    position = data_begin
    for tensor in tensors:
        if tensor.begin != position:
            raise _damaged(file_name, f"tensor {tensor.name!r} overlaps another or leaves a hole before it")
        position = tensor.end
    if position != size:
        raise _damaged(file_name, f"its tensors end at byte {position}, but the file has {size} (cut short or padded)")
    return {tensor.name: tensor for tensor in tensors}, raw


def _damaged(file_name: str, why: str) -> CheckpointError:
    return CheckpointError(f"{file_name} is damaged: {why}. Download the file again.")


def _header_bytes(file_name: str, size: int, read: Callable[[int, int], bytes]) -> bytes:
    """The JSON of a header, of a length that is allowed."""
    prefix = read(0, 8) if size >= 8 else b""
    if len(prefix) < 8:
        raise _damaged(file_name, f"it has {size} bytes, too few for a safetensors header")
    if size <= MAX_POINTER_BYTES and POINTER_BEGIN.startswith(prefix) and read(0, size).startswith(POINTER_BEGIN):
        raise pointer(file_name)  # here for those that lie on a store
    length = int.from_bytes(prefix, "little")
    if length > size - 8:
        raise _damaged(file_name, f"its header claims {length} bytes, but only {size - 8} follow")
    if length > MAX_HEADER_BYTES:
        raise _damaged(file_name, f"its header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
    return read(8, length)


def _checked_entry(
    file_name: str, name: str, entry: Any, data_begin: int, known: dict[tuple[int, ...], tuple[int, ...]]
) -> TensorInfo:
    """One tensor of a header. Raises CheckpointError for a claim that cannot be true."""
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME_CHARACTERS:
        raise _damaged(
            file_name, f"the tensor name {shown(name)} is not printable text of 1 to {MAX_NAME_CHARACTERS} characters"
        )
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _damaged(file_name, f"tensor {name!r} lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{file_name}: tensor {name!r} has dtype {shown(dtype)}, which cannot be read. "
            f"Readable: {', '.join(ITEM_BYTES)}. Convert the checkpoint to bf16 first."
        )
    numbers = (*shape, begin, end) if isinstance(shape, list) else (None,)
    if {*map(type, numbers)} != {int} or min(numbers) < 0 or max(numbers) >= MAX_TENSOR_BYTES:
        raise _damaged(file_name, f"tensor {name!r} has a shape or offsets that are not counts")
    if len(shape) > MAX_DIMENSIONS:
        raise _damaged(file_name, f"tensor {name!r} has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    most = nbytes or math.prod(max(side, 1) for side in shape)  # a 0 hides the others
    if most >= MAX_TENSOR_BYTES:
        raise _damaged(file_name, f"tensor {name!r} of shape {shape} is larger than any can be")
    if end - begin != nbytes:
        raise _damaged(file_name, f"tensor {name!r} of shape {shape} does not fill its {end - begin} bytes")
    sides = known.setdefault(tuple(shape), tuple(shape))
    return TensorInfo(name, dtype, sides, data_begin + begin, data_begin + end)


# -- writing: sizes first -------------------------------------------------------------------------

_METADATA = {"format": "pt"}
_ENTRY_MARGIN = 40  # two offsets of up to 20 digits


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def entry_bytes(name: str, spec: TensorSpec) -> int:
    """Header bytes reserved for a tensor: an upper bound that does not depend on its neighbours.

    Reserving a bound makes a file's size the sum of its tensors' own sizes, which is what lets a
    budget in bytes be solved exactly; the header is padded with spaces up to it.
    """
    entry = json.dumps(
        {name: {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [0, 0]}},
        separators=(",", ":"),
    )
    needed = len(entry.encode()) - 2 + 1 + _ENTRY_MARGIN  # no braces, one comma
    return -(-needed // 8) * 8  # so that the data stays on an 8-byte boundary


def stored_bytes(name: str, spec: TensorSpec) -> int:
    """Everything one tensor adds to a file: its data and its header entry."""
    return spec.nbytes + entry_bytes(name, spec)


FILE_OVERHEAD = 8 + -(-len(json.dumps({"__metadata__": _METADATA}, separators=(",", ":"))) // 8) * 8
"""Bytes of a file beyond its tensors' `stored_bytes`: length word, braces and metadata."""


def layout(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, TensorInfo], int]:
    """Header bytes, places and total size of a file with these tensors.

    Tensors are ordered by falling item size, so that each is aligned to its own dtype. Total size is
    exactly `FILE_OVERHEAD + Σ stored_bytes`.
    """
    order = sorted(specs, key=lambda name: (-ITEM_BYTES[specs[name].dtype], name))
    header_bytes = FILE_OVERHEAD - 8 + sum(entry_bytes(name, specs[name]) for name in order)
    entries: dict[str, object] = {"__metadata__": _METADATA}
    places = {}
    offset = 0
    for name in order:
        spec = specs[name]
        end = offset + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        places[name] = TensorInfo(name, spec.dtype, spec.shape, 8 + header_bytes + offset, 8 + header_bytes + end)
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode().ljust(header_bytes)
    return header_bytes.to_bytes(8, "little") + header, places, 8 + header_bytes + offset


def total_bytes(specs: Iterable[tuple[str, TensorSpec]]) -> int:
    """Size of a file with these tensors, as `layout` would make it."""
    return FILE_OVERHEAD + sum(stored_bytes(name, spec) for name, spec in specs)
