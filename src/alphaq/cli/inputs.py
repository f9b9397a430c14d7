"""Files that plans and quantizers look at beside the model: texts, importance matrices, statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alphaq.errors import AlphaQError
from alphaq.terminal import note

if TYPE_CHECKING:
    from alphaq.calibration.text import Text
    from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.cli.options import Asked
    from alphaq.nouns.settings import PlanConfig
    from alphaq.spectra.measure import Stats
    from alphaq.writing.rounding import Rounding


@dataclass(frozen=True)
class Inputs:
    """What a plan is made with, of which it keeps the names alone. calibration: a file's path, or `self`."""

    stats: Path | Stats | None = None
    calibration: str | None = None
    imatrix: ImportanceMatrix | None = None

    @classmethod
    def of(cls, asked: Asked[PlanConfig]) -> Inputs:
        """Those that were asked for. Raises AlphaQError for an importance matrix that cannot be read."""
        named = asked.values
        imatrix = importance_matrix(named.get("imatrix"))
        return cls(named.get("stats"), named.get("calibration"), imatrix)

    @property
    def names(self) -> dict[str, str | None]:
        """What a plan keeps of them. Numbers that come from an output have no name."""
        importance = self.imatrix
        return {
            "stats": getattr(self.stats, "name", None),
            "imatrix": None if importance is None else f"{importance.name} {importance.digest}",
        }


def importance_matrix(path: Path | None) -> ImportanceMatrix | None:
    """Read one. Raises AlphaQError."""
    from alphaq.checkpoint.gguf.imatrix import read_imatrix

    return None if path is None else read_imatrix(path)


def text_of(source: str | None, bos: bool = True) -> Text | None:
    """What methods and quantizers are to look at. Raises AlphaQError if it is no text."""
    if source is None:
        return None
    from alphaq.calibration.text import SELF, Text

    if source == SELF:
        return Text(SELF, bos=bos)
    if not Path(source).is_file():
        raise AlphaQError(f"No text file {source}. Give a UTF-8 text with --calibration, or --calibration self.")
    return Text(Path(source), bos=bos)


@dataclass(frozen=True)
class Sight:
    """What quantizers are to look at: a text (a path, `self`, or None for the usual), so many tokens of it (None for
    enough), and whether its windows begin with BOS."""

    source: str | None = None
    tokens: int | None = None
    bos: bool = True


def rounding_of(checkpoint: Checkpoint, engine: str, quantizer: str | None, sight: Sight = Sight()) -> Rounding:
    """How matrices are to be rounded. Raises AlphaQError for options that fit no quantizer."""
    from dataclasses import replace

    from alphaq.writing.rounding import Rounding, enough_tokens

    rounding = Rounding.of(engine, quantizer, text_of(sight.source))
    if rounding.inputs is None:
        if sight.tokens is not None:
            raise AlphaQError("--calibration-tokens applies only to quantizers gptq and learned. Drop it.")
        return rounding
    tokens = sight.tokens or enough_tokens(checkpoint)
    return replace(rounding, inputs=replace(rounding.inputs, tokens=tokens, bos=sight.bos))


def note_source(checkpoint: Checkpoint, engine: str, importance: ImportanceMatrix | None) -> None:
    """Say what the engine's files cannot hold of a checkpoint, and what an importance matrix leaves open."""
    from alphaq.engines.gguf.importance import importance_of
    from alphaq.engines.profiles import profile

    note(*profile(engine).writer.notes(checkpoint))
    if importance is not None and (open_ := importance_of(checkpoint, importance).note(importance.name)):
        note(open_)
