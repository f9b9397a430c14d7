"""Open a checkpoint (a folder or a hub id) and read its matrices one at a time.

Only safetensors is read: a pickle runs code when it is loaded. Weights stored in 8 or 4 bits are decoded as they are
read; only `encoded.encodings` knows how, and `encoded.finding` which.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from alphaq.checkpoint.config import read_config
from alphaq.checkpoint.encoded.announced import MODELOPT_FILE, announcement_of, require_no_codes, unquantized
from alphaq.checkpoint.encoded.finding import decoded_shards
from alphaq.checkpoint.encoded.reading import TensorReader, rows_as_stored, stored_rows
from alphaq.checkpoint.families.architecture import Architecture, architecture_of
from alphaq.checkpoint.families.formulas import current
from alphaq.checkpoint.families.matching import match_tensors, require_readable, unfolded
from alphaq.checkpoint.families.prefixes import fitted
from alphaq.checkpoint.files import (
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
from alphaq.checkpoint.identity import SETTINGS_FILES, digest_of, digest_of_samples, settings_digest
from alphaq.checkpoint.remote import Store, is_url, local_path
from alphaq.checkpoint.side_files import SideFiles, side_files
from alphaq.checkpoint.tensors import TensorInfo, bytes_on_disk, rows_place
from alphaq.checkpoint.weights import INDEX_NAME, NAMED_KEY, SINGLE_NAME, Shards, read_weights
from alphaq.errors import CheckpointError
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.nouns.plan import SourceIdentity
from alphaq.simd.sums import in_threads
from alphaq.work.untrusted import JsonObject

NATIVE_METHOD = "alphaq"  # the quant_method of native checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: names, shapes and roles known, no weight loaded.

    `shards` has each file's tensors in file order; `matrices` holds the 2-D weights that have a role.
    """

    folder: Path
    name: str
    config: JsonObject
    architecture: Architecture
    shards: Shards
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
    dropped: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Experts that the files hold and this checkpoint does without, by layer (`pruned.without_experts`)."""
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
    def plain(self) -> bool:
        """Whether it is a GGUF file that is known by the names of its tensors alone, which are GGUF's own."""
        return self.gguf is not None and self.architecture.gguf is None

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
            raise CheckpointError(f"{self.name} is not a GGUF file, so {name} has no place in one. Open a GGUF file.")
        return self.gguf.tensors[self.gguf_names[name]]

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, decoded, in the dtype and shape that its `info` names."""
        return TensorReader(self.file).whole(self.shard_of[name], self.info(name))

    def read(self, matrix: MatrixRef, memory: torch.Tensor | None = None) -> torch.Tensor:
        """One matrix, contiguous [rows, columns], in its own dtype; of a fused tensor only its slice is read.

        memory: uint8, used again for what lies on disk as it is: fresh memory takes longer than reading.
        """
        shard, info = self.shard_of[matrix.tensor], self.info(matrix.tensor)
        values = TensorReader(self.file, memory).rows(shard, info, matrix.index or 0, *stored_rows(info, matrix))
        if rows_as_stored(info, matrix):
            return values[:: matrix.row_step].contiguous()
        return values.T[matrix.row_start :: matrix.row_step][: matrix.shape[0]].contiguous()

    def stored(self, matrix: MatrixRef) -> torch.Tensor | None:
        """The bytes of a matrix that a format of this package's own holds as a tensor of its own; None elsewhere."""
        shard, info = self.shard_of[matrix.tensor], self.info(matrix.tensor)
        if info.encoding is None or info.encoding.decoder is None or info.shape != matrix.shape or matrix.transposed:
            return None
        return self.file(shard).read(info.begin, info.nbytes)

    def read_rows(self, matrix: MatrixRef, part: slice, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Some rows of a matrix; all of it is read if disk has its columns. memory: as of `read`."""
        shard, info = self.shard_of[matrix.tensor], self.info(matrix.tensor)
        if not rows_as_stored(info, matrix) or matrix.row_step > 1:
            return self.read(matrix, memory)[part]
        first, last = matrix.row_start + part.start, matrix.row_start + part.stop
        return TensorReader(self.file, memory).rows(shard, info, matrix.index or 0, first, last)

    def place(self, matrix: MatrixRef) -> tuple[int, int]:
        """First byte in its shard and number of bytes to read for a matrix, scales not counted."""
        info = self.info(matrix.tensor)
        return rows_place(info, matrix.index or 0, *stored_rows(info, matrix))

    def stored_bytes(self, matrix: MatrixRef) -> int:
        """Bytes of a matrix's own weights on disk, its scales included."""
        info = self.info(matrix.tensor)
        return bytes_on_disk(info) * matrix.parameters // math.prod(info.shape)

    @cached_property
    def settings(self) -> JsonObject:
        """The language model's settings as transformers 5 spells them, with the class's defaults."""
        return current({**self.architecture.defaults, **self.text_config})

    @property
    def text_config(self) -> JsonObject:
        """The language model's part of the config, which multi-modal models nest."""
        return dict(self.architecture.text_config(self.config))

    def forget(self, shard: str) -> None:
        """Tell the system that a shard is done with; only where the checkpoint does not fit into memory anyway."""
        if self.nbytes > memory_bytes() // 2:
            self.file(shard).forget()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": {}}  # each process opens its own

    def contents(self, hashed: bool = False) -> str:
        """What tells these weights from others of the same shapes: each shard's hash, or when it was last written.

        A time alone would not do, since some tools give all files the same; so a few of the bytes are hashed with it.
        """

        def mark(shard: str) -> str:
            nbytes, version = self.stamps[shard]
            if hashed:
                return digest_of(self.file(shard), nbytes)
            if self.store is not None:
                return str(version)  # of the contents, as the store vouches
            return f"{version} {digest_of_samples(self.file(shard), nbytes)}"

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
        return settings_digest(self.folder)

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
        if revision is not None and expanded(model).exists():
            raise CheckpointError(f"--revision applies only to hub models, and {model} is a path. Drop it.")
        if (path := find_gguf(expanded(model))) is not None:
            return _open_gguf(path, quantized)
        if headers_only and local_folder(model) is None:
            folder, store = small_files(str(model), revision)
            return _open_folder(folder, model, store.stamps() if store else None, store)
        return _open_folder(resolve_folder(str(model), revision), model)


def _open_gguf(path: Path, quantized: bool) -> Checkpoint:
    stamps = _stamps(path.parent.glob("*.gguf"))
    source = open_gguf(path, quantized)
    held = path.parent, source.file.name, source.config, source.architecture, source.shards
    if (matched := source.matched) is None:
        opened = _checkpoint(*held, source.file.fingerprint)
    else:
        opened = Checkpoint(*held, matched.matrices, matched.roles, source.file.fingerprint, notes=matched.notes)
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
        raise CheckpointError(
            "--revision applies only to hub models. Put it into the address: hf://ORG/MODEL@REVISION."
        )
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
    if restored is not None:
        _require_native(folder, config)
        announcement = None
    else:
        modelopt = read_json(folder / MODELOPT_FILE) if is_file(folder / MODELOPT_FILE) else None
        announcement = announcement_of(model, config, modelopt)
    config = unquantized(config)  # what is read is no longer quantized
    architecture = architecture_of(config)
    weights = read_weights(folder, stamps, store)
    shards, fingerprint, notes = weights.shards, weights.fingerprint, weights.notes
    del weights  # of half a million tensors, headers and what is made of them need not be held together
    config.pop(NAMED_KEY, None)  # what is written has the usual names

    def read(shard: str, one: TensorInfo) -> torch.Tensor:
        file = store.file(shard, stamps[shard]) if store is not None else PlainFile(folder / shard)
        return file.read(one.begin, one.nbytes)

    if restored is not None:
        files = {shard: PlainFile(folder / shard) for shard in shards}
        shards = {s: {name: restored(files[s], one) for name, one in infos.items()} for s, infos in shards.items()}
    else:
        require_no_codes(model, (one for infos in shards.values() for one in infos.values()), announcement)
    if announcement is not None:
        shards = decoded_shards(shards, announcement, read)
    opened = _checkpoint(folder, folder.resolve().name, config, architecture, shards, fingerprint)
    return replace(opened, stamps=stamps, store=store, notes=notes)


def _require_native(folder: Path, config: JsonObject) -> None:
    if (config.get("quantization_config") or {}).get("quant_method") != NATIVE_METHOD:
        raise CheckpointError(f"{folder} is not a native checkpoint. Point to the output of `alphaq quantize`.")


def _stamps(paths: Iterable[Path]) -> dict[str, Stamp]:
    """By name, of those that are files."""
    return {path.name: Stamp.of(path.stat()) for path in paths if is_file(path)}


def _checkpoint(
    folder: Path, name: str, config: JsonObject, architecture: Architecture, shards: Shards, fingerprint: str
) -> Checkpoint:
    """A checkpoint whose tensors have been matched with their roles."""
    architecture, shards = fitted(architecture, config, shards)
    shards = unfolded(architecture, config, shards)
    matrices, roles = match_tensors(
        architecture, config, (tensor for tensors in shards.values() for tensor in tensors.values())
    )
    require_readable(matrices)
    named = os.fsencode(name).decode(errors="replace")  # plans and reports are UTF-8, names of files may be any bytes
    return Checkpoint(folder, named, config, architecture, shards, tuple(matrices), roles, fingerprint)
