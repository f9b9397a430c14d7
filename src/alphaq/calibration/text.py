"""What is run through a model to see what its matrices are used for: a user's text, or text of the model's own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from alphaq.calibration.tokens import model_prefix, random_windows, read_windows, rewritten, written
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import AlphaQError, PassError, StatsError
from alphaq.nouns.matrix import Role

SELF: Literal["self"] = "self"
WINDOW = 512  # tokens
MOST_HELD = 5 * 10**8  # weights of a model that writes token by token: 2 GB in float32
REWRITINGS = 1  # of random tokens; four made no difference (docs/research/log.md)


def check_ids(ids: Tensor, rows: int, where: str) -> None:
    """AlphaQError if a token has no row in the embedding, as where a tool added tokens without resizing the model."""
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= rows:
        raise AlphaQError(
            f"{where} has a token with the id {largest}, but the model's embedding has {rows} rows: its tokenizer has "
            "more tokens than the model. Leave that token out of the text, or give the model a row for it with "
            "resize_token_embeddings of transformers."
        )


@dataclass(frozen=True)
class Text:
    """The first `tokens` of a file, or as many of the model's own.

    bos: each window begins with what the model's tokenizer puts before a text, where it does.
    """

    source: Path | Literal["self"]
    tokens: int = 16_384
    bos: bool = True

    def __str__(self) -> str:
        """Tells texts apart by what they hold."""
        cut = f"{self.tokens} by {WINDOW}{'' if self.bos else ' without BOS'}"
        if isinstance(self.source, Path):
            return f"{hashlib.sha256(self.content().encode()).hexdigest()[:16]} {cut}"
        return f"{SELF} {cut}, {REWRITINGS} times"

    @property
    def name(self) -> str:
        """What to call it."""
        return self.source.name if isinstance(self.source, Path) else SELF

    def content(self) -> str:
        """The file's text. Raises StatsError if it is none."""
        assert isinstance(self.source, Path)  # the model's own is not written down
        try:
            return self.source.read_text(encoding="utf-8-sig")  # a mark of the byte order is no text
        except (OSError, UnicodeDecodeError) as error:
            raise StatsError(f"{self.source} is not UTF-8 text ({error}). Give one with --calibration.") from error

    def windows(self, checkpoint: Checkpoint) -> Tensor:
        """Token ids, int64 [windows, length], of WINDOW tokens or all in one.

        Raises as `read_windows` and `rewritten` do, and StatsError.
        """
        length = min(WINDOW, self.tokens)
        if isinstance(self.source, Path):
            ids = read_windows(checkpoint.folder, self.content(), length, self.tokens, self.bos)
            rows = [matrix.shape[0] for matrix in checkpoint.with_role(Role.EMBEDDING)]
            check_ids(ids, max(rows, default=int(checkpoint.text_config["vocab_size"])), str(self.source))
            return ids
        return own_writing(checkpoint, self.tokens // length, length, self.bos)


def writes(checkpoint: Checkpoint) -> bool:
    """Whether a model is small enough to be held while it writes token by token: no step must read it from disk."""
    return sum(matrix.parameters for matrix in checkpoint.matrices) <= MOST_HELD and checkpoint.store is None


def own_text(checkpoint: Checkpoint, windows: int, length: int, bos: bool = True) -> Tensor:
    """What the model writes by itself, int64 [windows, length]: token by token where it can; else random tokens that it
    rewrites, which are further from text."""
    prefix = model_prefix(checkpoint) if bos else ()
    if writes(checkpoint):
        try:
            return written(checkpoint, windows, length, prefix)
        except PassError:  # of a class that keeps nothing of earlier tokens
            pass
    return own_writing(checkpoint, windows, length, bos)


def own_writing(checkpoint: Checkpoint, windows: int, length: int, bos: bool = True) -> Tensor:
    """Tokens that stand for text the model would write, int64 [windows, length]: random ones, rewritten by it."""
    prefix = model_prefix(checkpoint) if bos else ()
    ids = random_windows(int(checkpoint.text_config["vocab_size"]), windows, length, prefix=prefix)
    for seed in range(REWRITINGS):
        ids = rewritten(checkpoint, ids, seed, max(1, len(prefix)))
    return ids
