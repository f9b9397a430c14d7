"""How a plan becomes files: which tensors each matrix fills, and which bytes of which file those are.

Everything is placed before any data exists, so that sizes are exact and a matrix can be written as soon as it is
quantized, in any order. An engine says what a matrix becomes: its parts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alphaq.calibration.traffic import Calibration
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import TORCH_DTYPES, TensorSpec
from alphaq.checkpoint.tensors import TensorInfo
from alphaq.checkpoint.writer import Place
from alphaq.errors import PlanError
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Shape
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.nouns.serving import Kept, Memory, Placement, Serving
from alphaq.simd.sums import in_threads, row_parts, squared_distance
from alphaq.work.workers import Wrap


@dataclass(frozen=True)
class Part:
    """A tensor that one matrix fills; with an index, entry `index` of a stack that the matrices of a layer fill.

    spec: dtype and shape of the matrix's own share.
    """

    tensor: str
    spec: TensorSpec
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """What becomes of a tensor's values before an engine's files hold them.

    transform: name of the engine's other layout (`Export.convert` knows it), none for the source's own. dtype: what
    the values are cast to, as safetensors spells it, none for no cast. raw: the stored bytes are copied whatever they
    mean, encoded or not.
    """

    transform: str = ""
    dtype: str = ""
    raw: bool = False

    @property
    def changes(self) -> bool:
        """Whether values are not stored as the source has them."""
        return bool(self.transform or self.dtype)


AS_IT_IS = Form()
RAW = Form(raw=True)


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing to write: a matrix in its choice, or a stored tensor that is kept (no choice).

    form: how the engine changes the values first. parts: output tensor (and index in its stack) at each place.
    """

    name: str
    source: MatrixRef | str
    choice: Choice | None
    places: tuple[Place, ...]
    parts: tuple[tuple[str, int | None], ...]
    form: Form = AS_IT_IS


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
    what the engine's own arithmetic takes. restored: the same as `logits` with the restored weights in 16 bits, which
    lie beside the folder meanwhile; for models that only the engine can run. Raises OutputError where there is no room.
    """

    called: str
    logits: Callable[[Path, Sequence[int]], torch.Tensor]
    tolerance: float
    restored: Callable[[Path, Sequence[int]], torch.Tensor] | None = None


@dataclass(frozen=True)
class Hosting:
    """What an engine keeps in memory beside the weights, and the options under which it keeps no more.

    kept: raises AlphaQError where that cannot be found out. placed: what of the files goes to the card of a memory that
    has one; raises BudgetError where even what every token reads does not fit there.
    """

    kept: Callable[[Checkpoint, Serving], Kept]
    flags: Callable[[Memory], str]
    placed: Callable[[Checkpoint, Layout, Memory], Placement]


def _as_it_is(values: torch.Tensor, form: Form, checkpoint: Checkpoint) -> torch.Tensor:
    return values


@dataclass(frozen=True)
class Export:
    """What an engine's files are made of.

    layout: (checkpoint, choices) → every file. split: the same in files of so many bytes at most; None where an engine
    reads no parts (`--split-size`). encode: a quantized matrix → one tensor for each of its parts.
    reader: (parts, choice, shape, name) → a function of a row slice that gives the values the engine will compute
    with, by the engine's own library where it has one. stored: a folder's tensors by name. usage: a command that runs
    the folder {out}, or its {first} file. write_rest: (folder, checkpoint, plan, layout), config and tokenizer.
    convert: (values, form,
    checkpoint) → values to store or quantize. fault: (name, choice, its stored tensors, their bytes) → why they are
    not of that choice, as far as shows without the source. from_gguf: whether a GGUF file has all that is needed.
    side_notes: what of a checkpoint's small files does not come along, and why.
    notes: what of a checkpoint the files cannot hold and nobody will miss.
    run: how the folder is run, to see whether the engine computes what it should. shape: (choice, stored tensors of
    one quantized matrix) → its rows and columns, where each matrix lies in files of its own names.
    codable: whether the engine reads tensors that are entropy-coded (`--codec`, `recode`). holds_codes: whether the
    files can be opened as a checkpoint whose codes are cut without their weights (`slice`). type_file: (checkpoint,
    choices) → what the engine's own tool reads to quantize by a plan (`--write-type-file`), None without one.
    takes_roundings: whether levels are ours, so that a quantizer that looks at inputs can choose among them. observed:
    (checkpoint, windows, tokens of each, whether BOS comes first, how progress is shown) → what the engine itself sees
    of its experts while the model goes on from random tokens. hosting: what `--memory` needs to know, None where
    nobody does.
    """

    layout: Callable[[Checkpoint, Mapping[str, Choice]], Layout]
    encode: Callable[[QuantizedMatrix], Sequence[torch.Tensor]]
    reader: Callable[[Sequence[torch.Tensor], Choice, Shape, str], Rows]
    stored: Callable[[Path], dict[str, Stored]]
    usage: str
    write_rest: Callable[[Path, Checkpoint, Plan, Layout], None]
    split: Callable[[Checkpoint, Mapping[str, Choice], int | None], Layout] | None = None
    convert: Callable[[torch.Tensor, Form, Checkpoint], torch.Tensor] = _as_it_is
    fault: Callable[[str, Choice, Sequence[Stored], Sequence[torch.Tensor]], str | None] = lambda *_: None
    from_gguf: bool = False
    side_notes: Callable[[Checkpoint], tuple[str, ...]] = Checkpoint.side_notes
    notes: Callable[[Checkpoint], Sequence[str]] = lambda _: ()
    run: Run | None = None
    shape: Callable[[Choice, Sequence[Stored]], Shape] | None = None
    codable: bool = False
    holds_codes: bool = False
    type_file: Callable[[Checkpoint, Mapping[str, Choice]], str] | None = None
    takes_roundings: bool = True
    observed: Callable[[Checkpoint, int, int, bool, Wrap], Calibration] | None = None
    hosting: Hosting | None = None

    def used(self, out: str, files: Sequence[str], memory: Memory | None = None) -> str:
        """What to do with a folder of these weight files, in their order, made for so much memory."""
        usage = self.usage.format(out=out, first=Path(files[0]).name)
        return usage if memory is None or self.hosting is None else f"{usage} {self.hosting.flags(memory)}"

    def laid_out(self, checkpoint: Checkpoint, choices: Mapping[str, Choice], split_bytes: int | None) -> Layout:
        """Every file; split, where that is asked for. Raises PlanError if the engine reads no parts."""
        if split_bytes is None:
            return self.layout(checkpoint, choices)
        if self.split is None:
            raise PlanError("The plan asks for split files (--split-size), which are for llama.cpp. Plan without.")
        return self.split(checkpoint, choices, split_bytes)


def squared_error_of(rows: Rows, weight: torch.Tensor) -> float:
    """Σ(w − ŵ)² against [rows, columns] weights, float64, a few rows in memory at a time."""
    return math.fsum(in_threads(lambda part: squared_distance(weight[part], rows(part)), row_parts(*weight.shape)))


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


def write_json(path: Path, data: object) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
