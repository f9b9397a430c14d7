"""Tokens to run through a GGUF model: windows that it writes itself, or windows of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alphaq.engines.gguf.library import Llama, last_of
from alphaq.engines.gguf.watching import NoNumber
from alphaq.errors import AlphaQError

Ids = NDArray[np.int32]


def own_windows(
    model: Llama, count: int, length: int, chance: np.random.Generator, token_done: Callable[[], object]
) -> Ids:
    """Windows that the model writes, int32 [count, length], side by side, one token after the other.

    Each begins with what the tokenizer puts before a text and, so that they differ, with a token drawn at random; each
    further token is drawn from the model's own probabilities.
    """
    first = random_windows(model, count, len(model.prefix) + 1, chance)
    logits = model.windows(first, last_of(first))
    written = [first]
    for place in range(first.shape[1], length):
        drawn = _drawn(logits, len(logits), chance)[:, None]
        written.append(drawn)
        if place + 1 < length:
            logits = model.step(drawn, place, last_of(drawn))
        token_done()
    return np.concatenate(written, axis=1)


def rewritten_windows(model: Llama, ids: Ids, chance: np.random.Generator) -> Ids:
    """The same at the price of one pass: every token of random windows is drawn anew after those before it.

    For files larger than memory, of which each pass reads every weight once.
    """
    keep = len(model.prefix) + 1
    wanted = np.ones(ids.shape, np.bool_)
    wanted[:, : keep - 1] = wanted[:, -1] = False
    model.run(ids, wanted)
    drawn = _drawn(model.rows(wanted), int(wanted.sum()), chance)
    return np.concatenate([ids[:, :keep], drawn.reshape(len(ids), -1)], axis=1)


def random_windows(model: Llama, count: int, length: int, chance: np.random.Generator) -> Ids:
    """What the tokenizer puts before a text and then any tokens, int32 [count, length]."""
    ids = chance.integers(model.vocab_size, size=(count, length), dtype=np.int32)
    ids[:, : len(model.prefix)] = model.prefix
    return ids


def text_windows(model: Llama, texts: Sequence[Path], length: int, most: int | None) -> Ids:
    """Whole windows of texts, int32 [windows, length], of each text alike `most` in all, or every one.

    Raises AlphaQError for a file that is no text, or too short for a window.
    """
    each = None if most is None else -(-most // len(texts))
    cut = np.concatenate([_cut(model, path, length, each) for path in texts])
    return cut[:most]


def _cut(model: Llama, path: Path, length: int, most: int | None) -> Ids:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AlphaQError(f"{path} is not UTF-8 text ({error}). Give one with --text.") from None
    ids, step = np.array(model.tokenize(text), np.int32), length - len(model.prefix)
    count = min(len(ids) // step, most or len(ids))
    if not count:
        raise AlphaQError(
            f"{path} has {len(ids)} tokens, less than a window of {step}. Give a longer text, or a shorter --window."
        )
    prefix = np.tile(np.array(model.prefix, np.int32), (count, 1))
    return np.concatenate([prefix, ids[: count * step].reshape(count, step)], axis=1)


def _drawn(logits: Iterable[NDArray[np.float32]], count: int, chance: np.random.Generator) -> Ids:
    """A token for each of so many rows of logits, by its probability. Row by row, since noise is float64.

    Raises NoNumber for logits that are none; minus infinity is one, of a token that never comes.
    """
    drawn = np.empty(count, np.int32)
    for place, row in enumerate(logits):
        if not np.isfinite(row.max()):
            raise NoNumber("in the logits")
        drawn[place] = (row + chance.gumbel(size=row.size)).argmax()
    return drawn
