"""The llama.cpp profile: one ggml type for a projection of all a layer's experts, stored as one 3-D tensor.

A type stores whole blocks of a row, and a GGUF file pads each tensor to 32 bytes. One file, or its parts, holds
everything: metadata, tokenizer, tensors. Source: the `gguf` package, which the tests compare and `verify` reads with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from alphaq.checkpoint.gguf.format import ALIGNMENT_KEY, GgufTensor, read_gguf
from alphaq.checkpoint.gguf.parts import PART_BYTES, parts_layout
from alphaq.checkpoint.gguf.source import READABLE_TYPES
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TORCH_DTYPES
from alphaq.checkpoint.writer import Place
from alphaq.engines.effective import settings_of
from alphaq.engines.export import AS_IT_IS, RAW, Entry, Export, Form, Hosting, Layout, Rows, Run, Stored
from alphaq.engines.gguf.apart import Apart
from alphaq.engines.gguf.importance import importance_of
from alphaq.engines.gguf.keeping import flags, kept_beside, placed, work_bytes
from alphaq.engines.gguf.library import Llama
from alphaq.engines.gguf.model import TensorRecipe, gguf_metadata, gguf_tensors, transformed
from alphaq.engines.gguf.observing import observed
from alphaq.engines.gguf.package import package
from alphaq.engines.gguf.restoring import write_restored
from alphaq.engines.gguf.tokenizer import tokens_left_out
from alphaq.engines.profile import Profile
from alphaq.errors import CheckpointError, ChoiceError, PlanError
from alphaq.formats.gaussian import GAUSSIAN_ERROR
from alphaq.formats.ggml import FORMAT as GGML
from alphaq.formats.ggml import GGML_BLOCKS
from alphaq.formats.ggml_library import restore_rows
from alphaq.formats.table import format_of, parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role, Shape
from alphaq.nouns.plan import Plan
from alphaq.nouns.serving import Kept, Serving

STEM = "model"
FILE_NAME = f"{STEM}.gguf"
# Of the file, not of the model: without the first llama.cpp says what most tensors are, and places are our own.
OF_ONE_FILE = ("general.file_type", ALIGNMENT_KEY)
ROLE_BITS = {
    Role.ATTENTION: 4,
    Role.MIXER: 4,
    Role.SHARED_EXPERT: 4,
    Role.DENSE_MLP: 4,
    Role.EMBEDDING: 4,
    Role.HEAD: 6,
}

ALIGNMENT_BYTES = 32
TRAINED_IN = ("MXFP4", "NVFP4", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0")
"""Types for models that were trained in them; of other weights they lose more than their size would do elsewhere."""

TYPE_OF_BITS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0", 16: "16"}


def with_bits(bits: int) -> Choice:
    """The K type of that width, Q8_0, or 16. Raises ChoiceError for any other."""
    if bits not in TYPE_OF_BITS:
        available = ", ".join(f"{width} ({name})" for width, name in TYPE_OF_BITS.items() if width != 16)
        raise ChoiceError(
            f"{bits} bits name no usual type of llama.cpp. Available: {available}, 16 (kept). Or name a ggml type."
        )
    return parse_choice(TYPE_OF_BITS[bits])


def storage_bytes(choice: Choice, shape: Shape) -> int:
    """Bytes of a matrix's blocks, padded to GGUF's alignment. Rows must be whole blocks (see `obstacle`).

    Exact for a tensor of its own. A 3-D tensor is padded once, not once per expert, so its experts' sum is an
    upper bound (below 32 bytes of excess each); it is exact if a matrix has a multiple of 16 blocks, as it has
    whenever its rows are a multiple of 16, because every block has an even number of bytes (MXFP4's, of 17: of 32).
    """
    return _padded(format_of(choice).storage_bytes(choice, shape))


def kept_bytes(checkpoint: Checkpoint, matrix: MatrixRef) -> int:
    """Bytes of a matrix that is kept: what it is in a GGUF file (Q8_0, F32), 16 bits from elsewhere."""
    return (
        storage_bytes(Choice(16), matrix.shape) if checkpoint.gguf is None else _padded(checkpoint.stored_bytes(matrix))
    )


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def obstacle(choice: Choice, matrix: MatrixRef) -> str | None:
    """llama.cpp stores no partial blocks."""
    columns = matrix.shape[1]
    if not choice.kept and matrix.name.endswith("kv_b_proj.weight"):
        return "llama.cpp takes latent attention's keys and values apart and transposes the keys"
    if not choice.kept and columns % choice.group_size:
        return f"rows of {columns} weights are not whole {choice} blocks of {choice.group_size}"
    return None


def file_layout(checkpoint: Checkpoint, choices: Mapping[str, Choice], split_bytes: int | None = None) -> Layout:
    """The one file, or parts of so many bytes at most.

    Raises PlanError if matrices of one tensor have several choices, or one that is not a ggml type.
    """
    recipes = gguf_tensors(checkpoint)
    types = {recipe.name: _type(recipe, choices, checkpoint) for recipe in recipes}
    shapes = {recipe.name: (types[recipe.name], recipe.shape) for recipe in recipes}
    parts = parts_layout(_metadata(checkpoint), shapes, STEM, split_bytes)
    entries: dict[str, Entry] = {}
    for recipe in recipes:
        place = _stored(parts.tensors[recipe.name])
        sources: Sequence[MatrixRef | str] = recipe.matrices or (recipe.vector,)
        for number, source in enumerate(sources):
            index = number if recipe.is_stack else None
            own = source if isinstance(source, str) else source.name
            entry = _entry(recipe, types[recipe.name], source, checkpoint, place.share(index), index)
            entries[own if own not in entries else recipe.name] = entry
    order = {shard: number for number, shard in enumerate(checkpoint.shards)}

    def where(entry: Entry) -> tuple[int, int]:
        stored = entry.source if isinstance(entry.source, str) else entry.source.tensor
        begin = checkpoint.info(stored).begin if isinstance(entry.source, str) else checkpoint.place(entry.source)[0]
        return order[checkpoint.shard_of[stored]], begin

    named = [replace(entry, name=name) for name, entry in entries.items()]
    return Layout(parts.files, tuple(sorted(named, key=where)))


def _type(recipe: TensorRecipe, choices: Mapping[str, Choice], checkpoint: Checkpoint) -> str:
    """What a tensor is stored as; one that is kept stays what it is in a GGUF file."""
    found = {choices[matrix.name] for matrix in recipe.matrices if matrix.name in choices}
    if recipe.type == "F32" and found - {Choice(16)}:
        raise PlanError(f"llama.cpp keeps {recipe.name} in F32. Leave {recipe.matrices[0].name} out of the plan.")
    if recipe.type == "F32" or not found or found == {Choice(16)}:
        held = recipe.matrices[0].tensor if recipe.matrices else recipe.vector
        return recipe.type if checkpoint.gguf is None else checkpoint.gguf_tensor(held).type
    if len(found) > 1 or any(matrix.name not in choices for matrix in recipe.matrices):
        shown = ", ".join(sorted(map(str, found)))
        raise PlanError(
            f"{recipe.name} is one tensor in llama.cpp, but the plan gives its matrices {shown}. Choose one."
        )
    choice, first = found.pop(), recipe.matrices[0]
    if str(choice) not in GGML_BLOCKS:
        raise PlanError(f"{first.name}: {choice} is not a ggml type. Plan with --engine llama.cpp.")
    if why := obstacle(choice, first):
        raise PlanError(f"llama.cpp cannot store {first.name} as {choice}: {why}. Choose another type.")
    return str(choice)


def _entry(
    recipe: TensorRecipe, type: str, source: MatrixRef | str, checkpoint: Checkpoint, place: Place, index: int | None
) -> Entry:
    """One matrix or vector of a tensor: quantized, copied, or converted."""
    parts = ((recipe.name, index),)
    own = source if isinstance(source, str) else source.tensor
    if checkpoint.gguf is not None and type == checkpoint.gguf_tensor(own).type:
        return Entry(own, own, None, (place,), parts, RAW)
    if isinstance(source, MatrixRef) and type != "F32":
        info = checkpoint.info(source.tensor)
        whole = (info.dtype, info.encoding, recipe.transform, source.transposed) == (type, None, "", False)
        if type in GGML_BLOCKS or not (whole and source.index is None and info.shape == source.shape):
            choice = parse_choice(type) if type in GGML_BLOCKS else Choice(16)
            cast = "" if not choice.kept or source.dtype == type else type  # experts may differ in their dtype
            return Entry(source.name, source, choice, (place,), parts, Form(recipe.transform, cast))
    info = checkpoint.info(own)
    same = info.encoding is None and info.dtype == type and not recipe.transform
    return Entry(own, own, None, (place,), parts, AS_IT_IS if same else Form(recipe.transform, type))


def convert(values: torch.Tensor, form: Form, checkpoint: Checkpoint) -> torch.Tensor:
    """Values laid out as llama.cpp wants them, and cast."""
    values = transformed(form.transform, values, settings_of(checkpoint)) if form.transform else values
    return values.to(TORCH_DTYPES[form.dtype]) if form.dtype else values


_known_metadata: dict[tuple[str, ...], dict[str, GgufValue]] = {}


def _metadata(checkpoint: Checkpoint) -> dict[str, GgufValue]:
    """`gguf_metadata`, made once: a vocabulary takes a second, and a plan asks for the file's size several times."""
    key = (str(checkpoint.folder), checkpoint.fingerprint, checkpoint.settings_digest(), str(checkpoint.pre_tokenizer))
    if key not in _known_metadata:
        _known_metadata.clear()
        given = checkpoint.gguf
        found = gguf_metadata(checkpoint, checkpoint.pre_tokenizer) if given is None else given.metadata
        _known_metadata[key] = {name: value for name, value in found.items() if name not in OF_ONE_FILE}
    return _known_metadata[key]


def reader(parts: Sequence[torch.Tensor], choice: Choice, shape: Shape, name: str) -> Rows:
    """Rows by the `gguf` package's own code; by llama.cpp's of types that the package lacks."""
    rows, columns = shape
    _, block, nbytes = GGML_BLOCKS[str(choice)]
    if parts[0].numel() != rows * (columns // block) * nbytes:
        raise CheckpointError(f"{name}: {choice} of shape {list(shape)} does not take {parts[0].numel()} bytes.")
    codes = parts[0].view(rows, -1).numpy()
    return lambda part: torch.from_numpy(np.ascontiguousarray(_restored(codes[part], str(choice), columns)))


def _restored(codes: np.ndarray, type: str, columns: int) -> np.ndarray:
    """Values of rows, float32 [rows, columns]."""
    gguf = package()
    try:
        values: np.ndarray = gguf.quants.dequantize(codes, gguf.GGMLQuantizationType[type])
    except (KeyError, NotImplementedError):
        values = restore_rows(codes, type, columns)
    return values


def stored(folder: Path) -> dict[str, Stored]:
    """Tensors of the file in an output folder, or of its parts."""
    return {name: _stored(tensor) for name, tensor in read_gguf(_file(folder)).tensors.items()}


def _file(folder: Path) -> Path:
    """What llama.cpp is given: the file, or the first of its parts."""
    whole = folder / FILE_NAME
    return whole if whole.is_file() else next(folder.glob(f"{STEM}-00001-of-*.gguf"), whole)


def _stored(tensor: GgufTensor) -> Stored:
    return Stored(tensor.type, tensor.shape, Place(tensor.file, tensor.begin, tensor.nbytes))


def fault(name: str, choice: Choice, stored: Sequence[Stored], parts: Sequence[torch.Tensor]) -> str | None:
    """Why a tensor is not of the plan's type, or None."""
    found = stored[0].dtype
    kept = choice.kept and found in READABLE_TYPES
    return None if kept or found == str(choice) else f"{name} is stored as {found}, the plan says {choice}"


def write_rest(folder: Path, checkpoint: Checkpoint, plan: Plan, written: Layout) -> None:
    """Nothing: a GGUF file holds it all."""


def side_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What lies beside the weights and has no place in the file: processors, and code."""
    left = [path.name for path in checkpoint.side_files() if "processor" in path.name and path.suffix == ".json"]
    if not left:
        return ()
    return (f"not in the GGUF file: {', '.join(left)}. For images and sounds llama.cpp needs files of its own",)


def notes(checkpoint: Checkpoint) -> list[str]:
    """Tokens that no row of the embedding stands for, as some tools add them without resizing the model."""
    embedding = next((recipe for recipe in gguf_tensors(checkpoint) if recipe.name == "token_embd.weight"), None)
    if checkpoint.gguf is not None or embedding is None:
        return []
    rows, left = embedding.shape[0], tokens_left_out(checkpoint.folder, embedding.shape[0])
    if not left:
        return []
    named = f"{left[0]!r}{f' and {len(left) - 1} more' if len(left) > 1 else ''}"
    return [f"the embedding has {rows} rows, none for the tokenizer's {named}: left out, as the model cannot read it"]


def type_file(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> str:
    """What `llama-quantize --tensor-type-file` reads: a line `pattern=type` for every matrix that is not in F32."""
    types = {recipe.name: _type(recipe, choices, checkpoint) for recipe in gguf_tensors(checkpoint)}
    lines = [f"^{re.escape(name)}$={type.lower()}" for name, type in types.items() if type != "F32"]
    return "\n".join(lines) + "\n"


def logits(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """What the real llama.cpp puts out, float32 [tokens, words]."""
    path = _file(folder)
    with Apart(path) as apart:
        apart.hold(Llama, path, len(ids))
        return torch.from_numpy(apart.ask(Llama.logits, list(ids)))


def logits_restored(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """The same of its weights in 16 bits."""
    with TemporaryDirectory(prefix=".alphaq-restored-", dir=folder.absolute().parent) as scratch:
        write_restored(_file(folder), Path(scratch) / FILE_NAME)
        return logits(Path(scratch), ids)


def kept(checkpoint: Checkpoint, serving: Serving) -> Kept:
    """What llama.cpp keeps in memory beside the weights."""
    counts = {name.rpartition(".")[2]: value.value for name, value in _metadata(checkpoint).items() if "expert" in name}
    used, experts = (counts.get(name) for name in ("expert_used_count", "expert_count"))
    work = work_bytes(checkpoint, used if isinstance(used, int) else 1, experts if isinstance(experts, int) else 0)
    return kept_beside(file_layout(checkpoint, {}), work, serving)


def _usual(offered: Iterable[str]) -> tuple[Choice, ...]:
    """The types that are offered without being named: for any weights, and no other of them beats it.

    A type is beaten by one at least as small, as exact and as fine-grained, and better in one of them.
    """
    types = {name: GGML_BLOCKS[name] for name in offered if name not in TRAINED_IN}
    merits = {name: (size / block, GAUSSIAN_ERROR[name], block) for name, (_, block, size) in types.items()}

    def beaten(name: str) -> bool:
        others = (merit for merit in merits.values() if merit != merits[name])
        return any(all(mine >= theirs for mine, theirs in zip(merits[name], merit, strict=True)) for merit in others)

    return tuple(parse_choice(name) for name in types if not beaten(name))


PROFILE = Profile(
    name="llama.cpp",
    summary="GGUF: any ggml type (1.125 to 8.5 bits), one per layer and projection",
    unit="layer × projection",
    choices=(*map(parse_choice, GGML_BLOCKS), Choice(16)),
    # Types with blocks of 32 stay in: many experts have rows that are no multiple of 256 (1408 in Qwen1.5-MoE).
    defaults=_usual(GGML_BLOCKS),
    fast=_usual(name for name in GGML_BLOCKS if not GGML.slow(parse_choice(name))),
    with_bits=with_bits,
    storage_bytes=storage_bytes,
    file_bytes=lambda checkpoint, matrix, choice: storage_bytes(choice, matrix.shape),
    role_bits=ROLE_BITS,
    kept_bytes=kept_bytes,
    obstacle=obstacle,
    part_bytes=PART_BYTES,
    quantizer="ggml",
    library="gguf",
    importance=importance_of,
    export=Export(
        layout=file_layout,
        split=file_layout,
        encode=lambda matrix: (matrix.codes,),
        reader=reader,
        stored=stored,
        usage="Serve it: llama-server -m {out}/{first}",
        write_rest=write_rest,
        side_notes=side_notes,
        convert=convert,
        fault=fault,
        from_gguf=True,
        notes=notes,
        run=Run("llama.cpp", logits, tolerance=0.15, restored=logits_restored),
        type_file=type_file,
        takes_roundings=False,
        observed=observed,
        hosting=Hosting(kept, flags, placed),
    ),
)
