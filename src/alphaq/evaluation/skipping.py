"""What leaving out experts costs and gains: one model with several thresholds, in turn.

KL and top-1 are against a reference, or the same model with all of its experts. Speed is that of decoding one sequence,
whose tokens are those of the first text: every threshold in every round, so that a slow moment of the machine hits all
of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaq.errors import AlphaQError
from alphaq.evaluation.fidelity import Remembered, evaluate_texts, read_texts, windows
from alphaq.nouns.fidelity import Fidelity
from alphaq.nouns.scoring import Scoring
from alphaq.nouns.skipping import Decoding, SkipCurve, SkipPoint
from alphaq.runtime.loading import load_pair
from alphaq.runtime.skipping import CALL, NOBODY, check_share, check_skippable, packed_experts, skip_experts
from alphaq.work.workers import Wrap, silent


@dataclass(frozen=True)
class Pace:
    """Seconds of a decoded token, by the clock and of the processor."""

    wall_s: float
    cpu_s: float


class Switched:
    """A model that leaves out experts by a share of its own at each call, and counts them.

    routed, left_out: pairs of a token and one of its experts. Several may stand for one model.
    """

    def __init__(self, model: Any, share: float) -> None:
        self.model, self.share = model, share
        self.device, self.config = model.device, model.config
        self.routed = self.left_out = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        skip_experts(self.model, self.share)
        hooks = [
            module.register_forward_pre_hook(self._count, with_kwargs=True)  # sees what the other hook makes
            for _, module in packed_experts(self.model)
        ]
        try:
            return self.model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        index = (dict(zip(CALL, args, strict=False)) | kwargs)["top_k_index"]
        self.routed += index.numel()
        self.left_out += int((index == NOBODY).sum())


def skip_curve(
    model: str | Path,
    scoring: Scoring,
    shares: Sequence[float],
    reference: str | Path | None = None,
    decoding: Decoding | None = None,
    wrap: Wrap = silent,
) -> SkipCurve:
    """Fidelity and speed of a native checkpoint by the share below which experts are left out; 0 comes first.

    Raises AlphaQError for shares that are none, a text that is too short, and models whose routing cannot be changed.
    """
    decoding = decoding or Decoding()
    wanted = sorted({0.0, *map(check_share, shares)})
    if not wanted[-1]:
        raise AlphaQError("--shares has no share above 0, so nothing is compared. Try --shares 0.2,0.4.")
    texts = read_texts(scoring.texts)
    loaded, against, tokenizer = load_pair(model, reference, scoring.dtype, scoring.device)
    check_skippable(loaded)
    cut = windows(tokenizer, next(iter(texts.values())), scoring.window, None, scoring.skip_tokens, scoring.bos)
    ids = _sequence(cut.parts, decoding)
    truth = Remembered(Switched(loaded, 0) if against is None else against)
    scored = []
    for share in wanted:
        runner = Switched(loaded, share)
        fidelity = Fidelity(dict(evaluate_texts(runner, tokenizer, texts, scoring, truth, wrap)))
        scored.append((runner, fidelity))
    paces = _paces(loaded, ids.to(loaded.device), wanted, decoding, wrap)
    return SkipCurve(
        points=tuple(
            _point(runner, fidelity, paces[runner.share], paces[0.0], runner.left_out / runner.routed)
            for runner, fidelity in scored
        ),
        against=str(reference or f"{model} with all experts"),
        tokens=sum(text.tokens for text in scored[0][1].texts.values()),
        decoding=decoding,
    )


def _sequence(parts: Sequence[Tensor], decoding: Decoding) -> Tensor:
    """Tokens to decode, [1, prompt + steps]. Raises AlphaQError if there are too few."""
    needed = decoding.prompt + decoding.steps
    ids = torch.cat([*parts], dim=1)[:, :needed] if parts else torch.empty(1, 0)
    if ids.shape[1] < needed:
        raise AlphaQError(
            f"The first text has {ids.shape[1]} tokens; {needed} are needed to time decoding. Give a longer text, or "
            "fewer --steps."
        )
    return ids


def _paces(model: Any, ids: Tensor, shares: Sequence[float], decoding: Decoding, wrap: Wrap) -> dict[float, list[Pace]]:
    """Every share's pace in every round; a first short one of each is not counted."""
    found: dict[float, list[Pace]] = {share: [] for share in shares}
    turns = [(turn, share) for turn in range(decoding.rounds + 1) for share in shares]
    for turn, share in wrap(turns, len(turns), "decode"):
        skip_experts(model, share)
        pace = _pace(model, ids if turn else ids[:, : decoding.prompt + 1], decoding.prompt)
        if turn:
            found[share].append(pace)
    skip_experts(model, 0)
    return found


@torch.inference_mode()
def _pace(model: Any, ids: Tensor, prompt: int) -> Pace:
    """Of the tokens [1, tokens] after a prompt of so many, one at a time."""
    out = model(ids[:, :prompt], use_cache=True)
    wall, cpu = _clock(model.device), time.process_time()
    for place in range(prompt, ids.shape[1]):
        out = model(ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
    steps = ids.shape[1] - prompt
    return Pace((_clock(model.device) - wall) / steps, (time.process_time() - cpu) / steps)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _point(
    runner: Switched, fidelity: Fidelity, paces: Sequence[Pace], whole: Sequence[Pace], left_out: float
) -> SkipPoint:
    texts = list(fidelity.texts.values())
    tokens = sum(text.tokens for text in texts)

    def mean(values: Iterator[float | None]) -> float:
        return sum((value or 0) * text.tokens for value, text in zip(values, texts, strict=True)) / tokens

    return SkipPoint(
        share=runner.share,
        left_out=left_out,
        kl=mean(text.kl for text in texts),
        top1=mean(text.top1 for text in texts),
        perplexity=fidelity.geomean_perplexity,
        tokens_per_s=1 / statistics.median(pace.wall_s for pace in paces),
        cpu_ms=1000 * statistics.median(pace.cpu_s for pace in paces),
        speedup=statistics.median(one.wall_s / own.wall_s for one, own in zip(whole, paces, strict=True)),
    )
