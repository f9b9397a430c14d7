"""Read llama.cpp's importance matrices: the mean square of each input column, as a calibration text drove it.

Two formats: GGUF files with tensors `NAME.in_sum2` [experts, columns] and `NAME.counts` [experts], and the older
binary one (a count, then name, calls and values of each entry). NAME is the GGUF tensor's.
Source: llama.cpp's tools/imatrix.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alphaq.checkpoint.files import PlainFile, memory_bytes
from alphaq.checkpoint.gguf.format import MAGIC, MAX_NAME_BYTES, read_gguf
from alphaq.errors import CheckpointError
from alphaq.work.untrusted import open_regular, read_bounded, shown

MAX_ENTRIES = 10_000  # a model has a dozen matrices to a layer
MAX_BINARY_BYTES = 1 << 30  # it holds a row of each tensor, so that of DeepSeek-V3 has a few MB
MAX_SHARE = 2  # of memory: one in so many bytes is taken by values at most
PRIOR_TOKENS = 16
"""An expert's own inputs are taken for no more than they tell: these many of its layer's are added to them."""


@dataclass(frozen=True)
class ImportanceMatrix:
    """Importance by GGUF tensor name, float32 [experts, columns] (one row where there are no experts), mean 1.

    Experts that the text seldom reached have their layer's importance, more or less; tensors it never reached, ones.
    """

    name: str
    digest: str
    tensors: dict[str, np.ndarray]


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read either format. Raises CheckpointError naming the file if it is neither, or damaged."""
    try:
        with open_regular(path) as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        tensors = _from_gguf(path) if is_gguf else _from_binary(path, read_bounded(path, MAX_BINARY_BYTES))
        digest = _digest(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check the path of --imatrix.") from None
    if not tensors:
        raise CheckpointError(f"{path} holds no importance matrix. Make one with `alphaq imatrix`.")
    return ImportanceMatrix(path.name, digest, tensors)


def _digest(path: Path) -> str:
    """Of the whole file, read in pieces: those of the largest models have more than a gigabyte."""
    file, digest = PlainFile(path), hashlib.sha256()
    for piece in file.chunks(0, path.stat().st_size):
        digest.update(piece)
    return digest.hexdigest()[:16]


def _from_gguf(path: Path) -> dict[str, np.ndarray]:
    file = read_gguf(path)
    if len(file.tensors) > 2 * MAX_ENTRIES:
        raise CheckpointError(f"{path} has {len(file.tensors)} tensors, too many. Check the path of --imatrix.")
    nbytes = sum(tensor.nbytes for tensor in file.tensors.values())
    if 0 < memory_bytes() < MAX_SHARE * nbytes:
        raise CheckpointError(
            f"{path} holds {nbytes:,} bytes of values, more than half of the memory. Check the path of --imatrix, or "
            "use a machine with more."
        )
    opened = {part: PlainFile(file.folder / part) for part in file.files}
    means = {}
    for name, tensor in file.tensors.items():
        if not name.endswith(".in_sum2"):
            continue
        own = name.removesuffix(".in_sum2")
        counts = file.tensors.get(f"{own}.counts")
        if counts is None or tensor.type != "F32" or counts.type != "F32":
            raise CheckpointError(f"{path}: {own} lacks sums or counts in F32. Make the importance matrix again.")
        sums, calls = (opened[one.file].read(one.begin, one.nbytes).numpy().view("<f4") for one in (tensor, counts))
        if len(sums) % len(calls):
            raise CheckpointError(f"{path}: {own} has {len(sums)} sums for {len(calls)} counts. Make it again.")
        means[own] = _means(path, own, sums.reshape(len(calls), -1), calls[:, None])
    return means


def _from_binary(path: Path, data: bytes) -> dict[str, np.ndarray]:
    """int32 entries; of each int32 length, name, int32 calls, int32 values, float32 values (sums over the calls)."""
    try:
        (entries,) = struct.unpack_from("<i", data, 0)
        if not 0 < entries <= MAX_ENTRIES:
            raise ValueError(f"it claims {entries} entries")
        place, means = 4, {}
        for _ in range(entries):
            (length,) = struct.unpack_from("<i", data, place)
            if not 0 < length <= min(len(data) - place, MAX_NAME_BYTES):
                raise ValueError(f"a name of {length} bytes")
            name = data[place + 4 : place + 4 + length].decode()
            if name in means or not name.isprintable():
                raise ValueError(f"the name {shown(name)} is there twice or not printable")
            place += 4 + length
            calls, count = struct.unpack_from("<ii", data, place)
            if not 0 < count <= (len(data) - place) // 4:
                raise ValueError(f"{count} values of {name}")
            values = np.frombuffer(data, "<f4", count, place + 8)
            place += 8 + 4 * count
            means[name] = _means(path, name, values[None], np.array([[max(calls, 0)]], np.float32))
    except (struct.error, ValueError) as error:
        raise CheckpointError(f"{path} is not an importance matrix of llama.cpp ({error}). Check --imatrix.") from None
    return means


def _means(path: Path, name: str, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    if not (np.isfinite(sums).all() and (sums >= 0).all() and np.isfinite(counts).all() and (counts >= 0).all()):
        raise CheckpointError(f"{path}: {name} holds numbers that no mean square can be. Make it again.")
    return positive(_shrunk(sums.astype(np.float64), counts.astype(np.float64)))


def positive(means: np.ndarray) -> np.ndarray:
    """Importances [matrices, columns] of mean 1; all alike where nothing is known.

    Only ratios count; the quantizers' sums must neither overflow nor vanish. A column that was always 0 still must not
    be free to take any value.
    """
    reached = (means > 0).any(axis=1, keepdims=True)
    scaled = means / np.where(reached, means.mean(axis=1, keepdims=True), 1.0)
    return np.where(reached, np.clip(scaled, 1e-6, 1e6), 1.0).astype(np.float32)


def _shrunk(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean squares [experts, columns] of sums and of counts [experts, 1].

    Each expert's mean is (Σx² + k·m) / (n + k), where m is the mean over all experts' inputs and k `PRIOR_TOKENS`.
    """
    if len(sums) == 1:
        return sums / np.maximum(counts, 1)
    layer = sums.sum(axis=0) / max(counts.sum(), 1)
    return (sums + PRIOR_TOKENS * layer) / (counts + PRIOR_TOKENS)
