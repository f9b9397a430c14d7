"""What tells a model's files from others of the same names and shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from alphaq.checkpoint.files import CHUNK_BYTES, PlainFile, SourceFile, is_file

SAMPLES, SAMPLE_BYTES = 16, 4096  # of a weight file, to recognise it by
SETTINGS_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def digest_of(file: SourceFile, nbytes: int) -> str:
    """Of all bytes of a weight file."""
    return _digest(file, nbytes, range(0, nbytes, CHUNK_BYTES), CHUNK_BYTES)


def digest_of_samples(file: SourceFile, nbytes: int) -> str:
    """Of a few bytes here and there."""
    return _digest(file, nbytes, range(0, nbytes, max(SAMPLE_BYTES, nbytes // SAMPLES)), SAMPLE_BYTES)


def _digest(file: SourceFile, nbytes: int, places: Iterable[int], piece: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for begin in places:
        digest.update(file.read(begin, min(piece, nbytes - begin)).numpy().data)
    return digest.hexdigest()


def settings_digest(folder: Path) -> str:
    """Of config and tokenizer, which decide what a forward pass computes beside the weights."""
    digest = hashlib.sha256()
    for name in SETTINGS_FILES:
        path = folder / name
        digest.update(f"{name} {is_file(path)}".encode())
        if is_file(path):
            for piece in PlainFile(path).chunks(0, path.stat().st_size):
                digest.update(piece)
    return digest.hexdigest()
