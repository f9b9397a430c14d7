"""What was measured once is not measured again: spectra and errors by matrix, one folder per checkpoint.

The folder's name is a digest of everything the numbers depend on: the weights' identity and the
version of the code that measures. Lines are appended as they are found, so a killed run loses none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from alphaq.errors import AlphaQError, JournalError
from alphaq.measuring.probes import PROBES
from alphaq.nouns.spectrum import Spectrum
from alphaq.work.journal import Journal

T = TypeVar("T")
MEASUREMENTS_NAME = "measurements.jsonl"
MEASUREMENT_VERSION = 10
"""Raise it whenever the same weights would be measured differently."""


@dataclass(frozen=True)
class Entry:
    """What one line of the journal holds: everything that was measured of a matrix at once.

    errors: by what they are called, with their standard errors. probes: the fields of each one's record, by its name.
    """

    name: str
    errors: dict[str, tuple[float, float]]
    spectrum: Spectrum | None = None
    variant: str = ""
    probes: dict[str, dict[str, float]] = field(default_factory=dict)


_ENTRY = TypeAdapter(Entry)


@dataclass(frozen=True)
class Known:
    """What has been measured, by the matrix' name and what it is of it: the variant, the kind of error, the probe.

    An error comes with its standard error, 0 where it is exact.
    """

    spectra: dict[tuple[str, str], Spectrum] = field(default_factory=dict)
    errors: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    probes: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)

    def learn(self, entry: Entry) -> None:
        """Take in what one journal line holds."""
        if entry.spectrum is not None:
            self.spectra[entry.name, entry.variant] = entry.spectrum
        self.errors.update({(entry.name, kind): error for kind, error in entry.errors.items()})
        for probe, record in entry.probes.items():
            if probe in PROBES and PROBES[probe].fits(record):
                self.probes[entry.name, probe] = record


class Cache:
    """Measurements of one checkpoint, kept in a folder. Raises JournalError if another process has it."""

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        key = json.dumps({"version": MEASUREMENT_VERSION, **identity}, sort_keys=True)
        self.folder = folder
        self.path = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
        self.known = Known()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self.path / MEASUREMENTS_NAME)
        except OSError as error:
            raise self._unusable(error) from None
        for line in self._journal.entries:
            with suppress(ValidationError):  # what is damaged is measured anew
                self.known.learn(_ENTRY.validate_python(line))
        self._journal.entries.clear()

    def _unusable(self, error: OSError) -> JournalError:
        return JournalError(
            f"The cache {self.folder} cannot be used ({error.strerror}). "
            "Set ALPHAQ_CACHE to another, or use --no-cache."
        )

    def add(self, entry: Entry) -> None:
        """Keep what was measured of one matrix."""
        try:
            self._journal.append(asdict(entry))
        except OSError as error:
            raise self._unusable(error) from None
        self.known.learn(entry)

    def recall(self, name: str, make: Callable[[], str], parse: Callable[[str], T]) -> T:
        """What `parse` makes of the text that lies under a name, which is made anew if it is missing or damaged."""

        def write(path: Path) -> None:
            made = make()
            try:
                path.write_text(made, encoding="utf-8")
            except OSError as error:
                raise self._unusable(error) from None

        return self.recall_file(name, write, lambda path: parse(path.read_text(encoding="utf-8")))

    def recall_file(self, name: str, write: Callable[[Path], object], read: Callable[[Path], T]) -> T:
        """The same of a file, which `write` makes at a path and `read` takes from one."""
        path = self.path / name
        if path.is_file():
            with suppress(AlphaQError, UnicodeDecodeError):
                return read(path)
        unfinished = path.with_suffix(".partial")
        write(unfinished)
        try:
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError as error:
            raise self._unusable(error) from None
        return read(path)

    def close(self) -> None:
        """Let other processes use the cache."""
        self._journal.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
