"""Output shards that mirror the source's, placed before any data exists; an engine says what a matrix fills."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TensorSpec, entry_bytes, layout, stored_bytes
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.checkpoint.weights import read_shards
from alphaq.engines.export import Entry, Layout, Part, Stored, kept_dtype, stored_in
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef

MOST_MATRICES = 99_999  # in a stack


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
    contents = _Contents(choices, within, parts, renamed)
    wanted = ([one for one in held.values() if one.name not in left_out] for held in checkpoint.shards.values())
    shards = [tensors for tensors in wanted if tensors]
    files, places = {}, {}
    for file, specs in contents.by_file(shards):
        header, infos, nbytes = layout(specs)
        files[file] = header, nbytes
        places.update(stored_in({file: infos}))
    entries = (entry for tensors in shards for one in tensors for entry in contents.entries(one.name, places))
    return Layout(files, tuple(entries))


@dataclass(frozen=True)
class _Contents:
    """What becomes of each stored tensor: the matrices `within` it fill their parts, another one is kept."""

    choices: Mapping[str, Choice]
    within: Mapping[str, Sequence[MatrixRef]]
    parts: Mapping[str, Sequence[Part]]
    renamed: Callable[[str], str]

    def by_file(self, shards: Sequence[Sequence[TensorInfo]]) -> Iterator[tuple[str, dict[str, TensorSpec]]]:
        """Every output file's tensors, in the order of the source's. A stack lies where its first matrix was."""
        stacked = Counter(part.tensor for parts in self.parts.values() for part in parts if part.index is not None)
        home: dict[str, str] = {}
        for position, tensors in enumerate(shards, start=1):
            file = shard_name(position, len(shards))
            specs: dict[str, TensorSpec] = {}
            for info in tensors:
                if info.name not in self.within:
                    specs[self.renamed(info.name)] = TensorSpec(info.dtype, info.shape)
                for part in (part for matrix in self.within.get(info.name, ()) for part in self.parts[matrix.name]):
                    if home.setdefault(part.tensor, file) == file:
                        count = () if part.index is None else (stacked[part.tensor],)
                        specs[part.tensor] = TensorSpec(part.spec.dtype, (*count, *part.spec.shape))
            yield file, specs

    def entries(self, tensor: str, places: Mapping[str, Stored]) -> Iterator[Entry]:
        """What is written for one stored tensor."""
        if tensor not in self.within:
            kept = self.renamed(tensor)
            yield Entry(tensor, tensor, None, (places[kept].place,), ((kept, None),))
        for matrix in self.within.get(tensor, ()):
            own = tuple((part.tensor, part.index) for part in self.parts[matrix.name])
            spots = tuple(places[name].share(index) for name, index in own)
            yield Entry(matrix.name, matrix, self.choices[matrix.name], spots, own)


def shard_name(position: int, count: int) -> str:
    """Shard file name by the Hugging Face convention."""
    return f"model-{position:05d}-of-{count:05d}.safetensors"


def safetensors_stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors files."""
    return stored_in(read_shards(folder)[0])


def kept_part(matrix: MatrixRef, tensor: str, index: int | None = None) -> Part:
    """A matrix that keeps 16 bits."""
    return Part(tensor, TensorSpec(kept_dtype(matrix.dtype), matrix.shape), index)


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
