"""Where the entries of an output go: at once to their places, or coded, which shows how long each is, and then there.

Either way workers write what they have made themselves, and what an interrupted run has written is found again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from alphaq.checkpoint.safetensors_format import TensorSpec
from alphaq.checkpoint.writer import Place, create_file, pieces_at, write_at
from alphaq.engines.export import Entry, Layout
from alphaq.errors import PlanError, VerificationError
from alphaq.writing.coded import CodedLayout, laid_out, say_codec, spec_at
from alphaq.writing.storing import StoreTask, Written

SPOOL_NAME = "coded"
"""File in the folder of an unfinished run where coded tensors wait."""


class Sink(Protocol):
    """Takes entries, in any order, and puts together what came of them.

    task: the same task, going here. finish: (what was written, by entry) → the layout of the finished files, which lie
    in the output's folder then. describe: what the output's other files have to say of it.
    """

    def task(self, task: StoreTask) -> StoreTask: ...

    def finish(self, written: Mapping[str, Written]) -> Layout: ...

    def describe(self) -> None: ...


@dataclass(frozen=True)
class InPlace:
    """Files whose sizes are known: each entry goes to its place."""

    folder: Path
    layout: Layout

    @classmethod
    def open(cls, folder: Path, layout: Layout) -> InPlace:
        """Files of their final sizes; those that are there keep their data."""
        for file, (header, nbytes) in layout.files.items():
            create_file(folder / file, header, nbytes)
        return cls(folder, layout)

    def task(self, task: StoreTask) -> StoreTask:
        """To its own places."""
        return replace(task, folder=self.folder)

    def finish(self, written: Mapping[str, Written]) -> Layout:
        """All is there."""
        return self.layout

    def describe(self) -> None:
        """Nothing: the engine says it all."""


@dataclass(frozen=True)
class Coded:
    """Entries are coded into a file with room for each, and copied out of it once all sizes are known.

    slots: room for each entry, a little more than its plain bytes; what is not filled takes no space on the disk.
    specs: dtype and shape of each entry's one tensor. most_bytes: what the files may take, None for any.
    """

    folder: Path
    layout: Layout
    codec: str
    slots: dict[str, Place]
    specs: dict[str, TensorSpec]
    most_bytes: int | None

    @classmethod
    def open(cls, folder: Path, layout: Layout, codec: str, most_bytes: int | None) -> Coded:
        """For an unfinished run's folder. What was coded into the file before stays."""
        plain = laid_out(layout)
        slots, begin = {}, 0
        for entry in layout.entries:
            slots[entry.name] = Place(SPOOL_NAME, begin, _room(entry))
            begin += slots[entry.name].nbytes
        specs = {entry.name: spec_at(plain[tensor], index) for entry in layout.entries for tensor, index in entry.parts}
        spool = folder.parent / SPOOL_NAME
        spool.touch()
        os.truncate(spool, begin)
        return cls(folder, layout, codec, slots, specs, most_bytes)

    def task(self, task: StoreTask) -> StoreTask:
        """Coded into its slot."""
        entry = replace(task.entry, places=(self.slots[task.entry.name],))
        return replace(task, folder=self.folder.parent, entry=entry, specs=(self.specs[entry.name],), codes=True)

    def finish(self, written: Mapping[str, Written]) -> Layout:
        """Lay the files out and fill them. Raises PlanError if they take more than they may."""
        files: dict[str, dict[str, TensorSpec]] = {file: {} for file in self.layout.files}
        for entry in self.layout.entries:
            coded = written[entry.name].coded
            assert coded is not None  # every task came by `task`
            files[entry.places[0].file][entry.parts[0][0]] = coded
        final = CodedLayout.of(files)
        if self.most_bytes is not None and final.size_bytes > self.most_bytes:
            raise PlanError(
                f"Coded, the files take {final.size_bytes} bytes, more than the {self.most_bytes} that the plan "
                "promises: it was made with another zstandard. Plan again here, or raise the budget, and add --restart."
            )
        for file, (header, nbytes) in final.files.items():
            create_file(self.folder / file, header, nbytes)
        whole = final.of_entries(self.layout)
        for entry in whole.entries:
            slot = replace(self.slots[entry.name], nbytes=entry.places[0].nbytes)
            digest = write_at(self.folder, entry.places, pieces_at(self.folder.parent, [slot]))
            if digest != written[entry.name].record.blake2b:
                raise VerificationError(f"{entry.name} was damaged on the disk while it waited. Repeat the command.")
        return whole

    def describe(self) -> None:
        """The config names the codec."""
        say_codec(self.folder / "config.json", self.codec, self.folder / "config.json")


def _room(entry: Entry) -> int:
    """Bytes that the one tensor of an entry may take once coded; only one that looks coded already becomes longer."""
    nbytes = entry.places[0].nbytes
    return nbytes + nbytes // 64 + (1 << 12)
