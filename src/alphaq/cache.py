"""What was measured once is not measured again: spectra and errors by matrix, one folder per checkpoint.

The folder's name is a digest of everything the numbers depend on: the weights' identity and the
version of the code that measures. Lines are appended as they are found, so a killed run loses none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from alphaq.errors import JournalError
from alphaq.journal import Journal
from alphaq.records import Choice, Spectrum

MEASUREMENT_VERSION = 1
"""Raise it whenever the same weights would be measured differently."""


class Cache:
    """Spectra by matrix name, and squared errors by matrix name and choice. Raises JournalError if in use."""

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        key = json.dumps({"version": MEASUREMENT_VERSION, **identity}, sort_keys=True)
        self.folder = folder
        path = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(path / "measurements.jsonl")
        except OSError as error:
            raise self._unusable(error) from None
        self.spectra: dict[str, Spectrum] = {}
        self.errors: dict[tuple[str, str], float] = {}
        for entry in self._journal.entries:
            if entry.get("spectrum"):
                self.spectra[entry["name"]] = Spectrum(**entry["spectrum"])
            self.errors.update({(entry["name"], key): value for key, value in entry["errors"].items()})

        self._journal.entries.clear()

    def _unusable(self, error: OSError) -> JournalError:
        return JournalError(
            f"The cache {self.folder} cannot be used ({error.strerror}). "
            "Set ALPHAQ_CACHE to another, or use --no-cache."
        )

    def add(self, name: str, spectrum: Spectrum | None, errors: Mapping[Choice, float]) -> None:
        """Keep what was measured of one matrix."""
        entry = {
            "name": name,
            "spectrum": None if spectrum is None else asdict(spectrum),
            "errors": {str(choice): error for choice, error in errors.items()},
        }
        try:
            self._journal.append(entry)
        except OSError as error:
            raise self._unusable(error) from None
        if spectrum is not None:
            self.spectra[name] = spectrum
        self.errors.update({(name, str(choice)): error for choice, error in errors.items()})

    def close(self) -> None:
        """Let other processes use the cache."""
        self._journal.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
