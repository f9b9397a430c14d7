"""The real llama.cpp, as the package itself runs it, and files for it with every weight in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from alphaq.checkpoint.gguf.format import layout, read_gguf
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.engines.gguf.library import Batch, Llama, LlamaError, _ContextParams, _ModelParams, opened

__all__ = [
    "Batch",
    "Llama",
    "LlamaError",
    "_ContextParams",
    "_ModelParams",
    "in_float32",
    "opened",
    "plain_file",
    "values_in",
    "write_gguf",
]


def values_in(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor as the gguf package reads it, [..., rows, columns]."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for tensor in gguf.GGUFReader(path).tensors
    }


def write_gguf(
    path: Path,
    metadata: dict[str, GgufValue],
    tensors: dict[str, NDArray[np.float32]],
    type_of: Callable[[str], str] = lambda name: "F32",
) -> Path:
    """A file with these values in these types, by the gguf package's quantizers."""
    types = {name: type_of(name) for name in tensors}
    header, places, nbytes = layout(metadata, {name: (types[name], tensors[name].shape) for name in tensors})
    data = np.zeros(nbytes, np.uint8)
    data[: len(header)] = np.frombuffer(header, np.uint8)
    for name, place in places.items():
        stored = gguf.quants.quantize(tensors[name], gguf.GGMLQuantizationType[types[name]])
        data[place.begin : place.end] = stored.reshape(-1).view(np.uint8)
    path.write_bytes(data.tobytes())
    return path


def in_float32(path: Path, out: Path) -> Path:
    """The same model with every weight as the number that it stands for."""
    return write_gguf(out, read_gguf(path).metadata, values_in(path))


def plain_file(exact: Path, out: Path) -> Path:
    """A Mixtral file as one of Granite's, which has the same tensors and which no table of ours describes."""
    scales = {"residual_scale": 0.4, "embedding_scale": 3.0, "attention.scale": 0.2, "logit_scale": 1.0}
    metadata = {
        key.replace("llama.", "granitemoe.", 1): value
        for key, value in read_gguf(exact).metadata.items()
        if key != "general.architecture"
    }
    metadata["general.architecture"] = GgufValue.of("string", "granitemoe")
    metadata |= {f"granitemoe.{key}": GgufValue.of("float32", value) for key, value in scales.items()}
    return write_gguf(out, metadata, values_in(exact))
