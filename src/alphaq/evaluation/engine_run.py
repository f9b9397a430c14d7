"""Whether an engine computes with a folder what its restored weights give: a few tokens through both.

Weights that are right to the bit can still be run wrongly: an engine that overlooks a setting of the config answers
fluently and otherwise. So the folder is run in its engine, and the model's own class in transformers is run with the
restored weights, layer by layer, so that it need not fit into memory. What only the engine can run is run there twice,
the second time with the restored weights in 16 bits. Differences are in standard deviations of a token's logits; the
median of the tokens counts, since rounding alone sends single tokens to another expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alphaq.calibration.tokens import random_windows
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.export import Run
from alphaq.engines.output import Output
from alphaq.errors import PlanError, VerificationError
from alphaq.evaluation.restored import restored_alone, restored_from
from alphaq.evaluation.streamed import StreamedModel
from alphaq.nouns.matrix import Role
from alphaq.writing.planned import as_planned

TOKENS = 48


@dataclass(frozen=True)
class EngineRun:
    """How an engine's logits agree with those of the restored weights."""

    engine: str
    tokens: int
    difference: float
    """Of logits, in their standard deviations, root mean square over the words, median of the tokens."""
    correlation: float
    """Of all logits."""
    tolerance: float
    twice: bool = False
    """Whether the restored weights were run in the engine too, which alone can run the model."""


def run_in_engine(folder: Path, source: Checkpoint | None = None, tokens: int = TOKENS) -> EngineRun:
    """Run some random tokens in the engine that a folder was written for, and with its restored weights.

    source: the original, whose config says what the model computes; without it the folder's own. Raises
    VerificationError if they disagree, MissingEngineError if the engine is not installed, OutputError where there is
    no room for the weights in 16 bits that only the engine can run.
    """
    output = Output(folder)
    source = None if source is None else as_planned(source, output.plan)
    run = output.profile.writer.run
    if run is None:
        raise PlanError(f"AlphaQ cannot run what is written for {output.plan.engine}. Drop --run.")
    # A file that only its engine can run has its source's metadata to the bit, and tensors of the same names.
    checkpoint = restored_alone(output) if source is None or source.plain else restored_from(output, source)
    rows = [matrix.shape[0] for matrix in checkpoint.with_role(Role.EMBEDDING)]
    vocabulary = max(rows, default=0) or int(checkpoint.text_config["vocab_size"])
    ids = random_windows(vocabulary, 1, tokens)[0].tolist()
    found = run.logits(folder, ids)
    expected = _expected(run, folder, checkpoint, ids)
    made = _compared(run.called, found[:, : expected.shape[1]], expected[:, : found.shape[1]], run.tolerance)
    if made.difference > made.tolerance:
        raise VerificationError(
            f"{folder}: {made.engine} computes otherwise than the restored weights: logits of {tokens} tokens differ "
            f"by {made.difference:.2f} standard deviations (at most {made.tolerance} are usual), correlation "
            f"{made.correlation:.3f}. The weights are as planned, so {_suspect(checkpoint)}"
        )
    return replace(made, twice=checkpoint.plain)


def _expected(run: Run, folder: Path, checkpoint: Checkpoint, ids: Sequence[int]) -> torch.Tensor:
    """Logits of the restored weights [tokens, words]."""
    if not checkpoint.plain:
        return restored_logits(checkpoint, ids)
    assert run.restored is not None  # of an engine whose files are read by their names alone
    return run.restored(folder, ids)


def _suspect(checkpoint: Checkpoint) -> str:
    """Why an engine may compute otherwise, and what to do."""
    if checkpoint.plain:
        return "its kernels for these types are wrong. Install another version of it, or leave types out by --choices."
    return "it reads a setting of the config otherwise. Use --engine native, and report this model's config.json."


def restored_logits(checkpoint: Checkpoint, ids: Sequence[int]) -> torch.Tensor:
    """Logits of the model's own class in float32 [tokens, words], a layer in memory at a time."""
    model = StreamedModel(checkpoint, remedy="Drop --run; `alphaq eval --no-stream` runs the model whole.")
    return model(torch.tensor([list(ids)])).logits[0, slice(0, len(ids))]


def _compared(engine: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> EngineRun:
    spread = expected.std(dim=1)
    apart = (found - expected).square().mean(dim=1).sqrt() / spread
    difference = float(apart.nan_to_num(nan=torch.inf).median())
    pair = torch.stack((found.flatten(), expected.flatten()))
    return EngineRun(engine, len(expected), difference, float(torch.corrcoef(pair)[0, 1]), tolerance)
