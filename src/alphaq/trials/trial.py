"""Try a plan for real: quantize it into scratch space, load the result, score it, and throw it away.

What trials of one checkpoint have in common is done once: a matrix stored at some choice is taken over by the next
trial that chooses the same, equal plans are scored once, and the reference's logits are remembered.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from alphaq.checkpoint.reader import Checkpoint
from alphaq.evaluation.fidelity import Remembered, WindowScore
from alphaq.evaluation.loading import pair_of
from alphaq.evaluation.room import bytes_in_memory, usual_dtype, with_stream
from alphaq.measuring.resources import Resources
from alphaq.nouns.plan import Plan
from alphaq.nouns.scoring import Scoring
from alphaq.work.workers import Workers, Wrap
from alphaq.writing.quantizing import quantize
from alphaq.writing.records import WriteOptions
from alphaq.writing.rounding import Rounding

KEPT_BITS = 16.0
"""Of weights that are not quantized."""


def settled(scoring: Scoring, checkpoint: Checkpoint, bits: float = KEPT_BITS) -> tuple[Scoring, str | None]:
    """The scoring with `stream` decided for a checkpoint beside what is made of it, at most so wide.

    See `room.with_stream`. bits: of an expert weight; all other weights count as they are loaded when kept.
    """
    whole = bytes_in_memory(checkpoint.folder, usual_dtype(scoring.dtype, [checkpoint.folder]))
    weights = sum(math.prod(one.shape) for shard in checkpoint.shards.values() for one in shard.values())
    planned = sum(matrix.parameters for matrix in checkpoint.planned)
    narrower = 0 if bits >= KEPT_BITS else int(planned * (whole / weights - bits / 8))
    return with_stream(scoring, [checkpoint.folder], more_bytes=whole - max(0, narrower))


class Trials:
    """Quantizes and scores plans of one checkpoint, each distinct one once.

    score: (model, tokenizer, reference=…, wrap=…) → scores by text. scratch: a folder for quantized matrices, which is
    made, and which the caller removes. scoring: how models are run. known: scores by digest, of earlier trials.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        score: Callable[..., Iterable[tuple[str, list[WindowScore]]]],
        scratch: Path,
        scoring: Scoring,
        wrap: Wrap,
        workers: Workers | None,
    ) -> None:
        self.checkpoint, self.score, self.scoring = checkpoint, score, scoring
        self.wrap, self.workers = wrap, workers
        self.known: dict[str, Any] = {}
        self.blocks = scratch / "blocks"
        self.blocks.mkdir(parents=True)
        model, _, self.tokenizer = pair_of(checkpoint.folder, None, scoring)
        self.computed_in = str(model.dtype).removeprefix("torch.")
        self.reference = Remembered(model)

    def run(self, plan: Plan | None, rounding: Rounding | None) -> dict[str, Any]:
        """Digest of the plan's choices and rounding, the scores of its model by text and window, and seconds.

        Without a plan the reference itself is scored.
        """
        choices = {} if plan is None else plan.choices | {"": str(rounding)}
        digest = hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:32]
        seconds = None
        if digest not in self.known:
            if plan is None:
                self.known[digest] = self._scores(self.reference)
            else:
                with TemporaryDirectory(dir=self.blocks.parent) as scratch:
                    folder, begin = Path(scratch) / "model", time.perf_counter()
                    options = WriteOptions(rounding, shared=self.blocks, check=False)
                    quantize(self.checkpoint, plan, folder, options, Resources(self.workers))
                    seconds = time.perf_counter() - begin
                    model, _, _ = pair_of(folder, None, self.scoring)
                    self.known[digest] = self._scores(model)
        return {"digest": digest, "scores": self.known[digest], "seconds_to_quantize": seconds}

    def _scores(self, model: Any) -> dict[str, list[list[float]]]:
        found = self.score(model, self.tokenizer, reference=self.reference, wrap=self.wrap)
        return {name: [list(score.sums) for score in scores] for name, scores in found}


def window_scores(found: dict[str, list[list[float]]]) -> dict[str, list[WindowScore]]:
    """Scores by text and window as records, from what `Trials.run` gives and journals keep."""
    return {text: [_window_score(*values) for values in windows] for text, windows in found.items()}


def _window_score(tokens: float, loss: float, kl: float, top1: float, ear: float, reference: float) -> WindowScore:
    return WindowScore(int(tokens), loss, kl, top1, ear, reference)
