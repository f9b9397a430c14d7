"""Entropy-coded files: tensors coded and checked at once, a layout once their sizes are known, and what says so.

A shard's header comes first and says how long everything is, and how long a tensor is once coded shows when it has been
coded. So coded tensors wait in a file of their own, and are copied to their places in the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alphaq.checkpoint.safetensors_format import DTYPE_NAMES, TORCH_DTYPES, TensorSpec, layout, parse_header
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.engines.export import Layout, Stored, stored_in, write_json
from alphaq.errors import VerificationError
from alphaq.formats.coding import decode_tensor, encode_tensor
from alphaq.formats.versions import CODECS, CODED_FORMAT_VERSION, NATIVE_FORMAT_VERSION
from alphaq.work.untrusted import parse_json, read_bounded


def coded_tensor(plain: torch.Tensor, name: str) -> torch.Tensor:
    """A tensor as it is stored once coded. Raises VerificationError naming it unless decoding gives it back."""
    coded = encode_tensor(plain)
    if not torch.equal(as_bytes(decode_tensor(coded, name)), as_bytes(plain)):
        raise VerificationError(f"{name} is not the same once coded. Report this, with the zstandard version.")
    return coded


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, uint8 [n]."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Dtype and shape, as a file has them."""
    return TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def tensor_of(pieces: Iterable[memoryview], spec: TensorSpec) -> torch.Tensor:
    """A tensor out of its bytes."""
    data = bytearray()
    for piece in pieces:
        data += piece
    raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return raw.view(TORCH_DTYPES[spec.dtype]).view(spec.shape)


def spec_at(stored: Stored, index: int | None) -> TensorSpec:
    """Dtype and shape of one entry of a stack, or of the whole."""
    return TensorSpec(stored.dtype, stored.shape if index is None else stored.shape[1:])


def laid_out(written: Layout) -> dict[str, Stored]:
    """The tensors that a layout of safetensors files has places for, by name."""

    def tensors(file: str) -> Mapping[str, TensorInfo]:
        header, nbytes = written.files[file]
        return parse_header(file, nbytes, lambda begin, count: header[begin : begin + count])[0]

    return stored_in({file: tensors(file) for file in written.files})


@dataclass(frozen=True)
class CodedLayout:
    """Files of coded tensors: each file's header and size, and every tensor's place."""

    files: dict[str, tuple[bytes, int]]
    places: dict[str, Stored]

    @classmethod
    def of(cls, specs: Mapping[str, Mapping[str, TensorSpec]]) -> CodedLayout:
        """For tensors by file and name."""
        files, places = {}, {}
        for file, tensors in specs.items():
            header, infos, nbytes = layout(tensors)
            files[file] = header, nbytes
            places.update(stored_in({file: infos}))
        return cls(files, places)

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(nbytes for _, nbytes in self.files.values())

    def of_entries(self, plain: Layout) -> Layout:
        """The layout of an output whose entries are one tensor each, with these places."""
        entries = (replace(one, places=(self.places[one.parts[0][0]].place,)) for one in plain.entries)
        return Layout(self.files, tuple(entries))


def say_codec(config_file: Path, codec: str, out: Path) -> None:
    """Write a native model's config so that it says how its tensors are coded."""
    config = parse_json(read_bounded(config_file))
    quantization = {key: value for key, value in config["quantization_config"].items() if key != "codec"}
    quantization["format_version"] = NATIVE_FORMAT_VERSION if codec == CODECS[0] else CODED_FORMAT_VERSION
    config["quantization_config"] = quantization | ({} if codec == CODECS[0] else {"codec": codec})
    write_json(out, config)
