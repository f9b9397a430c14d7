"""Run a GGUF model of any architecture on tokens and gather what every weight sees, in bounded memory.

The file is memory-mapped and may be larger than memory. As many windows as memory allows are one batch, so that each
expert is read once a batch. Logits are asked of as many tokens as memory allows, evenly spread, since llama.cpp leaves
tokens without logits out of the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from alphaq.checkpoint.files import memory_bytes
from alphaq.checkpoint.gguf.format import GgufFile, read_gguf
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.engines.gguf.apart import Wrap, run_apart
from alphaq.engines.gguf.library import Llama, Running, no_number
from alphaq.engines.gguf.passes import Layers, Passing, Seen
from alphaq.engines.gguf.watching import NoNumber, Watch
from alphaq.engines.gguf.windows import Ids, own_windows, random_windows, rewritten_windows, text_windows
from alphaq.errors import AlphaQError

PASS_BYTES, PASS_SHARE = 2 << 30, 4  # of memory: intermediate values and the KV cache of a batch, at most
LOGIT_BYTES, LOGIT_SHARE = 1 << 30, 8
WRITTEN_BYTES = 8 << 30
"""Of a larger file every token written would take too long. By the file alone, so that any machine does the same."""
MOST_LAYERS = 10_000
MOST_WINDOWS = 256  # sequences that llama.cpp takes side by side
SIDE_BY_SIDE = 64  # windows that are written at a time
USUAL_WINDOW = 256
FEWEST_TOKENS, MOST_TOKENS = 4096, 65_536
TOKENS_OF_EXPERT = 256  # on average
MOST_OF_A_SIZE = 1 << 24
"""Sizes come from a file that anybody may have written, and only decide how much is done at a time."""

P = TypeVar("P", bound=Watch)

Way = Literal["text", "written", "rewritten"]
"""Where tokens come from: files; the model, token by token; the model, in one pass over random tokens."""


@dataclass(frozen=True)
class Sample:
    """Which tokens a model is run on. texts: files, or none for its own writing. tokens: None for enough, or for all
    of the texts. window: tokens seen together. bos: whether windows begin with what the tokenizer puts before a text.
    """

    texts: tuple[Path, ...] = ()
    tokens: int | None = None
    window: int = USUAL_WINDOW
    seed: int = 0
    bos: bool = True


@dataclass(frozen=True)
class Gathered:
    """What was seen of tokens int32 [windows, length]."""

    seen: Seen
    ids: Ids
    way: Way


@dataclass(frozen=True)
class _Sizes:
    """Of a model: what memory and the number of tokens depend on."""

    layers: int
    hidden: int
    widest: int  # what a token's feed-forward computes at a time
    heads: int
    key_values: int  # of a layer, for one token
    experts: int
    used: int
    vocabulary: int
    context: int  # tokens that it was trained with, 0 where the file does not say

    @classmethod
    def of(cls, file: GgufFile) -> _Sizes:
        """From the metadata; what is not there counts little."""
        family = file.metadata["general.architecture"].value if "general.architecture" in file.metadata else ""

        def most(key: str, default: int = 1) -> int:
            return _most(file.metadata.get(f"{family}.{key}"), default)

        hidden, heads, used = most("embedding_length"), most("attention.head_count"), most("expert_used_count")
        shared = hidden // max(heads, 1)
        keys, values = most("attention.key_length", shared), most("attention.value_length", shared)
        feed = max(used * most("expert_feed_forward_length", 0), most("feed_forward_length", 0))
        return cls(
            layers=min(most("block_count"), MOST_LAYERS),
            hidden=hidden,
            widest=3 * feed + 2 * used * hidden,
            heads=heads,
            key_values=most("attention.head_count_kv", heads) * (keys + values),
            experts=most("expert_count"),
            used=max(used, 1),
            vocabulary=_length(file.metadata.get("tokenizer.ggml.tokens")) or most("vocab_size", 1 << 18),
            context=most("context_length", 0),
        )

    def token_bytes(self, window: int) -> int:
        """Float32 values that a token of a batch takes, about, in bytes: what a layer computes, and what is kept."""
        computed = self.widest + 2 * self.heads * window + 8 * self.hidden
        return 4 * max(1, computed + self.layers * self.key_values)

    @property
    def outputs(self) -> int:
        """Tokens whose logits may be held at a time."""
        return max(1, _share(LOGIT_BYTES, LOGIT_SHARE) // (4 * self.vocabulary))

    @property
    def enough_tokens(self) -> int:
        """So that experts see some hundred tokens each."""
        return min(max(FEWEST_TOKENS, TOKENS_OF_EXPERT * self.experts // self.used), MOST_TOKENS)


def _most(value: GgufValue | None, default: int) -> int:
    """The largest of a whole number, or of one for each layer; between 0 and what no model has."""
    if value is None or "int" not in (value.element or value.type):
        return default
    numbers = value.value if isinstance(value.value, tuple) else (value.value,)
    return int(np.clip(max((int(number) for number in numbers), default=default), 0, MOST_OF_A_SIZE))


def _length(value: GgufValue | None) -> int:
    return 0 if value is None or value.element is None else int.from_bytes(value.raw[4:12], "little")


def _share(most: int, share: int) -> int:
    """Bytes that may be taken: so many, or one in `share` of those that there are."""
    return min(most, memory_bytes() // share or most)


@dataclass(frozen=True)
class Runs:
    """A file with how it is run. shown: tells how far it is. bos: as in `Sample`."""

    path: Path
    nbytes: int
    sizes: _Sizes
    threads: int
    shown: Wrap
    bos: bool

    @classmethod
    def of(cls, path: Path, threads: int, shown: Wrap, bos: bool) -> Runs:
        """Of a file, or any part of one. Raises CheckpointError."""
        file = read_gguf(path)
        nbytes = sum((file.folder / part).stat().st_size for part in file.files)
        return cls(file.folder / file.files[0], nbytes, _Sizes.of(file), threads, shown, bos)

    @property
    def is_written(self) -> bool:
        """Whether the file is small enough to be read again and again."""
        return self.nbytes <= WRITTEN_BYTES

    def model(self, windows: int, length: int, outputs: int, watch: Watch | None = None) -> Llama:
        """The model with room for so many windows."""
        return Llama(self.path, length, self.threads, windows, Running(watch, outputs, mapped=True, bos=self.bos))


def gather_apart(path: Path, sample: Sample, threads: int, shown: Wrap) -> Gathered:
    """`gather` in a process of its own. Raises LlamaError also where llama.cpp ends it."""
    return run_apart(path, gather, path, sample, threads, shown=shown)


def gather(path: Path, sample: Sample, threads: int, shown: Wrap) -> Gathered:
    """Run a GGUF file, or any part of one, on a sample. The same for the same file, sample and processor, where
    memory is the same or enough.

    Raises LlamaError where llama.cpp refuses, CheckpointError for a damaged file, AlphaQError for texts.
    """
    runs = Runs.of(path, threads, shown, sample.bos)
    way: Way = "text" if sample.texts else "written" if runs.is_written else "rewritten"
    ids = tokens_for(runs, sample, way)
    seen = watched(runs, ids, Passing).seen
    if not seen.moments:
        raise AlphaQError(f"llama.cpp computes no product with a weight of {path.name}. Is it a language model?")
    return Gathered(seen, ids, way)


def tokens_for(runs: Runs, sample: Sample, way: Way) -> Ids:
    """Tokens to run.

    Raises LlamaError naming the first weight that meets NaN, where the model cannot write; AlphaQError for windows
    longer than those that it was trained with.
    """
    if 0 < runs.sizes.context < sample.window:
        if sample.window != USUAL_WINDOW:
            raise AlphaQError(
                f"{runs.path.name} was trained with {runs.sizes.context} tokens at a time, fewer than a window of "
                f"{sample.window}. Give --window {runs.sizes.context}."
            )
        sample = replace(sample, window=runs.sizes.context)
    try:
        return {"text": _texts, "written": _written, "rewritten": _rewritten}[way](runs, sample)
    except NoNumber as seen:
        with runs.model(1, sample.window, 1) as model:
            ids = random_windows(model, 1, sample.window, np.random.default_rng(sample.seed))
        watched(runs, ids, Passing)
        raise no_number(runs.path, str(seen)) from None


def _texts(runs: Runs, sample: Sample) -> Ids:
    with runs.model(1, sample.window, 1) as model:
        _check(model, sample)
        most = None if sample.tokens is None else -(-sample.tokens // sample.window)
        return text_windows(model, sample.texts, sample.window, most)


def _written(runs: Runs, sample: Sample) -> Ids:
    """The model's own writing, as many windows side by side as may be."""
    chance = np.random.Generator(np.random.PCG64(sample.seed))
    groups = _groups(_count(runs, sample), min(SIDE_BY_SIDE, _side_by_side(runs, sample.window)))
    with (
        runs.model(groups[0], sample.window, groups[0]) as model,
        _steps(runs.shown, len(groups) * sample.window, "writing") as step,
    ):
        _check(model, sample)
        return np.concatenate([own_windows(model, count, sample.window, chance, step) for count in groups])


def _rewritten(runs: Runs, sample: Sample) -> Ids:
    """Random tokens, rewritten by the model once, in batches whose logits fit."""
    chance = np.random.Generator(np.random.PCG64(sample.seed))
    most = min(_side_by_side(runs, sample.window), max(1, runs.sizes.outputs // sample.window))
    groups = _groups(_count(runs, sample), most)
    with (
        _steps(runs.shown, len(groups) * runs.sizes.layers, "writing") as step,
        runs.model(groups[0], sample.window, groups[0] * sample.window, Layers(step)) as model,
    ):
        _check(model, sample)
        blank = [random_windows(model, count, sample.window, chance) for count in groups]
        return np.concatenate([rewritten_windows(model, ids, chance) for ids in blank])


def watched(runs: Runs, ids: Ids, watch: Callable[[Callable[[], object]], P], most: int = MOST_TOKENS) -> P:
    """A watch that has seen these tokens pass. most: of so many at most are logits computed.

    Raises LlamaError, also for what the watch says is NaN or infinite.
    """
    count, length = ids.shape
    groups = np.split(ids, np.cumsum(_groups(count, _side_by_side(runs, length)))[:-1])
    outputs = min(runs.sizes.outputs, groups[0].size, most)
    with _steps(runs.shown, len(groups) * runs.sizes.layers, "gathering") as step:
        seen = watch(step)
        try:
            with runs.model(len(groups[0]), length, outputs, seen) as model:
                for part in groups:
                    model.run(part, _spread(part, outputs))
        except NoNumber as where:
            raise no_number(runs.path, str(where)) from None
    return seen


def _check(model: Llama, sample: Sample) -> None:
    if sample.window <= len(model.prefix) + 1:
        raise AlphaQError(f"A window of {sample.window} tokens has no room for text. Give --window 256.")


def _count(runs: Runs, sample: Sample) -> int:
    return max(1, (sample.tokens or runs.sizes.enough_tokens) // sample.window)


def _side_by_side(runs: Runs, window: int) -> int:
    """Windows of a batch that memory allows."""
    return int(np.clip(_share(PASS_BYTES, PASS_SHARE) // (window * runs.sizes.token_bytes(window)), 1, MOST_WINDOWS))


def _groups(count: int, most: int) -> list[int]:
    """A number cut into parts of at most `most`, the largest first, as equal as can be."""
    parts = -(-count // most)
    return [count // parts + (number < count % parts) for number in range(parts)]


def _spread(ids: Ids, most: int) -> NDArray[np.bool_]:
    """At most so many of the tokens, bool [windows, tokens], evenly spread."""
    places = np.linspace(0, ids.size - 1, min(most, ids.size)).round().astype(int)
    wanted = np.zeros(ids.size, np.bool_)
    wanted[places] = True
    return wanted.reshape(ids.shape)


@contextmanager
def _steps(shown: Wrap, total: int, label: str) -> Iterator[Callable[[], object]]:
    """A function that is called after each of so many steps."""
    bar = iter(shown(range(total), total, label))
    next(bar, None)
    try:
        yield lambda: next(bar, None)
    finally:
        for _ in bar:  # closes it
            pass
