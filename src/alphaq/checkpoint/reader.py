"""Open a checkpoint (a folder or a hub id) and read its matrices one at a time.

Only safetensors is read: a pickle runs code when it is loaded. Weights stored in FP8 or MXFP4 are decoded as they
are read; only `encodings` knows how.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from alphaq.checkpoint.architecture import Architecture, architecture_of
from alphaq.checkpoint.encodings import (
    READABLE_METHODS,
    Encoding,
    bytes_on_disk,
    decode,
    decoded_shards,
    rows_place,
    stored_dtype,
    stored_grid,
)
from alphaq.checkpoint.files import (
    CHUNK_BYTES,
    PlainFile,
    SourceFile,
    Stamp,
    changed,
    check_link,
    is_file,
    memory_bytes,
    reading,
)
from alphaq.checkpoint.formulas import current
from alphaq.checkpoint.gguf_format import GgufFile, GgufTensor, metadata_bytes
from alphaq.checkpoint.gguf_source import find_gguf, open_gguf
from alphaq.checkpoint.matching import match_tensors, unfolded
from alphaq.checkpoint.remote import Store, is_url, local_path
from alphaq.checkpoint.safetensors_format import TORCH_DTYPES, TensorInfo, parse_header, read_header
from alphaq.errors import CheckpointError
from alphaq.numerics import in_threads
from alphaq.records import CERTIFICATE_NAME, MatrixRef, Role, SourceIdentity
from alphaq.untrusted import parse_json, read_bounded, shown

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SIDE_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "README.md",
)
SAMPLES, SAMPLE_BYTES = 16, 4096  # of a weight file, to recognise it by
SETTINGS_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
NATIVE_METHOD = "alphaq"  # the quant_method of native checkpoints
READABLE_WEIGHTS = ("F32", "F16", "BF16")
_IMPLEMENTATIONS = {"attn_implementation", "_attn_implementation", "experts_implementation"}
"""Keys by which transformers lets a config choose kernels, also those of any repository."""

QUANTIZABLE = (Role.EXPERT, Role.SHARED_EXPERT, Role.ATTENTION, Role.DENSE_MLP)


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
        encodings = (info.encoding for tensors in self.shards.values() for info in tensors.values())
        return list(dict.fromkeys([*self.shards, *(e.scales_shard for e in encodings if e and e.scales_shard)]))

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
        """The weight files that hold a tensor: its own, and that of its scales."""
        shard, encoding = self.shard_of[tensor], self.info(tensor).encoding
        return {shard, (encoding.scales_shard if encoding is not None else None) or shard}

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
        scales = None
        if encoding.scales is not None:
            needed = encoding.scale_rows(start, stop)
            scales = self._read(encoding.scales_shard or shard, encoding.scales, index, *needed)
        return decode(encoding, data, scales, start % encoding.block[0])

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
        encoding = info.encoding
        if encoding is not None and encoding.scales is not None:
            needed = encoding.scale_rows(*_stored_rows(info, matrix))
            scales = rows_place(encoding.scales, matrix.index or 0, *needed)
            self.file(encoding.scales_shard or shard).expect(*scales)

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
        names = [*self.weight_files, *([] if self.gguf is not None else (*SETTINGS_FILES, INDEX_NAME))]
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
        if self.gguf is not None:
            return []
        found = {path for pattern in SIDE_FILES for path in self.folder.glob(pattern)}
        skip = {"config.json", INDEX_NAME, "plan.json", "alphaq_manifest.json", CERTIFICATE_NAME}
        chosen = sorted(path for path in found if is_file(path) and path.name not in skip)
        for path in chosen:
            check_link(path)
        return chosen


def open_checkpoint(model: str | Path, revision: str | None = None, quantized: bool = False) -> Checkpoint:
    """Open a local folder, a GGUF file, a folder's address (`s3://…`), or a hub id such as `Qwen/Qwen1.5-MoE-A2.7B`.

    quantized: whether a GGUF file may be, because it is only to be run. Every header is read and checked, no weight
    is. Raises CheckpointError or ArchitectureError.
    """
    if is_url(model):
        path = local_path(str(model))
        if path is None:
            return _open_store(str(model), revision)
        model = path
    with reading(Path(model)):
        if (path := find_gguf(_expanded(model))) is not None:
            return _open_gguf(path, quantized)
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
    store = store.download(stamps, SIDE_FILES)
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
    quantization = config.pop("quantization_config", None)  # what is read is no longer quantized
    native = restored is not None and quantization is not None and quantization.get("quant_method") == NATIVE_METHOD
    if restored is not None and not native:
        raise CheckpointError(f"{folder} is no native checkpoint. Point to the output of `alphaq quantize`.")
    if quantization is not None and not native and quantization.get("quant_method") not in READABLE_METHODS:
        method = shown(quantization.get("quant_method", "unknown"))
        raise CheckpointError(
            f"{model} is already quantized (quant_method {method}). Start from the original 16-bit checkpoint; of "
            f"quantized ones only {' and '.join(READABLE_METHODS)} can be read."
        )
    architecture = architecture_of(config)
    shards, fingerprint = read_shards(folder, stamps, store)
    if restored is not None:
        at_hand = {shard: PlainFile(folder / shard) for shard in shards}
        shards = {s: {name: restored(at_hand[s], one) for name, one in held.items()} for s, held in shards.items()}
    elif quantization is not None:
        shards = decoded_shards(shards, quantization)
    opened = _checkpoint(folder, folder.resolve().name, config, architecture, shards, fingerprint)
    return replace(opened, stamps=stamps, store=store)


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


def read_shards(
    folder: Path, stamps: Mapping[str, Stamp] | None = None, store: Store | None = None
) -> tuple[dict[str, dict[str, TensorInfo]], str]:
    """Checked headers of every weight file, and a fingerprint over names, sizes and headers.

    store: where the weights are, if not in the folder; then `stamps` says which files it has.
    """
    shards: dict[str, dict[str, TensorInfo]] = {}
    digest = hashlib.sha256()
    owner: dict[str, str] = {}
    promised = shard_index(folder, None if store is None else stamps)
    names = list(dict.fromkeys(promised.values())) if promised else [SINGLE_NAME]
    for shard, (nbytes, tensors, raw) in zip(names, _headers(folder, names, stamps or {}, store), strict=True):
        for name in tensors:
            if name in owner:
                raise CheckpointError(
                    f"Tensor {name!r} is in both {owner[name]} and {shard}. Keep one and correct {INDEX_NAME}."
                )
            owner[name] = shard
        shards[shard] = tensors
        digest.update(f"{shard}\0{nbytes}\0".encode() + raw)
    for name, shard in promised.items():
        if owner.get(name) != shard:
            raise CheckpointError(
                f"{INDEX_NAME} places {shown(name)} in {shard}, but it is not there. Download the shard again."
            )
    return shards, digest.hexdigest()


def _headers(
    folder: Path, names: list[str], stamps: Mapping[str, Stamp], store: Store | None
) -> Iterator[tuple[int, dict[str, TensorInfo], bytes]]:
    """Size, checked header and its bytes of each weight file."""
    if store is not None:
        if missing := [name for name in names if name not in stamps]:
            raise CheckpointError(f"{store.url} lacks {missing[0]}, which its index names. Complete the upload.")
        yield from store.map(names, lambda name: _remote_header(store, name, stamps[name]))
        return
    for name in names:
        path = folder / name
        if not is_file(path):
            raise CheckpointError(f"{folder} lacks {name}, which its index names. Complete the download.")
        check_link(path)
        yield path.stat().st_size, *read_header(path)


def _remote_header(store: Store, name: str, stamp: Stamp) -> tuple[int, dict[str, TensorInfo], bytes]:
    file = store.file(name, stamp)
    header = parse_header(name, stamp.nbytes, lambda begin, nbytes: file.read(begin, nbytes).numpy().tobytes())
    return stamp.nbytes, *header


def shard_index(folder: Path, present: Container[str] | None = None) -> dict[str, str]:
    """Tensor name → shard file, empty for a single-file checkpoint. Shards must lie in the folder.

    present: names of the files that are there, where the weights are not in the folder itself.
    """
    single = is_file(folder / SINGLE_NAME) if present is None else SINGLE_NAME in present
    if single and not is_file(folder / INDEX_NAME):
        return {}
    if not is_file(folder / INDEX_NAME):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when loaded. "
                "Convert them to safetensors first (`save_pretrained` in transformers does)."
            )
        raise CheckpointError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}. Complete the download.")
    index = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map. Download the index again.")
    for name, shard in index.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.\-]{1,240}\.safetensors", shard):
            raise CheckpointError(
                f"{INDEX_NAME} places {shown(name)} in {shown(shard)}, which is not a safetensors file of this folder. "
                "Do not use this checkpoint; its index may be hostile."
            )
    return index


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises CheckpointError naming the file."""
    check_link(path)
    try:
        with reading(path):
            data = parse_json(read_bounded(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download it again.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object. Download it again.")
    return data


def resolve_folder(model: str, revision: str | None = None) -> Path:
    """A local folder, or the hub cache's with the files of a hub id. Raises CheckpointError."""
    folder = _expanded(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model} is a file. Point to the model's folder instead.")
    if not re.fullmatch(r"[\w\-][\w.\-]*/[\w.\-]+", model) or ".." in model:
        raise CheckpointError(f"No folder {model}. Check the path, or give a hub id such as Qwen/Qwen3-30B-A3B.")
    return _download(model, revision)


def _expanded(model: str | Path) -> Path:
    """The path that a user means. Raises CheckpointError if there can be none."""
    try:
        path = Path(model).expanduser()
        path.is_dir()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{model} is no path ({error}). Check it.") from None
    return path


def _download(model: str, revision: str | None) -> Path:
    """Fetch the config, tokenizer and safetensors of a hub model into the shared cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", *SIDE_FILES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{model} is no local folder and could not be fetched from the hub ({reason}). "
            "Check the name, the network and, for gated models, `hf auth login`."
        ) from None


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
