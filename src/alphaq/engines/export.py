"""How a plan becomes files: which tensors each matrix fills, and which bytes of which file those are.

Everything is placed before any data exists, so that sizes are exact and a matrix can be written as soon as it is
quantized, in any order. An engine says what a matrix becomes (its parts); the safetensors layout is shared.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import (
    TORCH_DTYPES,
    TensorInfo,
    TensorSpec,
    entry_bytes,
    layout,
    stored_bytes,
)
from alphaq.checkpoint.weights import INDEX_NAME, read_shards
from alphaq.checkpoint.writer import Place, checksum, copy_file
from alphaq.engines.dense import dense_families, require_assumptions
from alphaq.engines.effective import TIED, head_of, says_tied
from alphaq.errors import PlanError
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role, Shape
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.simd.sums import in_threads, row_parts, squared_distance


@dataclass(frozen=True)
class Part:
    """A tensor that one matrix fills; with an index, entry `index` of a stack that the matrices of a layer fill.

    spec: dtype and shape of the matrix's own share.
    """

    tensor: str
    spec: TensorSpec
    index: int | None = None


RAW = "raw"


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing to write: a matrix in its choice, or a stored tensor that is kept (no choice).

    form: how the engine changes the values first, "" for not at all, RAW for the stored bytes whatever they mean.
    parts: output tensor (and index in its stack) at each place.
    """

    name: str
    source: MatrixRef | str
    choice: Choice | None
    places: tuple[Place, ...]
    parts: tuple[tuple[str, int | None], ...]
    form: str = ""


@dataclass(frozen=True)
class Layout:
    """Every output file's header and size, and what fills it, in the order of the source files."""

    files: dict[str, tuple[bytes, int]]
    entries: tuple[Entry, ...]

    @property
    def size_bytes(self) -> int:
        """Exact size of all weight files together."""
        return sum(size for _, size in self.files.values())


@dataclass(frozen=True)
class Stored:
    """A tensor found in an output file; dtype is the file format's own name."""

    dtype: str
    shape: tuple[int, ...]
    place: Place

    def share(self, index: int | None) -> Place:
        """The bytes of one entry of a stack, or of the whole."""
        if index is None:
            return self.place
        nbytes = self.place.nbytes // self.shape[0]
        return Place(self.place.file, self.place.begin + index * nbytes, nbytes)

    def typed(self, data: torch.Tensor) -> torch.Tensor:
        """Bytes of the tensor as values of its dtype, flat; they stay bytes where torch has no such dtype."""
        return data.view(TORCH_DTYPES.get(self.dtype, torch.uint8))


Rows = Callable[[slice], torch.Tensor]


@dataclass(frozen=True)
class Run:
    """How an output folder is run in its engine.

    called: the engine, in a sentence. logits: (folder, token ids) → logits after each of them, float32 [tokens,
    words], as one sequence; raises MissingEngineError where the engine is not installed. tolerance: how far they may
    be from those of the restored weights, in standard deviations of a token's logits, at the median of the tokens;
    what the engine's own arithmetic takes.
    """

    called: str
    logits: Callable[[Path, Sequence[int]], torch.Tensor]
    tolerance: float


def _as_it_is(values: torch.Tensor, form: str, checkpoint: Checkpoint) -> torch.Tensor:
    return values


@dataclass(frozen=True)
class Export:
    """What an engine's files are made of.

    layout: (checkpoint, choices) → every file. encode: a quantized matrix → one tensor for each of its parts.
    reader: (parts, choice, shape, name) → a function of a row slice that gives the values the engine will compute
    with, by the engine's own library where it has one. stored: a folder's tensors by name. usage: a command that runs
    the folder {out}. write_rest: (folder, checkpoint, plan, layout), config and tokenizer. convert: (values, form,
    checkpoint) → values to store or quantize. fault: (name, choice, its stored tensors, their bytes) → why they are
    not of that choice, as far as shows without the source. from_gguf: whether a GGUF file has all that is needed.
    side_notes: what of a checkpoint's small files does not come along, and why.
    notes: what of a checkpoint the files cannot hold and nobody will miss.
    run: how the folder is run, to see whether the engine computes what it should. shape: (choice, stored tensors of
    one quantized matrix) → its rows and columns, where each matrix lies in files of its own names.
    codable: whether the engine reads tensors that are entropy-coded (`--codec`, `recode`). holds_codes: whether the
    files can be opened as a checkpoint whose codes are cut without their weights (`slice`). takes_roundings: whether
    levels are ours, so that a quantizer that looks at inputs can choose among them.
    """

    layout: Callable[[Checkpoint, Mapping[str, Choice]], Layout]
    encode: Callable[[QuantizedMatrix], Sequence[torch.Tensor]]
    reader: Callable[[Sequence[torch.Tensor], Choice, Shape, str], Rows]
    stored: Callable[[Path], dict[str, Stored]]
    usage: str
    write_rest: Callable[[Path, Checkpoint, Plan, Layout], None]
    convert: Callable[[torch.Tensor, str, Checkpoint], torch.Tensor] = _as_it_is
    fault: Callable[[str, Choice, Sequence[Stored], Sequence[torch.Tensor]], str | None] = lambda *_: None
    from_gguf: bool = False
    side_notes: Callable[[Checkpoint], tuple[str, ...]] = Checkpoint.side_notes
    notes: Callable[[Checkpoint], Sequence[str]] = lambda _: ()
    run: Run | None = None
    shape: Callable[[Choice, Sequence[Stored]], Shape] | None = None
    codable: bool = False
    holds_codes: bool = False
    takes_roundings: bool = True


def squared_error_of(rows: Rows, weight: torch.Tensor) -> float:
    """Σ(w − ŵ)² against [rows, columns] weights, float64, a few rows in memory at a time."""
    return math.fsum(in_threads(lambda part: squared_distance(weight[part], rows(part)), row_parts(*weight.shape)))


def safetensors_layout(
    checkpoint: Checkpoint,
    choices: Mapping[str, Choice],
    parts_of: Callable[[MatrixRef, Choice], Sequence[Part]],
    renamed: Callable[[str], str] = str,
    left_out: Container[str] = (),
) -> Layout:
    """Output shards that mirror the source's: a matrix's parts where it was, a stack where its first matrix was.

    renamed: what the engine calls a tensor that is kept. left_out: stored tensors that are not written.
    """
    within = checkpoint.matrices_by_tensor(choices)
    parts = {matrix.name: parts_of(matrix, choices[matrix.name]) for matrices in within.values() for matrix in matrices}
    stacked = Counter(part.tensor for each in parts.values() for part in each if part.index is not None)
    home: dict[str, str] = {}
    files, places = {}, {}
    wanted = ([one for one in held.values() if one.name not in left_out] for held in checkpoint.shards.values())
    shards = [tensors for tensors in wanted if tensors]
    for position, tensors in enumerate(shards, start=1):
        file = shard_name(position, len(shards))
        specs: dict[str, TensorSpec] = {}
        for stored, info in ((one.name, one) for one in tensors):
            if stored not in within:
                specs[renamed(stored)] = TensorSpec(info.dtype, info.shape)
            for part in (part for matrix in within.get(stored, ()) for part in parts[matrix.name]):
                if home.setdefault(part.tensor, file) == file:
                    count = () if part.index is None else (stacked[part.tensor],)
                    specs[part.tensor] = TensorSpec(part.spec.dtype, (*count, *part.spec.shape))
        header, infos, nbytes = layout(specs)
        files[file] = header, nbytes
        places.update(stored_in({file: infos}))
    entries = []
    for tensors in shards:
        for stored in (one.name for one in tensors):
            if stored not in within:
                kept = renamed(stored)
                entries.append(Entry(stored, stored, None, (places[kept].place,), ((kept, None),)))
            for matrix in within.get(stored, ()):
                own = tuple((part.tensor, part.index) for part in parts[matrix.name])
                spots = tuple(places[tensor].share(index) for tensor, index in own)
                entries.append(Entry(matrix.name, matrix, choices[matrix.name], spots, own))
    return Layout(files, tuple(entries))


def shard_name(position: int, count: int) -> str:
    """Shard file name by the Hugging Face convention."""
    return f"model-{position:05d}-of-{count:05d}.safetensors"


def safetensors_stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors files."""
    return stored_in(read_shards(folder)[0])


def stored_in(files: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, Stored]:
    """The tensors of safetensors headers, by name; headers by file."""
    return {
        name: Stored(info.dtype, info.shape, Place(file, info.begin, info.nbytes))
        for file, infos in files.items()
        for name, info in infos.items()
    }


def kept_dtype(dtype: str) -> str:
    """What the choice "16" makes of a stored dtype."""
    return "BF16" if dtype == "F32" else dtype


def kept_part(matrix: MatrixRef, tensor: str, index: int | None = None) -> Part:
    """A matrix that keeps 16 bits."""
    return Part(tensor, TensorSpec(kept_dtype(matrix.dtype), matrix.shape), index)


KEPT = Choice(16)
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
"""Architectures whose exports for other safetensors engines have been run there."""
LINEAR = (Role.EXPERT, Role.SHARED_EXPERT, Role.ATTENTION, Role.MIXER, Role.DENSE_MLP, Role.ROUTER, Role.HEAD)
MOST_MATRICES = 99_999  # in a stack
_MODULE = re.compile(r"(?P<stem>.*\blayers\.)(?P<layer>\d+)\.(?P<block>.*?)(experts\.(?P<expert>\d+)\.)?(?P<leaf>\w+)")


def added_bytes(parts: Iterable[Part]) -> int:
    """Bytes that a matrix's parts add to their files, header entries included.

    A few bytes too many for a stack: its one header entry is counted with its first matrix, and names the number of
    matrices, for which five digits are counted.
    """
    total = 0
    for part in parts:
        if part.index is None:
            total += stored_bytes(part.tensor, part.spec)
            continue
        total += part.spec.nbytes
        if part.index == 0:
            total += entry_bytes(part.tensor, TensorSpec(part.spec.dtype, (MOST_MATRICES, *part.spec.shape)))
    return total


def kept_fault(name: str, stored: Sequence[Stored]) -> str | None:
    """Why a matrix that keeps 16 bits does not, or None."""
    wrong = [one.dtype for one in stored if one.dtype not in ("BF16", "F16")]
    return f"{name} is {wrong[0]}, the plan keeps 16 bits" if wrong else None


def shape_fault(name: str, choice: Choice, stored: Sequence[Stored], expected: Sequence[Sequence[int]]) -> str | None:
    """Why tensors do not have the shapes that a choice gives them, or None."""
    found = [list(one.shape) for one in stored]
    if found == [list(shape) for shape in expected]:
        return None
    return f"{name} is stored with shapes {' and '.join(map(str, found))}, the plan says {choice}"


def module_name(tensor: str) -> str:
    """The module that a weight belongs to."""
    return tensor.removesuffix(".weight")


def as_published(checkpoint: Checkpoint, tensor: str) -> str:
    """A tensor's name as the family's own checkpoints have it: transformers 5 calls every MoE block `mlp`."""
    block = checkpoint.architecture.expert_name.partition(".experts.")[0].rpartition(".")[2]
    return tensor.replace(".mlp.", f".{block}.")


def require_family(checkpoint: Checkpoint, engine: str) -> None:
    """Raise PlanError unless it is known what other engines call the tensors of this architecture.

    Raises ArchitectureError for a setting of a model without experts that the engine computes otherwise.
    """
    if checkpoint.architecture.name in FAMILIES:
        return
    dense, family = dense_families(engine.lower()), str(checkpoint.config.get("model_type"))
    if family in dense:
        require_assumptions(checkpoint, engine, str(family), dense[family])
        return
    name = checkpoint.architecture.name if checkpoint.architecture.num_experts_keys else family
    raise PlanError(
        f"The {engine} export does not know how {engine} names the tensors of {name!r}. "
        f"Available: {', '.join((*FAMILIES, *dense))}. Plan with --engine native."
    )


def require_agreement(
    checkpoint: Checkpoint, choices: Mapping[str, Choice], engine: str, together: Callable[[MatrixRef], str | None]
) -> None:
    """Raise PlanError if two matrices that the engine holds `together`, under one name, have different choices."""
    first: dict[str, tuple[str, Choice]] = {}
    for matrix in checkpoint.matrices:
        if (unit := together(matrix)) is not None:
            choice = choices.get(matrix.name, KEPT)
            other, before = first.setdefault(unit, (matrix.name, choice))
            if before != choice:
                raise PlanError(
                    f"{engine} runs {other} and {matrix.name} as one, but the plan stores them as {before} and "
                    f"{choice}. Give them one choice, for example with --pin '{matrix.name}={before}'."
                )


def linear_choices(
    checkpoint: Checkpoint, choices: Mapping[str, Choice], called: Callable[[MatrixRef], str]
) -> dict[str, Choice]:
    """The choice of every linear module by what it is `called`, 16 for those that the plan does not quantize."""
    return {called(matrix): choices.get(matrix.name, KEPT) for matrix in checkpoint.matrices if matrix.role in LINEAR}


def module_patterns(modules: Iterable[str], known: Iterable[str]) -> list[str]:
    r"""Few regular expressions that match, of the known modules' names, just the given ones.

    Layers are listed, and experts unless all of a layer are meant: `model\.layers\.(0|3)\.mlp\.experts\.\d+\.up_proj`.
    """
    given, everything = _experts_by_cell(modules), _experts_by_cell(known)
    layers: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for cell, experts in given.items():
        stem, layer, block, leaf = cell
        if experts:
            numbers = r"\d+" if experts == everything[cell] else _either(sorted(experts, key=int))
            block += rf"experts\.{numbers}\."
        layers[stem, block, leaf].append(layer)
    leaves: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (stem, block, leaf), listed in layers.items():
        leaves[stem + (_either(sorted(listed, key=int)) + r"\." if stem else ""), block].append(leaf)
    return [before + block + _either(names) for (before, block), names in leaves.items()]


def _experts_by_cell(modules: Iterable[str]) -> dict[tuple[str, str, str, str], set[str]]:
    """Experts by (what comes before the layer, layer, what comes before the experts, projection), escaped."""
    cells: dict[tuple[str, str, str, str], set[str]] = defaultdict(set)
    for module in modules:
        match = _MODULE.fullmatch(module)
        place = ("", "", "", module) if match is None else match.group("stem", "layer", "block", "leaf")
        stem, layer, block, leaf = map(re.escape, place)
        cells[stem, layer, block, leaf].update([match["expert"]] if match and match["expert"] else [])
    return cells


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"({'|'.join(names)})"


def write_model_folder(
    folder: Path, checkpoint: Checkpoint, entries: Iterable[Entry], config: Mapping[str, Any]
) -> None:
    """What makes safetensors files a Hugging Face model: config, index, tokenizer and other side files."""
    weight_map, total = {}, 0
    for entry in entries:
        for (tensor, _), place in zip(entry.parts, entry.places, strict=True):
            weight_map[tensor] = place.file
            total += place.nbytes
    write_json(folder / "config.json", {**checkpoint.config, **own_head(checkpoint), **config})
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    for path in checkpoint.side_files():
        copied = folder / path.relative_to(checkpoint.folder)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, copied)


def own_head(checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json must say where it calls a head tied that the files hold with other weights: engines differ in
    which of the two they believe."""
    head = head_of(checkpoint)
    embedding = next((name for name, role in checkpoint.roles.items() if role is Role.EMBEDDING), None)
    if head is None or not says_tied(checkpoint) or (embedding and _same_bytes(checkpoint, head, embedding)):
        return {}
    nested = {
        key: {**part, TIED: False} for key, part in checkpoint.config.items() if isinstance(part, dict) and TIED in part
    }
    return {TIED: False, **nested}


def _same_bytes(checkpoint: Checkpoint, one: str, other: str) -> bool:
    first, second = (checkpoint.info(name) for name in (one, other))
    if (first.dtype, first.shape, first.encoding) != (second.dtype, second.shape, second.encoding):
        return False
    files = (checkpoint.file(checkpoint.shard_of[name]) for name in (one, other))
    sums = {checksum(file.chunks(info.begin, info.nbytes)) for file, info in zip(files, (first, second), strict=True)}
    return len(sums) == 1


def write_json(path: Path, data: Any) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
