"""Coded tensors wait in a file with room for each, and leave it whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.writer import Place
from alphaq.engines.export import Entry
from alphaq.errors import OutputError, VerificationError
from alphaq.formats.coding import encode_tensor
from alphaq.nouns.plan import Plan
from alphaq.pipeline import WriteOptions, quantize
from alphaq.writing import sinks
from contents import contents


def plan_of(source: Path) -> Plan:
    experts = open_checkpoint(source).planned
    return Plan(choices={matrix.name: "2g128" for matrix in experts}, config={"codec": "zstd"})


def interrupted(source: Path, out: Path) -> Path:
    """The file where coded tensors wait, of a run that was stopped when all were coded."""

    def fail(*_: object) -> None:
        raise OSError("No space left")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sinks, "create_file", fail)
        with pytest.raises(OutputError, match="No space left"):
            quantize(open_checkpoint(source), plan_of(source), out)
    return out.parent / f".{out.name}.partial" / sinks.SPOOL_NAME


@pytest.mark.parametrize("nbytes", [20, 1000, 100_000, 1 << 22])
def test_there_is_room_for_bytes_that_look_coded_and_cannot_be_made_smaller(nbytes: int) -> None:
    tensor = torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensor[:2] = torch.tensor(list(b"AZ"))
    coded = encode_tensor(tensor)
    assert coded.nbytes > nbytes
    assert coded.nbytes <= sinks._room(Entry("w", "w", None, (Place("file", 0, nbytes),), (("w", None),)))


def test_coded_tensors_take_no_more_space_than_they_have_bytes(tiny: Path, tmp_path: Path) -> None:
    spool = interrupted(tiny, tmp_path / "out")
    status = spool.stat()
    if status.st_blocks * 512 >= status.st_size:
        pytest.skip("this file system has no sparse files")
    done = quantize(open_checkpoint(tiny), plan_of(tiny), tmp_path / "out")
    assert status.st_blocks * 512 < 1.2 * done.size_bytes < status.st_size


def test_what_is_damaged_while_it_waits_is_coded_again(tiny: Path, tmp_path: Path) -> None:
    quantize(open_checkpoint(tiny), plan_of(tiny), tmp_path / "good")
    spool = interrupted(tiny, tmp_path / "out")
    data = bytearray(spool.read_bytes())
    data[1000:2000] = bytes(255 - byte for byte in data[1000:2000])
    spool.write_bytes(data)
    quantize(open_checkpoint(tiny), plan_of(tiny), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "good")
    assert {path.name for path in tmp_path.iterdir()} == {"good", "out"}


def test_what_is_damaged_between_coding_and_copying_is_named_and_not_published(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sinks.create_file

    def damaging(path: Path, header: bytes, nbytes: int) -> None:
        real(path, header, nbytes)
        with (path.parent.parent / sinks.SPOOL_NAME).open("r+b") as spool:
            spool.write(bytes(64))

    monkeypatch.setattr(sinks, "create_file", damaging)
    with pytest.raises(VerificationError, match="damaged on the disk while it waited"):
        quantize(open_checkpoint(tiny), plan_of(tiny), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_coded_files_are_compared_with_their_source(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    done = quantize(checkpoint, plan_of(tiny), tmp_path / "out")
    assert done.verified is not None and done.verified.against_source
    unchecked = quantize(checkpoint, plan_of(tiny), tmp_path / "unchecked", WriteOptions(check=False))
    assert unchecked.verified is None
    assert contents(tmp_path / "unchecked") == contents(tmp_path / "out")
