"""Open a checkpoint (a folder or a hub id) and read its matrices one at a time.

Only safetensors is read: a pickle runs code when it is loaded. Weights stored in 8 or 4 bits are decoded as they are
read; only `encoded.encodings` knows how, and `encoded.tensors` which.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from alphaq.checkpoint.encoded.announced import MODELOPT_FILE, announced, require_no_codes, unquantized
from alphaq.checkpoint.encoded.encodings import (
    Encoding,
    bytes_on_disk,
    decode,
    rows_place,
    stored_dtype,
    stored_grid,
)
from alphaq.checkpoint.encoded.tensors import decoded_shards
from alphaq.checkpoint.families.architecture import Architecture, architecture_of
from alphaq.checkpoint.families.formulas import current
from alphaq.checkpoint.families.matching import match_tensors, unfolded
from alphaq.checkpoint.families.prefixes import fitted
from alphaq.checkpoint.files import (
    CHUNK_BYTES,
    PlainFile,
    SourceFile,
    Stamp,
    changed,
    is_file,
    memory_bytes,
    read_json,
    reading,
    without_collecting,
)
from alphaq.checkpoint.gguf.format import GgufFile, GgufTensor, metadata_bytes
from alphaq.checkpoint.gguf.source import find_gguf, open_gguf
from alphaq.checkpoint.hub import expanded, local_folder, resolve_folder, small_files
from alphaq.checkpoint.incomplete import check_fetched
from alphaq.checkpoint.remote import Store, is_url, local_path
from alphaq.checkpoint.safetensors_format import TORCH_DTYPES, TensorInfo
from alphaq.checkpoint.side_files import SIDE_FILES, SideFiles, side_files
from alphaq.checkpoint.weights import INDEX_NAME, NAMED_KEY, SINGLE_NAME, read_weights
from alphaq.checkpoint.weights import read_shards as read_shards
from alphaq.errors import CheckpointError
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.plan import SourceIdentity
from alphaq.simd.sums import in_threads
from alphaq.work.untrusted import shown

SAMPLES, SAMPLE_BYTES = 16, 4096  # of a weight file, to recognise it by
SETTINGS_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
NATIVE_METHOD = "alphaq"  # the quant_method of native checkpoints
READABLE_WEIGHTS = ("F32", "F16", "BF16")
_IMPLEMENTATIONS = {"attn_implementation", "_attn_implementation", "experts_implementation"}
"""Keys by which transformers lets a config choose kernels, also those of any repository."""

QUANTIZABLE = (Role.EXPERT, Role.SHARED_EXPERT, Role.ATTENTION, Role.MIXER, Role.DENSE_MLP)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: names, shapes and roles known, no weight loaded.

    `shards` has each file's tensors in file order; `matrices` holds the 2-D weights that have a role.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    architecture: Architecture
    shards: dict[str, dict[str, TensorInfo]]
    matrices: tuple[MatrixRef, ...]
    roles: dict[str, Role]
    fingerprint: str
    pre_tokenizer: str | None = None
    """llama.cpp's name for the rule that cuts texts into words, where a user gives it."""
    gguf: GgufFile | None = None
    """The header of a model that came as GGUF; its tensors have their Hugging Face names all the same."""
    gguf_names: dict[str, str] = field(default_factory=dict)
    """Which GGUF tensor holds each tensor."""
    stamps: Mapping[str, Stamp] = field(default_factory=dict, repr=False)
    """Of each file when the checkpoint was opened."""
    store: Store | None = None
    """Where the weights are, if on an object store; `folder` has the small files then."""
    notes: tuple[str, ...] = ()
    """What a user should know of the files that were read."""
    _files: dict[str, SourceFile] = field(default_factory=dict, repr=False, compare=False)

    @property
    def identity(self) -> SourceIdentity:
        """Name and fingerprint, as plans record them."""
        return SourceIdentity(name=self.name, fingerprint=self.fingerprint)

    @cached_property
    def shard_of(self) -> dict[str, str]:
        """Shard file of every stored tensor."""
        return {tensor: shard for shard, tensors in self.shards.items() for tensor in tensors}

    @cached_property
    def weight_files(self) -> list[str]:
        """The shards, then files that hold nothing but scales."""
        encodings = (info.encoding for tensors in self.shards.values() for info in tensors.values() if info.encoding)
        parts = (part.shard for encoding in encodings if encoding for _, part in encoding.parts)
        return list(dict.fromkeys([*self.shards, *parts]))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(bytes_on_disk(tensor) for tensors in self.shards.values() for tensor in tensors.values())

    def with_role(self, role: Role) -> list[MatrixRef]:
        """Matrices of one role, in file order."""
        return [matrix for matrix in self.matrices if matrix.role is role]

    @cached_property
    def planned_role(self) -> Role:
        """Role of the matrices that a plan is about: routed experts or, in a dense model, the MLP."""
        present = {matrix.role for matrix in self.matrices}
        return next(
            (role for role in (Role.EXPERT, Role.DENSE_MLP, Role.SHARED_EXPERT) if role in present), Role.EXPERT
        )

    @property
    def planned(self) -> list[MatrixRef]:
        """Matrices that the budget decides on."""
        return self.with_role(self.planned_role)

    def matrices_by_tensor(self, names: Container[str]) -> dict[str, list[MatrixRef]]:
        """The named matrices, grouped by the stored tensor that holds them, in file order."""
        within: dict[str, list[MatrixRef]] = {}
        for matrix in self.matrices:
            if matrix.name in names:
                within.setdefault(matrix.tensor, []).append(matrix)
        return within

    def file(self, shard: str) -> SourceFile:
        """A weight file, opened once."""
        if shard not in self._files:
            stamp = self.stamps[shard]
            store = self.store
            self._files[shard] = store.file(shard, stamp) if store else PlainFile(self.folder / shard, stamp)
        return self._files[shard]

    def shards_under(self, tensor: str) -> set[str]:
        """The weight files that hold a tensor: its own, and those of its scales."""
        encoding = self.info(tensor).encoding
        return {self.shard_of[tensor], *(part.shard for _, part in (encoding.parts if encoding is not None else ()))}

    def info(self, tensor: str) -> TensorInfo:
        """Where a tensor lies and how."""
        return self.shards[self.shard_of[tensor]][tensor]

    def gguf_tensor(self, name: str) -> GgufTensor:
        """The tensor of a GGUF file, maybe a stack of experts, that holds one of this checkpoint's."""
        if self.gguf is None:
            raise CheckpointError(f"{self.name} is no GGUF file, so {name} has no place in one. Open a GGUF file.")
        return self.gguf.tensors[self.gguf_names[name]]

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, decoded, in the dtype and shape that its `info` names."""
        shard, info = self.shard_of[name], self.info(name)
        if info.encoding is None:
            return self.file(shard).read(info.begin, info.nbytes).view(TORCH_DTYPES[info.dtype]).view(info.shape)
        if info.encoding.decoder is not None:
            return self._decoded(shard, info, info.encoding.decoder)
        slices, rows, columns = stored_grid(info)
        sides = (columns, rows) if info.encoding.turned else (rows, columns)
        whole = torch.empty((slices, *sides), dtype=TORCH_DTYPES[info.dtype])
        for index, part in enumerate(whole):
            stored = self._read(shard, info, index, 0, rows)
            part.copy_(stored.T if info.encoding.turned else stored)
        return whole.view(info.shape)

    def read(self, matrix: MatrixRef) -> torch.Tensor:
        """One matrix, contiguous [rows, columns], in its own dtype; of a fused tensor only its slice is read."""
        shard, info = self.shard_of[matrix.tensor], self.info(matrix.tensor)
        values = self._read(shard, info, matrix.index or 0, *_stored_rows(info, matrix))
        if _as_stored(info, matrix):
            return values[:: matrix.row_step].contiguous()
        return values.T[matrix.row_start :: matrix.row_step][: matrix.shape[0]].contiguous()

    def stored(self, matrix: MatrixRef) -> torch.Tensor | None:
        """The bytes of a matrix that a format of this package's own holds as a tensor of its own; None elsewhere."""
        shard, info = self.shard_of[matrix.tensor], self.info(matrix.tensor)
        if info.encoding is None or info.encoding.decoder is None or info.shape != matrix.shape or matrix.transposed:
            return None
        return self.file(shard).read(info.begin, info.nbytes)

    def read_rows(self, matrix: MatrixRef, part: slice) -> torch.Tensor:
        """Some rows of a matrix; all of it is read if disk has its columns."""
        shard, info = self.shard_of[matrix.tensor], self.info(matrix.tensor)
        if not _as_stored(info, matrix) or matrix.row_step > 1:
            return self.read(matrix)[part]
        first = matrix.row_start
        return self._read(shard, info, matrix.index or 0, first + part.start, first + part.stop)

    def _read(self, shard: str, info: TensorInfo, index: int, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a slice as they lie on disk, decoded, [rows, columns]."""
        encoding = info.encoding
        if encoding is not None and encoding.decoder is not None:
            return self._decoded(shard, info, encoding.decoder)[start:stop]
        if encoding is not None and encoding.head_rows:
            return self._read_heads(shard, info, encoding, start, stop)
        data = self.file(shard).read(*rows_place(info, index, start, stop)).view(stop - start, -1)
        if encoding is None or encoding.scheme == "plain":
            return data.view(TORCH_DTYPES[info.dtype])
        parts = {
            name: self._read(part.shard, part.info, part.slice_of(index), *part.rows(start, stop))
            for name, part in encoding.parts
        }
        return decode(encoding, data, parts, start)

    def _decoded(
        self, shard: str, info: TensorInfo, decoder: Callable[[torch.Tensor, str], torch.Tensor]
    ) -> torch.Tensor:
        """A tensor of which no part can be read alone."""
        return decoder(self.file(shard).read(info.begin, info.nbytes), info.name).view(info.shape)

    def _read_heads(self, shard: str, info: TensorInfo, encoding: Encoding, start: int, stop: int) -> torch.Tensor:
        """The same where rows of a head's halves lie in turns: whole heads are read and put in order."""
        height = encoding.head_rows
        first, last = start // height * height, -(-stop // height) * height
        turns = self._read(shard, replace(info, encoding=replace(encoding, head_rows=0)), 0, first, last)
        halves = turns.view(-1, height // 2, 2, turns.shape[1]).transpose(1, 2)
        return halves.reshape(turns.shape)[start - first : stop - first]

    def place(self, matrix: MatrixRef) -> tuple[int, int]:
        """First byte in its shard and number of bytes to read for a matrix, scales not counted."""
        info = self.info(matrix.tensor)
        return rows_place(info, matrix.index or 0, *_stored_rows(info, matrix))

    def stored_bytes(self, matrix: MatrixRef) -> int:
        """Bytes of a matrix's own weights on disk, its scales included."""
        info = self.info(matrix.tensor)
        return bytes_on_disk(info) * matrix.parameters // math.prod(info.shape)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The language model's settings as transformers 5 spells them, with the class's defaults."""
        return current({**self.architecture.defaults, **self.text_config})

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config, which multi-modal models nest."""
        return dict(self.architecture.text_config(self.config))

    def expect(self, matrix: MatrixRef) -> None:
        """Tell the system that a matrix will be read soon."""
        shard, info = self.shard_of[matrix.tensor], self.info(matrix.tensor)
        self.file(shard).expect(*self.place(matrix))
        for _, part in info.encoding.parts if info.encoding is not None else ():
            needed = part.rows(*_stored_rows(info, matrix))
            self.file(part.shard).expect(*rows_place(part.info, part.slice_of(matrix.index or 0), *needed))

    def forget(self, shard: str) -> None:
        """Tell the system that a shard is done with; only where the checkpoint does not fit into memory anyway."""
        if self.nbytes > memory_bytes() // 2:
            self.file(shard).forget()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # each process opens its own

    def contents(self, hashed: bool = False) -> str:
        """What tells these weights from others of the same shapes: each shard's hash, or when it was last written.

        A time alone would not do, since some tools give all files the same; so a few of the bytes are hashed with it.
        """

        def mark(shard: str) -> str:
            nbytes, version = self.stamps[shard]
            if self.store is not None and not hashed:
                return str(version)  # of the contents, as the store vouches
            places = range(0, nbytes, CHUNK_BYTES if hashed else max(SAMPLE_BYTES, nbytes // SAMPLES))
            piece = CHUNK_BYTES if hashed else SAMPLE_BYTES
            digest = hashlib.blake2b(digest_size=16)
            for begin in places:
                digest.update(self.file(shard).read(begin, min(piece, nbytes - begin)).numpy().data)
            return digest.hexdigest() if hashed else f"{version} {digest.hexdigest()}"

        return ",".join(in_threads(mark, self.weight_files))

    def require_unchanged(self) -> None:
        """Raise CheckpointError if weights, config or tokenizer are not those that were opened."""
        names = [*self.weight_files, *([] if self.gguf is not None else (*SETTINGS_FILES, INDEX_NAME, SINGLE_NAME))]
        now = _stamps(self.folder / name for name in names) if self.store is None else self.store.stamps()
        for name in names:
            if now.get(name) != self.stamps.get(name):
                raise changed(self.folder / name if self.store is None else f"{self.store.url}/{name}")

    def readable_files(self) -> frozenset[str]:
        """The weight files that this machine can read and that are those that were opened, maybe on another one."""
        if self.store is None:
            paths = (self.folder / name for name in self.weight_files)
            now = _stamps(path for path in paths if os.access(path, os.R_OK))
        else:
            now = self.store.stamps()
        return frozenset(name for name in self.weight_files if now.get(name) == self.stamps[name])

    def settings_digest(self) -> str:
        """Hash of config and tokenizer, which decide what a forward pass computes beside the weights."""
        if self.gguf is not None:
            return hashlib.sha256(metadata_bytes(self.gguf.metadata)).hexdigest()
        digest = hashlib.sha256()
        for name in SETTINGS_FILES:
            path = self.folder / name
            digest.update(f"{name} {is_file(path)}".encode())
            if is_file(path):
                for piece in PlainFile(path).chunks(0, path.stat().st_size):
                    digest.update(piece)
        return digest.hexdigest()

    def side_files(self) -> list[Path]:
        """Tokenizer, generation config, licence and other small files to carry over; a GGUF file has none."""
        return [self.folder / name for name in self._side_files.names]

    def side_notes(self) -> tuple[str, ...]:
        """What of those does not come along, and why."""
        return self._side_files.notes

    @property
    def _side_files(self) -> SideFiles:
        return SideFiles(()) if self.gguf is not None else side_files(self.folder)


def open_checkpoint(
    model: str | Path, revision: str | None = None, quantized: bool = False, headers_only: bool = False
) -> Checkpoint:
    """Open a local folder, a GGUF file, a folder's address (`s3://…`), or a hub id such as `Qwen/Qwen1.5-MoE-A2.7B`.

    quantized: whether a GGUF file may be, because it is only to be run. headers_only: no weight will be read, so those
    of a hub model stay there. Every header is read and checked, no weight is. Raises CheckpointError or
    ArchitectureError.
    """
    if is_url(model):
        path = local_path(str(model))
        if path is None:
            return _open_store(str(model), revision)
        model = path
    with reading(Path(model)), without_collecting():
        if (path := find_gguf(expanded(model))) is not None:
            return _open_gguf(path, quantized)
        if headers_only and local_folder(model) is None:
            folder, store = small_files(str(model), revision)
            return _open_folder(folder, model, store.stamps() if store else None, store)
        return _open_folder(resolve_folder(str(model), revision), model)


def _open_gguf(path: Path, quantized: bool) -> Checkpoint:
    stamps = _stamps(path.parent.glob("*.gguf"))
    source = open_gguf(path, quantized)
    opened = _checkpoint(
        path.parent, source.file.name, source.config, source.architecture, source.shards, source.file.fingerprint
    )
    return replace(opened, gguf=source.file, gguf_names=source.names, stamps=stamps)


Restore = Callable[[PlainFile, TensorInfo], TensorInfo]
"""What a stored tensor of a native checkpoint stands for, its file at hand."""


def open_native(folder: Path, restored: Restore) -> Checkpoint:
    """A native checkpoint as if disk held the values that it stands for. Raises CheckpointError, ArchitectureError."""
    with without_collecting():
        return _open_folder(folder, folder, restored=restored)


def _open_store(url: str, revision: str | None) -> Checkpoint:
    """A checkpoint whose weights stay where they are; headers are read by ranges, small files copied."""
    if revision is not None:
        raise CheckpointError("--revision is of hub models. An address says all: hf://ORG/MODEL@REVISION.")
    if url.lower().endswith(".gguf"):
        raise CheckpointError(f"{url} is a GGUF file, which is read from a local disk only. Download it.")
    store = Store.of(url)
    stamps = store.stamps()
    if "config.json" not in stamps:
        raise CheckpointError(f"{url} has no config.json. Point to a Hugging Face model folder.")
    store = store.download(stamps)
    with without_collecting():
        return _open_folder(store.folder, url, stamps, store)


def _open_folder(
    folder: Path,
    model: str | Path,
    stamps: Mapping[str, Stamp] | None = None,
    store: Store | None = None,
    restored: Restore | None = None,
) -> Checkpoint:
    stamps = _stamps(folder.iterdir()) if stamps is None else stamps
    config = read_config(folder)
    native = (config.get("quantization_config") or {}).get("quant_method") == NATIVE_METHOD
    if restored is not None and not native:
        raise CheckpointError(f"{folder} is no native checkpoint. Point to the output of `alphaq quantize`.")
    modelopt = read_json(folder / MODELOPT_FILE) if is_file(folder / MODELOPT_FILE) else None
    told = announced(model, config, modelopt) if restored is None else None
    config = unquantized(config)  # what is read is no longer quantized
    architecture = architecture_of(config)
    weights = read_weights(folder, stamps, store)
    shards, fingerprint, notes = weights.shards, weights.fingerprint, weights.notes
    del weights  # of half a million tensors, headers and what is made of them need not be held together
    config.pop(NAMED_KEY, None)  # what is written has the usual names
    if restored is not None:
        at_hand = {shard: PlainFile(folder / shard) for shard in shards}
        shards = {s: {name: restored(at_hand[s], one) for name, one in held.items()} for s, held in shards.items()}
    else:
        require_no_codes(model, (one for held in shards.values() for one in held.values()), told)
    if told is not None:

        def read(shard: str, one: TensorInfo) -> torch.Tensor:
            file = store.file(shard, stamps[shard]) if store is not None else PlainFile(folder / shard)
            return file.read(one.begin, one.nbytes)

        shards = decoded_shards(shards, told, read)
    opened = _checkpoint(folder, folder.resolve().name, config, architecture, shards, fingerprint)
    return replace(opened, stamps=stamps, store=store, notes=notes)


def _stamps(paths: Iterable[Path]) -> dict[str, Stamp]:
    """By name, of those that are files."""
    return {path.name: Stamp.of(path.stat()) for path in paths if is_file(path)}


def _checkpoint(
    folder: Path,
    name: str,
    config: dict[str, Any],
    architecture: Architecture,
    shards: dict[str, dict[str, TensorInfo]],
    fingerprint: str,
) -> Checkpoint:
    """A checkpoint whose tensors have been matched with their roles."""
    architecture, shards = fitted(architecture, config, shards)
    shards = unfolded(architecture, config, shards)
    matrices, roles = match_tensors(
        architecture, config, (tensor for tensors in shards.values() for tensor in tensors.values())
    )
    for matrix in matrices:
        if matrix.dtype not in READABLE_WEIGHTS and matrix.role in QUANTIZABLE:
            coded = matrix.dtype.startswith("F8")
            remedy = (
                "Restore config.json, whose quantization_config says how to decode it"
                if coded
                else "Convert it to bf16"
            )
            raise CheckpointError(
                f"{matrix.name} is stored as {matrix.dtype}; readable: {', '.join(READABLE_WEIGHTS)}. {remedy}."
            )
    named = os.fsencode(name).decode(errors="replace")  # plans and reports are UTF-8, names of files may be any bytes
    return Checkpoint(folder, named, config, architecture, shards, tuple(matrices), roles, fingerprint)


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json as a dict. Raises CheckpointError."""
    path = folder / "config.json"
    if not is_file(path):
        raise CheckpointError(f"{folder} has no config.json. Point to a Hugging Face model folder.")
    check_fetched(folder, SIDE_FILES)
    config = read_json(path)
    if not isinstance(config.get("quantization_config"), (dict, type(None))):
        raise CheckpointError(f"{path}: quantization_config is not an object. Restore the file.")
    parts: list[Any] = [config]
    while parts:  # of a multi-modal model each has settings of its own
        part = parts.pop()
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key in sorted(_IMPLEMENTATIONS & part.keys()):
            if "/" in str(part[key]):
                raise CheckpointError(f"{path}: {key} asks for code from the hub, {shown(part[key])}. Remove the line.")
    return config


def summarize(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `alphaq inspect` shows: counts, parameters and bytes by role."""
    roles: dict[str, dict[str, int]] = {}
    for name, info in _all_tensors(checkpoint):
        role = roles.setdefault(
            checkpoint.roles[name].value, {"tensors": 0, "matrices": 0, "parameters": 0, "bytes": 0}
        )
        role["tensors"] += 1
        role["bytes"] += bytes_on_disk(info)
        role["parameters"] += math.prod(info.shape)
    for matrix in checkpoint.matrices:
        roles[matrix.role.value]["matrices"] += 1
    experts = checkpoint.with_role(Role.EXPERT)
    shapes: dict[str, list[int]] = {str(m.projection): list(m.shape) for m in experts}
    return {
        "model": checkpoint.name,
        "architecture": checkpoint.architecture.name,
        "layers": checkpoint.architecture.layers(checkpoint.config),
        "experts_per_layer": checkpoint.architecture.experts_per_layer(checkpoint.config),
        "expert_matrices": len(experts),
        "expert_shapes": shapes,
        "dtypes": sorted({stored_dtype(info) for _, info in _all_tensors(checkpoint)}),
        "parameters": sum(role["parameters"] for role in roles.values()),
        "bytes": checkpoint.nbytes,
        "shards": len(checkpoint.shards),
        "roles": dict(sorted(roles.items())),
    }


def _all_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    for tensors in checkpoint.shards.values():
        yield from tensors.items()


def _as_stored(info: TensorInfo, matrix: MatrixRef) -> bool:
    """Whether the rows of a matrix are rows on disk."""
    return matrix.transposed == (info.encoding is not None and info.encoding.turned)


def _stored_rows(info: TensorInfo, matrix: MatrixRef) -> tuple[int, int]:
    """First row and row after the last, on disk, that hold a matrix; all of its slice if disk has its columns."""
    if _as_stored(info, matrix):
        return matrix.row_start, matrix.row_start + (matrix.shape[0] - 1) * matrix.row_step + 1
    return 0, matrix.shape[1]
