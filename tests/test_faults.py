"""When something goes wrong: nothing lost, nothing damaged published, one line of error, and the same command resumes.

The short, repeatable version of `scripts/faults.py`, and the few faults that have one moment only.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaq.checkpoint import writer
from alphaq.checkpoint.files import PlainFile
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import CheckpointError, JournalError
from alphaq.work.journal import Journal
from alphaq.writing import quantizing, storing
from injection import (
    CACHE_LOCKED,
    CLOCK,
    CUT,
    FAULTS_IN_PROCESSES,
    FILE_LIMIT,
    IN_PROCESSES,
    INTERRUPT,
    JOBS,
    KILL,
    OUTPUT_LOCKED,
    READ_ERROR,
    REWRITE,
    SMALL_DISK,
    TERMINATE,
    TWO_RUNS,
    UNREADABLE,
    Bench,
    Fault,
    Job,
    Moment,
    Place,
    inject,
    run,
)
from runnable import save_runnable

if not hasattr(os, "fork"):
    pytest.skip("faults are injected into forks, which this system does not have", allow_module_level=True)
ANALYZE, PLAN, _, QUANTIZE, TO_GGUF = JOBS


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bench")
    made = Bench(save_runnable(folder / "original", "qwen3_moe"), folder / "places")
    for job in (ANALYZE, PLAN, QUANTIZE, TO_GGUF):
        made.learn(job)
    yield made
    torch.set_num_threads(threads)


def early(share: float) -> tuple[float, bool]:
    """A moment while things are computed."""
    return share, False


def late(share: float) -> tuple[float, bool]:
    """A moment while the system is asked: most of them when the output is written, read again and published."""
    return share, True


@pytest.mark.parametrize(
    ("fault", "job", "when"),
    [
        (KILL, QUANTIZE, late(0.5)),
        (KILL, TO_GGUF, late(0.97)),
        (KILL, PLAN, late(0.9)),
        (INTERRUPT, QUANTIZE, late(0.6)),
        (INTERRUPT, PLAN, early(0.0)),
        (INTERRUPT, PLAN, early(0.8)),
        (TERMINATE, TO_GGUF, late(0.8)),
        (SMALL_DISK, QUANTIZE, late(0.5)),
        (FILE_LIMIT, QUANTIZE, late(0.3)),
        (FILE_LIMIT, TO_GGUF, late(0.3)),
        (READ_ERROR, ANALYZE, late(0.5)),
        (READ_ERROR, QUANTIZE, late(0.8)),
        (CUT, QUANTIZE, late(0.4)),
        (CUT, TO_GGUF, late(0.8)),
        (REWRITE, ANALYZE, late(0.7)),
        (REWRITE, QUANTIZE, late(0.9)),
        (UNREADABLE, QUANTIZE, early(0.0)),
        (OUTPUT_LOCKED, QUANTIZE, early(0.5)),
        (CACHE_LOCKED, PLAN, early(0.0)),
        (CLOCK, QUANTIZE, late(0.7)),
        (TWO_RUNS, QUANTIZE, late(0.7)),
    ],
    ids=lambda value: value.name if isinstance(value, (Fault, Job)) else f"{value[0]:g}",
)
def test_after_a_fault_the_same_command_ends_with_the_same_bytes(
    bench: Bench, fault: Fault, job: Job, when: tuple[float, bool]
) -> None:
    share, of_system = when
    moment = Moment(int(share * bench.calls[job][of_system]), of_system)
    try:
        outcome = inject(fault, job, bench, moment, seed=7)
    except OSError as error:
        pytest.skip(f"no small disk can be mounted here: {error}")
    assert outcome.broken == ""
    assert outcome.stopped or fault is TWO_RUNS
    assert outcome.resumed or fault is TWO_RUNS


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS_IN_PROCESSES, ids=lambda fault: fault.name)
def test_faults_of_several_processes(bench: Bench, fault: Fault) -> None:
    if IN_PROCESSES not in bench.calls:
        bench.learn(IN_PROCESSES)
    for share in (0.5, 0.9):
        assert (
            inject(fault, IN_PROCESSES, bench, Moment(int(share * bench.calls[IN_PROCESSES][True]), True), 1).broken
            == ""
        )


@pytest.fixture
def place(bench: Bench) -> Iterator[Place]:
    made = bench.place()
    yield made
    shutil.rmtree(made.folder)


def test_a_second_run_is_told_which_process_has_the_output(bench: Bench, place: Place) -> None:
    def arm() -> None:
        quantizing.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)  # type: ignore[assignment]

    told = []
    run(QUANTIZE, place, arm, lambda process: told.append((process, run(QUANTIZE, place))))
    ((process, other),) = told
    assert other.code == 2
    assert f"Another alphaq is at work on {place.out.parent / '.out.partial'} (process {process} on " in other.err


def test_a_lock_taken_on_a_removed_journal_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run before removes its journal between the moments when this one opens and locks it."""
    fcntl = pytest.importorskip("fcntl")
    path, real = tmp_path / "j.jsonl", fcntl.flock

    def late_lock(file: Any, how: int) -> None:
        if not removed:
            removed.append(path.unlink())
        real(file, how)

    removed: list[None] = []
    monkeypatch.setattr(fcntl, "flock", late_lock)
    with Journal(path) as journal:
        journal.append({"n": 1})
        with pytest.raises(JournalError, match=f"process {os.getpid()}"):
            Journal(path)
    assert Journal(path).entries == [{"n": 1}]


def test_weights_changed_behind_an_equal_time_are_not_published(alphaq: Any, place: Place, bench: Bench) -> None:
    """Neither stamp nor size tell; re-reading against the source does, and the next run begins anew."""
    shard = next(place.model.glob("*.safetensors"))
    data, times = shard.read_bytes(), shard.stat().st_mtime_ns
    real = quantizing.write_manifest

    def change(*arguments: Any) -> None:
        real(*arguments)
        with shard.open("r+b") as file:
            file.seek(len(data) // 2)
            file.write(bytes(len(data) // 4))
        os.utime(shard, ns=(times, times))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizing, "write_manifest", change)
        failed = alphaq(*QUANTIZE.arguments(place))
    assert failed.code == 2
    assert place.made() is None
    shard.write_bytes(data)
    os.utime(shard, ns=(times, times))
    assert alphaq(*QUANTIZE.arguments(place)).code == 0
    assert place.made() == bench.expected[QUANTIZE]


def test_what_did_not_reach_the_disk_is_written_again(
    alphaq: Any, place: Place, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed fsync the lost pages may read well from memory, so that a second fsync proves nothing."""
    found: list[Any] = []
    real_store, real_sync = storing.store, writer._sync

    def sync(path: Path) -> None:
        monkeypatch.setattr(writer, "_sync", real_sync)
        raise OSError(5, "Input/output error")

    def store(checkpoint: Any, task: Any) -> Any:
        found.append(task.earlier)
        return real_store(checkpoint, task)

    monkeypatch.setattr(writer, "_sync", sync)
    failed = alphaq(*QUANTIZE.arguments(place))
    assert failed.code == 2
    assert "Input/output error" in failed.err
    monkeypatch.setattr(storing, "store", store)
    assert alphaq(*QUANTIZE.arguments(place)).code == 0
    assert set(found) == {None}
    assert place.made() == bench.expected[QUANTIZE]


def test_a_disk_too_small_is_told_before_the_work(alphaq: Any, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr(storing, "store", None)
    ran = alphaq(*QUANTIZE.arguments(place))
    assert ran.code == 2
    assert "No space left on device. Free space and repeat the command" in ran.err


def test_other_weights_of_the_same_time_have_other_contents(place: Place) -> None:
    """Archives and build systems give all files one time."""
    shard = next(place.model.glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    before = open_checkpoint(place.model).contents()
    assert open_checkpoint(place.model).contents() == before
    data = shard.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    shard.write_bytes(data[:header] + bytes(255 - byte for byte in data[header:]))
    os.utime(shard, ns=(1, 1))
    assert open_checkpoint(place.model).contents() != before


def test_a_file_cut_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    """Were it mapped, the process would be killed by SIGBUS."""
    (tmp_path / "f").write_bytes(bytes(1 << 20))
    file = PlainFile(tmp_path / "f")
    file.read(0, 1 << 20)
    os.truncate(tmp_path / "f", 1000)
    with pytest.raises(CheckpointError, match="cut short while it was read"):
        file.read(1 << 19, 100)


@pytest.mark.parametrize("command", ["quantize {model} --bits 3 -o {out}", "plan {model} --bits 3 -o {out}"])
def test_an_output_that_cannot_be_written_is_told_before_the_work(place: Place, command: str) -> None:
    def arm() -> None:
        OUTPUT_LOCKED.arm(place, None)  # type: ignore[arg-type]
        place.out.parent.chmod(0o555)

    ran = run(Job("", command), place, arm)
    place.out.parent.chmod(0o755)
    assert ran.code == 2
    assert f"{place.out.parent} cannot be written to. Choose another output" in ran.err
    assert list(place.cache.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_under_standard_output_is_an_error(place: Place) -> None:
    def arm() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    ran = run(Job("", "inspect {model} --json"), place, arm)
    assert (ran.code, ran.in_one_line) == (2, True)
    assert "No space left on device" in ran.err


def test_what_killed_runs_left_beside_a_file_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    for _ in range(2):
        if (process := os.fork()) == 0:
            with writer.atomic_file(out) as partial:
                partial.write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(process, 0)
        assert len(list(tmp_path.iterdir())) == 1
    with writer.atomic_file(out) as partial:
        partial.write_text("whole")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]
