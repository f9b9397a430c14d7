"""A GGUF file with the weights that its quantized tensors stand for, which llama.cpp runs beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from alphaq.checkpoint.files import PlainFile
from alphaq.checkpoint.gguf.format import GgufTensor, layout, read_gguf
from alphaq.checkpoint.safetensors_format import TORCH_DTYPES
from alphaq.engines.gguf.converter import require_room
from alphaq.formats.ggml import GGML_TYPES
from alphaq.formats.ggml_library import restore_rows

PIECE_VALUES = 1 << 24  # of a tensor, held at a time


def write_restored(path: Path, out: Path) -> None:
    """The same model in one file, with every quantized tensor in BF16. path: the file, or any of its parts.

    Raises OutputError where there is no room for it, CheckpointError for a damaged file.
    """
    file = read_gguf(path)
    shapes = {name: (_restored_type(tensor), tensor.shape) for name, tensor in file.tensors.items()}
    header, places, nbytes = layout(file.metadata, shapes)
    require_room(nbytes, out.parent)
    with out.open("xb") as target:
        target.write(header)
        for name, place in places.items():
            target.seek(place.begin)
            tensor = file.tensors[name]
            for piece in _pieces(PlainFile(file.folder / tensor.file), tensor):
                target.write(piece)
        target.truncate(nbytes)


def _restored_type(tensor: GgufTensor) -> str:
    return tensor.type if tensor.type in TORCH_DTYPES else "BF16"


def _pieces(file: PlainFile, tensor: GgufTensor) -> Iterator[bytes]:
    """The restored tensor's bytes, some rows at a time."""
    columns = tensor.shape[-1]
    row_bytes = GGML_TYPES[tensor.type].storage_bytes((1, columns))
    step = max(1, PIECE_VALUES // columns) * row_bytes
    for begin in range(tensor.begin, tensor.end, step):
        stored = file.read(begin, min(step, tensor.end - begin))
        if _restored_type(tensor) != tensor.type:
            values = restore_rows(stored.numpy().reshape(-1, row_bytes), tensor.type, columns)
            stored = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8)
        yield stored.numpy().tobytes()
