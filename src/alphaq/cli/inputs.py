"""Files that plans and quantizers look at beside the model: texts, importance matrices, statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from alphaq.errors import AlphaQError, PassError, PlanError
from alphaq.terminal import note

if TYPE_CHECKING:
    from alphaq.calibration.text import Text
    from alphaq.checkpoint.gguf.imatrix import ImportanceMatrix
    from alphaq.checkpoint.reader import Checkpoint
    from alphaq.cli.options import Asked
    from alphaq.measuring.resources import Resources
    from alphaq.nouns.plan import Plan
    from alphaq.nouns.settings import PlanConfig
    from alphaq.spectra.measure import Stats
    from alphaq.writing.rounding import Rounding


SELF, NONE = "self", "none"


class Own(Enum):
    """An importance matrix of the model's own writing that is still to be made."""

    ASKED = "by losses, or by inputs where the backward pass cannot be run"
    AGAIN = "by losses, as the plan that was read has it"
    USUAL = "by losses, of the plan's own pass; none where its method runs no such pass"


@dataclass(frozen=True)
class Inputs:
    """What a plan is made with, of which it keeps the names alone. calibration: a file's path, or `self`."""

    stats: Path | Stats | None = None
    calibration: str | None = None
    imatrix: ImportanceMatrix | None = None
    own: Own | None = None

    @classmethod
    def of(cls, asked: Asked[PlanConfig]) -> Inputs:
        """Those that were asked for, or are usual. Raises AlphaQError for an importance matrix that cannot be read."""
        from alphaq.checkpoint.gguf.imatrix import read_imatrix

        named = asked.values
        imatrix = named.get("imatrix")
        file = None if imatrix in (None, SELF, NONE) else read_imatrix(Path(imatrix))
        own = {SELF: Own.ASKED, None: Own.USUAL}.get(imatrix)
        return cls(named.get("stats"), named.get("calibration"), file, own)

    def of_plan(self, plan: Plan) -> Inputs:
        """The same for a plan that was read: what it was made with is made again, but for what takes a file of the
        whole model, which is to be asked for."""
        from alphaq.writing.planned import LOSSES, OWN

        if self.own is not Own.USUAL:
            return self
        return replace(self, own=Own.AGAIN if (plan.imatrix or "").startswith(f"{OWN} {LOSSES}-") else None)

    @property
    def names(self) -> dict[str, str | None]:
        """What a plan keeps of them. Numbers that come from an output have no name; a model's own importance matrix has
        no digest before it is made."""
        return {"stats": getattr(self.stats, "name", None), "imatrix": self._imatrix_name}

    @property
    def _imatrix_name(self) -> str | None:
        if self.own is Own.ASKED:
            return SELF
        return None if self.imatrix is None else f"{self.imatrix.name} {self.imatrix.digest}"

    def made_for(self, checkpoint: Checkpoint | None, resources: Resources, scratch: Path, bos: bool = True) -> Inputs:
        """With the model's own importance matrix, if it was asked for, or a plan that was read has it; says on stderr
        where it is made of inputs, and why. scratch: folder for the model in 16 bits. bos: as in the plan.

        Raises AlphaQError without a model, and where it cannot be made.
        """
        if self.own in (None, Own.USUAL):
            return self
        from alphaq.writing.observing import importance_by_inputs, importance_by_losses

        if checkpoint is None:
            raise AlphaQError("--imatrix self runs the model. Give MODEL.")
        try:
            found = importance_by_losses(checkpoint, bos, resources)
        except PassError as error:
            if self.own is Own.AGAIN:
                raise PlanError(
                    "The plan was made with an importance matrix of the model's own losses, which cannot be had here: "
                    f"{error.reason} Make the plan again here."
                ) from None
            note(f"--imatrix self goes by the columns' inputs, not by what their errors cost: {error.reason}")
            note_whole_file(checkpoint, scratch, "unless an earlier run has looked at it")
            found = importance_by_inputs(checkpoint, scratch, resources)
        return replace(self, imatrix=found, own=None)


def note_whole_file(checkpoint: Checkpoint, scratch: Path, condition: str = "") -> None:
    """Say how large the file is that llama.cpp runs, if it has to be written first. Raises AlphaQError."""
    from alphaq.report.tables import human_bytes
    from alphaq.writing.observing import bytes_in_16_bits

    if nbytes := bytes_in_16_bits(checkpoint):
        unless = f", {condition}" if condition else ""
        note(
            f"llama.cpp runs the model, so it is written as a GGUF file in 16 bits first{unless}: "
            f"{human_bytes(nbytes)} in {scratch.absolute()}, removed afterwards"
        )


def text_of(source: str | None, bos: bool = True) -> Text | None:
    """What methods and quantizers are to look at. Raises AlphaQError if it is no text."""
    if source is None:
        return None
    from alphaq.calibration.text import Text

    if source == SELF:
        return Text("self", bos=bos)
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
    from alphaq.writing.rounding import Rounding, enough_tokens

    rounding = Rounding.of(engine, quantizer, text_of(sight.source))
    if rounding.inputs is None:
        if sight.tokens is not None:
            raise AlphaQError("--calibration-tokens applies only to quantizers gptq and learned. Drop it.")
        return rounding
    tokens = sight.tokens or enough_tokens(checkpoint)
    return replace(rounding, inputs=replace(rounding.inputs, tokens=tokens, bos=sight.bos))


def note_source(checkpoint: Checkpoint, engine: str, importance: ImportanceMatrix | None) -> None:
    """Say what the engine's files cannot hold of a checkpoint, and what an importance matrix leaves open.

    Raises PlanError for an engine that cannot hold such layers at all.
    """
    from alphaq.engines.profiles import profile

    profile(engine).check_layers(checkpoint)
    note(*profile(engine).writer.notes(checkpoint))
    if importance is not None:
        note_importance(checkpoint, importance)


def note_importance(checkpoint: Checkpoint, importance: ImportanceMatrix) -> None:
    """Say what an importance matrix leaves open."""
    from alphaq.engines.gguf.importance import importance_of

    note(*importance_of(checkpoint, importance).notes(importance.name))
