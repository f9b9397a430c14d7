"""Perplexity on a text, and how far a model's distribution is from a reference's.

Per predicted token, with p the reference's distribution and q the model's: KL = Σ p ln(p/q) in nats,
top-1 agreement, and the expected acceptance rate EAR = Σ min(p, q), the chance that a token drawn
from q would be accepted as one from p (SLQ). The interval treats windows as the independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alphaq.calibration.text import check_ids
from alphaq.calibration.tokens import prefixed, text_prefix
from alphaq.errors import AlphaQError
from alphaq.nouns.fidelity import TextFidelity
from alphaq.nouns.scoring import Scoring
from alphaq.work.workers import Wrap, silent

WINDOWS_AT_ONCE = 8  # of one forward pass: small models are slow on many small steps
LOGITS_AT_ONCE = 1 << 25
POSITIONS_AT_ONCE = 128  # bounds the float32 copies of [positions, vocabulary]
POSITIONS_BY_A_READING = 256  # of a head on disk, which is read once for so many


@dataclass(frozen=True)
class WindowScore:
    """Sums over one window's predicted tokens. kl_by_token: float32 [tokens], empty without a reference."""

    tokens: int
    negative_log_likelihood: float
    kl: float = 0.0
    top1: float = 0.0
    ear: float = 0.0
    reference_negative_log_likelihood: float = 0.0
    kl_by_token: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32), compare=False, repr=False)

    @property
    def sums(self) -> tuple[float, ...]:
        """All but the values of single tokens, in order."""
        return (
            self.tokens,
            self.negative_log_likelihood,
            self.kl,
            self.top1,
            self.ear,
            self.reference_negative_log_likelihood,
        )


@dataclass(frozen=True)
class Windows:
    """Token ids [1, length] of consecutive windows. context: how many of each are given, not scored."""

    parts: list[torch.Tensor]
    context: int


def windows(
    tokenizer: Any, text: str, length: int, max_tokens: int | None, skip_tokens: int = 0, bos: bool = True
) -> Windows:
    """A text cut into windows of at most `length` tokens; a rest without a token to score is left out.

    bos: each begins with what the tokenizer puts before a text (BOS), where it does, as in llama.cpp and lm-eval; all
    of the text is scored then. Otherwise the first token of each window is context.
    """
    prefix = text_prefix(tokenizer)[: length - 1] if bos else ()
    ids = tokenizer(text, return_tensors="pt", verbose=False, add_special_tokens=False)["input_ids"]
    ids = ids.long()[:, skip_tokens:][:, :max_tokens]
    context = max(1, len(prefix))
    parts = [prefixed(part, prefix) for part in ids.split(length - len(prefix), dim=1)]
    return Windows([part for part in parts if part.shape[1] > context], context)


def window_beginning(tokenizer: Any, bos: bool = True) -> str:
    """What each window begins with, in words; empty if nothing is put before it."""
    prefix = text_prefix(tokenizer) if bos else ()
    return str(tokenizer.decode(list(prefix))) if prefix else ""


@torch.inference_mode()
def score_windows(model: Any, reference: Any | None, ids: torch.Tensor, context: int = 1) -> list[WindowScore]:
    """Score every token but the first `context` of each window [windows, length], given those before it."""
    logits = model(ids.to(model.device)).logits
    against = None if reference is None else reference(ids.to(reference.device)).logits
    return [_scored(logits, against, place, window[context:], context - 1) for place, window in enumerate(ids)]


def _scored(
    logits: Any, against: Any | None, window: int, targets: torch.Tensor, first: int, step: int = POSITIONS_AT_ONCE
) -> WindowScore:
    """One window's score from logits [windows, positions, vocabulary] of the model and the reference.

    targets: what came [tokens], of which position `first` expects the first. step: positions whose logits are held.
    """
    loss = top1 = ear = reference_loss = 0.0
    divergences: list[torch.Tensor] = []
    for start in range(0, len(targets), step):
        came = targets[start : start + step, None]
        part = slice(first + start, first + start + len(came))
        log_q = logits[window, part].float().log_softmax(-1)
        loss -= float(log_q.gather(1, came.to(log_q.device)).sum(dtype=torch.float64))
        if against is not None:
            log_p = against[window, part].to(log_q.device).float().log_softmax(-1)
            reference_loss -= float(log_p.gather(1, came.to(log_p.device)).sum(dtype=torch.float64))
            p, q = log_p.exp(), log_q.exp()
            divergences.append(log_p.sub_(log_q).mul_(p).sum(-1, dtype=torch.float64).cpu())
            top1 += float((p.argmax(-1) == q.argmax(-1)).sum())
            ear += float(torch.minimum(p, q).sum(dtype=torch.float64))
    kl = torch.cat(divergences) if divergences else torch.zeros(0, dtype=torch.float64)
    return WindowScore(len(targets), loss, float(kl.sum()), top1, ear, reference_loss, kl.float().numpy())


def batches(parts: list[torch.Tensor], vocabulary: int) -> list[torch.Tensor]:
    """Windows [1, length] put together to [windows, length] where lengths agree and the logits stay small."""
    groups: list[torch.Tensor] = []
    for part in parts:
        room = LOGITS_AT_ONCE // (part.shape[1] * vocabulary)
        if groups and groups[-1].shape[1] == part.shape[1] and len(groups[-1]) < min(room, WINDOWS_AT_ONCE):
            groups[-1] = torch.cat([groups[-1], part])
        else:
            groups.append(part)
    return groups


def summarize_windows(scores: list[WindowScore], with_reference: bool) -> TextFidelity:
    """Means over tokens, and a 95 % interval for perplexity from the spread between windows."""
    tokens = sum(score.tokens for score in scores)
    mean = sum(score.negative_log_likelihood for score in scores) / tokens
    deviations = [score.negative_log_likelihood - mean * score.tokens for score in scores]
    count = len(scores)
    error = math.sqrt(sum(d * d for d in deviations) * count / (count - 1)) / tokens if count > 1 else math.inf
    reach = error * student_quantile(count - 1) if count > 1 else math.inf
    kl = np.concatenate([score.kl_by_token for score in scores])
    return TextFidelity(
        perplexity=math.exp(mean),
        perplexity_interval=(math.exp(mean - reach), math.exp(min(mean + reach, 700.0))),
        tokens=tokens,
        kl=sum(score.kl for score in scores) / tokens if with_reference else None,
        top1=sum(score.top1 for score in scores) / tokens if with_reference else None,
        ear=sum(score.ear for score in scores) / tokens if with_reference else None,
        kl_median=float(np.median(kl)) if kl.size else None,
        kl_p99=float(np.quantile(kl, 0.99)) if kl.size else None,
    )


def student_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t: few windows say little (Cornish–Fisher; within 1 % from 4 degrees on)."""
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """Text files by stem (by full path where stems collide). Raises AlphaQError naming the file."""
    stems = [path.stem for path in paths]
    texts = {}
    for path in paths:
        try:
            content = path.read_text(encoding="utf-8-sig")  # a mark of the byte order is no text
        except (OSError, UnicodeDecodeError) as error:
            raise AlphaQError(f"Cannot read text {path} ({error}). Give a UTF-8 text file.") from None
        texts[path.stem if stems.count(path.stem) == 1 else str(path)] = content
    return texts


def score_texts(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, str],
    scoring: Scoring,
    reference: Any | None = None,
    wrap: Wrap = silent,
) -> Iterator[tuple[str, list[WindowScore]]]:
    """Scores per text, window by window. texts: contents by name, which stand for those of `scoring`.

    `wrap` may show progress. Raises AlphaQError if no token to score is left of a text.
    """
    cuts = {name: _cut(model, tokenizer, name, text, scoring) for name, text in texts.items()}
    if any(layers_of(one) for one in (model, reference)):
        yield from _score_layer_by_layer(model, reference, cuts, wrap)
        return
    rows = model.config.get_text_config().vocab_size
    for name, cut in cuts.items():
        groups = batches(cut.parts, rows)
        shown = wrap(groups, len(groups), f"evaluate {name}")
        yield name, [score for ids in shown for score in score_windows(model, reference, ids, cut.context)]


def _cut(model: Any, tokenizer: Any, name: str, text: str, scoring: Scoring) -> Windows:
    """A text's windows. Raises AlphaQError if there are none, or the model does not know one of its tokens."""
    length = min(scoring.window, getattr(model.config, "max_position_embeddings", None) or scoring.window)
    cut = windows(tokenizer, text, length, scoring.max_tokens, scoring.skip_tokens, scoring.bos)
    if not cut.parts:
        raise AlphaQError(f"Text {name!r} has fewer than two tokens to score. Give a longer text.")
    for part in cut.parts:
        check_ids(part, model.config.get_text_config().vocab_size, f"Text {name!r}")
    return cut


def layers_of(model: Any) -> int:
    """How many layers a model is run by, one after the other from disk; 0 if it is in memory, or there is none."""
    return getattr(model, "layers", 0)


def _score_layer_by_layer(
    model: Any, reference: Any | None, cuts: Mapping[str, Windows], wrap: Wrap
) -> Iterator[tuple[str, list[WindowScore]]]:
    """Scores of all texts, with as many windows at once as there is room for: each pass reads the whole model.

    Windows of one length go together, whatever text they are of. None is filled up: not every class keeps tokens from
    seeing those after them (DeepSeek-V3.2's choice of tokens does not).
    """
    parts = [part for cut in cuts.values() for part in cut.parts]
    context = next(iter(cuts.values())).context
    streamed: list[Any] = [one for one in (model, reference) if layers_of(one)]
    groups = _alike(parts, lambda length: min(one.windows_at_once(length) for one in streamed))
    layers = sum({id(one): layers_of(one) for one in streamed}.values())
    done = iter(wrap(range(total := len(groups) * layers + len(parts)), total, "evaluate"))
    tick = partial(next, done, None)  # what is remembered is not run, so that they may end early
    scores: dict[int, WindowScore] = {}
    for group in groups:
        ids = torch.cat([parts[number] for number in group])
        logits = _logits(model, ids, tick)
        against = None if reference is None else _logits(reference, ids, tick)
        for place, number in enumerate(group):
            came = ids[place, context:]
            scores[number] = _scored(logits, against, place, came, context - 1, POSITIONS_BY_A_READING)
            tick()
    for _ in done:
        pass
    numbers = iter(range(len(parts)))
    for name, cut in cuts.items():
        yield name, [scores[next(numbers)] for _ in cut.parts]


def _alike(parts: Sequence[torch.Tensor], most: Callable[[int], int]) -> list[list[int]]:
    """Numbers of windows [1, length] that may go together: of one length, the longest first, and at most so many."""
    groups = []
    for length in sorted({part.shape[1] for part in parts}, reverse=True):
        numbers = [number for number, part in enumerate(parts) if part.shape[1] == length]
        step = most(length)
        groups += [numbers[first : first + step] for first in range(0, len(numbers), step)]
    return groups


def _logits(model: Any, ids: torch.Tensor, tick: Callable[[], object]) -> Any:
    """Logits by a window's number and a slice of positions: of a model in memory, one window's at a time."""
    return model(ids, tick).logits if layers_of(model) else _WindowByWindow(model, ids)


class _WindowByWindow:
    """Logits of a model in memory, which is run when a window's are first asked for; the last window's are kept."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self._model, self._ids = model, ids
        self._kept: tuple[int, Any] = -1, None

    def __getitem__(self, place: tuple[int, slice]) -> torch.Tensor:
        window, positions = place
        if window != self._kept[0]:
            ids = self._ids[window : window + 1].to(self._model.device)
            with torch.inference_mode():
                self._kept = window, self._model(ids).logits[0]
        found: torch.Tensor = self._kept[1][positions]
        return found


class Remembered:
    """A reference model that runs each window once: its logits are kept, or what they are made of, up to a limit of
    bytes."""

    def __init__(self, model: Any, limit_bytes: int = 2 << 30) -> None:
        self._model, self._room = model, limit_bytes
        self._kept: dict[bytes, Any] = {}
        self.device, self.config, self.layers = model.device, model.config, layers_of(model)

    def __call__(self, ids: torch.Tensor, *tick: Callable[[], object]) -> Any:
        key = ids.cpu().numpy().tobytes()
        if key not in self._kept:
            logits = self._model(ids, *tick).logits
            if logits.nbytes > self._room:
                return SimpleNamespace(logits=logits)
            self._room -= logits.nbytes
            self._kept[key] = logits
        return SimpleNamespace(logits=self._kept[key])

    def windows_at_once(self, length: int) -> int:
        """See `StreamedModel`."""
        found: int = self._model.windows_at_once(length)
        return found


@dataclass(frozen=True)
class PairedDifference:
    """How much a model's perplexity lies above another's on the same windows, as a ratio − 1, with a 95 % interval."""

    ratio: float
    interval: tuple[float, float]


def paired_bootstrap(
    scores: Mapping[str, list[WindowScore]], against: Mapping[str, list[WindowScore]], draws: int = 2000
) -> PairedDifference:
    """Ratio − 1 of geometric mean perplexities over texts, resampling each text's windows in pairs (fixed seed).

    Pairing removes what both models find hard alike, so small differences show on few windows.
    """
    generator = np.random.default_rng(0)
    centre, samples = 0.0, np.zeros(draws)
    for name, own in scores.items():
        tokens = np.array([score.tokens for score in own], dtype=float)
        loss = [score.negative_log_likelihood for score in own]
        other = [score.negative_log_likelihood for score in against[name]]
        difference = np.subtract(loss, other)
        centre += difference.sum() / tokens.sum()
        picks = generator.integers(0, len(own), (draws, len(own)))
        samples += difference[picks].sum(axis=1) / tokens[picks].sum(axis=1)
    low, high = np.quantile(np.expm1(samples / len(scores)), [0.025, 0.975])
    return PairedDifference(math.expm1(centre / len(scores)), (float(low), float(high)))


def evaluate_texts(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, str],
    scoring: Scoring,
    reference: Any | None = None,
    wrap: Wrap = silent,
) -> Iterator[tuple[str, TextFidelity]]:
    """Fidelity per text, as `score_texts` finds it."""
    for name, scores in score_texts(model, tokenizer, texts, scoring, reference, wrap):
        yield name, summarize_windows(scores, reference is not None)
