import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alphaq import planning
from alphaq.checkpoint.files import PlainFile
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.errors import CheckpointError, JournalError, QuantizationError, WorkerError
from alphaq.measuring.cache import Cache, Entry
from alphaq.measuring.measurement import Wanted, leaving, measure
from alphaq.measuring.resources import Resources
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.work.journal import Journal
from alphaq.work.workers import Workers

CHOICES = (Choice(2, 128), Choice(3, 128))


@pytest.fixture
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the matrices read."""
    names: list[str] = []
    original = Checkpoint.read

    def read(self: Checkpoint, matrix: MatrixRef, *how: object) -> Any:
        names.append(matrix.name)
        return original(self, matrix, *how)

    monkeypatch.setattr(Checkpoint, "read", read)
    return names


def measured(checkpoint: Checkpoint, cache: Cache | None, choices: tuple[Choice, ...] = CHOICES) -> list[Any]:
    matrices = checkpoint.with_role(Role.EXPERT)[:6]
    return list(measure(checkpoint, matrices, Wanted(choices=choices), Resources(cache=cache)))


def test_nothing_is_measured_twice(checkpoint: Checkpoint, tmp_path: Path, reads: list[str]) -> None:
    with Cache(tmp_path, {"weights": "a"}) as cache:
        first = measured(checkpoint, cache)
    reads.clear()
    with Cache(tmp_path, {"weights": "a"}) as cache:
        assert measured(checkpoint, cache) == first
        assert reads == []
        more = measured(checkpoint, cache, (*CHOICES, Choice(4, 128)))
        assert len(reads) == 6
    assert [one.spectrum for one in more] == [one.spectrum for one in first]
    for one, other in zip(more, first, strict=True):
        assert one.squared_errors.expected[CHOICES[0]] == other.squared_errors.expected[CHOICES[0]]


def test_a_device_gives_the_same_in_the_same_order(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The merging of what a device and what the workers find, with part of it known: on a "device" that is the CPU."""
    matrices = checkpoint.with_role(Role.EXPERT)[:7]
    plain = list(measure(checkpoint, matrices, Wanted(choices=CHOICES)))
    with Cache(tmp_path, {}) as cache:
        on_device = Resources(cache=cache, device="cpu:0")
        list(measure(checkpoint, matrices[:3], Wanted(choices=CHOICES[:1]), on_device))
        list(measure(checkpoint, matrices[5:6], Wanted(None, CHOICES), on_device))
        found = list(measure(checkpoint, matrices, Wanted(choices=CHOICES), on_device))
    for one, other in zip(plain, found, strict=True):
        assert one.squared_errors == other.squared_errors
        assert one.spectrum is not None and other.spectrum is not None
        assert one.spectrum.alpha == pytest.approx(other.spectrum.alpha, abs=1e-4)
        assert one.spectrum.variance == other.spectrum.variance


def test_a_full_disk_under_the_cache_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Journal, entry: object) -> None:
        raise OSError(28, "No space left on device")

    with Cache(tmp_path, {}) as cache:
        monkeypatch.setattr(Journal, "append", full)
        with pytest.raises(JournalError, match=r"No space left.*--no-cache"):
            cache.add(Entry("x", {}))


def test_other_weights_have_another_cache(checkpoint: Checkpoint, tmp_path: Path, reads: list[str]) -> None:
    for weights in ("a", "b"):
        with Cache(tmp_path, {"weights": weights}) as cache:
            measured(checkpoint, cache)
    assert len(reads) == 12


def test_measurements_survive_a_torn_line(checkpoint: Checkpoint, tmp_path: Path, reads: list[str]) -> None:
    with Cache(tmp_path, {}) as cache:
        first = measured(checkpoint, cache)
    (file,) = tmp_path.rglob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])
    reads.clear()
    with Cache(tmp_path, {}) as cache:
        assert measured(checkpoint, cache) == first
    assert len(reads) == 1


def test_a_cache_serves_one_process_at_a_time(tmp_path: Path) -> None:
    with Cache(tmp_path, {}), pytest.raises(JournalError, match="Another alphaq is at work"):
        Cache(tmp_path, {})


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="--no-cache"):
        Cache(tmp_path / "file", {})


def test_a_journal_drops_what_follows_a_damaged_line(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        for number in range(4):
            journal.append({"n": number})
    lines = (tmp_path / "j").read_bytes().splitlines(keepends=True)
    (tmp_path / "j").write_bytes(lines[0] + lines[1] + b"\x00\xff\n" + lines[3])
    with Journal(tmp_path / "j") as journal:
        assert journal.entries == [{"n": 0}, {"n": 1}]
        journal.append({"n": 9})
    assert [json.loads(line)["n"] for line in (tmp_path / "j").read_text().splitlines()] == [0, 1, 9]


def test_touched_and_rewritten_weights_are_told_apart(tmp_path: Path, tiny: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    before, before_hashed = open_checkpoint(copy).contents(), open_checkpoint(copy).contents(hashed=True)
    shard = next(copy.glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    assert open_checkpoint(copy).contents() != before
    assert open_checkpoint(copy).contents(hashed=True) == before_hashed
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert open_checkpoint(copy).contents(hashed=True) != before_hashed


@pytest.mark.parametrize("method", ["alphaq", "auto"])
def test_a_second_budget_measures_nothing(
    alphaq: Any, save_family: Any, reads: list[str], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.passes, "FEWEST_WINDOWS", 2)
    monkeypatch.setattr(planning.passes, "MOST_WINDOWS", 2)
    options = ("--method", method, "--workers", "1", "--json", "--no-check")  # a check reads what each plan rounds
    model = save_family("qwen2_moe")
    first = alphaq("plan", model, "--bits", "2", *options).json
    anew = sorted(reads)
    assert set(anew) >= set(first["assignment"])
    assert len(anew) == len(first["assignment"]) or method == "auto"  # which runs the model as well
    reads.clear()
    alphaq("plan", model, "--bits", "3", *options)
    alphaq("plan", model, "--bits", "2", "--gamma", "5", *options)
    assert reads == []
    alphaq("plan", model, "--bits", "3", "--no-cache", *options)
    assert sorted(reads) == anew


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_of_a_fused_tensor_only_the_slice_is_read(
    save_family: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(save_family(family, fused=True))
    fused = [matrix for matrix in checkpoint.matrices if matrix.index is not None]
    sizes: list[int] = []
    original = PlainFile.read
    monkeypatch.setattr(
        PlainFile,
        "read",
        lambda self, begin, nbytes, *memory: sizes.append(nbytes) or original(self, begin, nbytes, *memory),
    )
    assert fused
    for matrix in fused:
        assert checkpoint.read(matrix).shape == matrix.shape
    for matrix, nbytes in zip(fused, sizes, strict=True):
        assert nbytes <= (2 if matrix.transposed else 1) * 2 * matrix.parameters


def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    file = PlainFile(tmp_path / "x")
    assert bytes(file.read(1, 3).tolist()) == b"234"
    with pytest.raises(CheckpointError, match="cut short"):
        file.read(3, 3)


def double(shared: int, task: int) -> int:
    return shared * task


def fail(shared: int, task: int) -> int:
    raise QuantizationError("layers.3 holds NaN")


def die(shared: int, task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


@pytest.mark.parametrize("count", [1, 2])
def test_workers_return_results_in_order(count: int) -> None:
    with Workers(count, 3) as workers:
        assert list(workers.map(double, range(40), size=lambda task: task << 23)) == [3 * n for n in range(40)]
        with pytest.raises(QuantizationError, match=r"layers\.3"):
            list(workers.map(fail, range(3)))


def test_a_killed_worker_is_an_error_with_a_remedy() -> None:
    with Workers(2, 3) as workers, pytest.raises(WorkerError, match="fewer --workers"):
        list(workers.map(die, range(3)))


@pytest.mark.slow
def test_large_tasks_keep_every_process_busy_and_no_more() -> None:
    with Workers(2, 1) as workers:
        for size, most in ((0, 9), (1 << 40, 3)):
            taken: list[int] = []
            results = workers.map(double, (taken.append(n) or n for n in range(100)), lambda task, size=size: size)
            next(results)
            assert 2 <= len(taken) <= most
            results.close()  # type: ignore[attr-defined]


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from alphaq.work.workers import Workers\n"
        "def pid(shared, task):\n    return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    with Workers(2, None) as workers:\n"
        "        print(*set(workers.map(pid, range(20))), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    pids = [int(word) for word in ran.stdout.split()]
    assert pids
    assert ran.returncode == -signal.SIGKILL
    for _ in range(100):
        if not any(Path(f"/proc/{pid}/cmdline").is_file() and _alive(pid) for pid in pids):
            return
        import time

        time.sleep(0.1)
    pytest.fail("a worker outlived its parent")


def _alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_finished_shards_are_dropped_only_where_memory_is_short(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[str] = []
    original = PlainFile.forget
    monkeypatch.setattr(PlainFile, "forget", lambda self: dropped.append(self.path.name) or original(self))
    list(measure(checkpoint, checkpoint.matrices[:4]))
    assert dropped == []
    monkeypatch.setattr("alphaq.checkpoint.reader.memory_bytes", lambda: 1)
    list(measure(checkpoint, checkpoint.matrices[:4]))
    assert dropped == [checkpoint.shard_of[checkpoint.matrices[0].tensor]]


def test_leaving_forgets_every_shard_once_it_has_passed() -> None:
    events: list[str] = []
    for item in leaving([("a", 1), ("a", 2), ("b", 3)], lambda shard: events.append(f"forget {shard}")):
        events.append(str(item))
    assert events == ["1", "2", "forget a", "3", "forget b"]


def test_device_option_reaches_the_spectra(alphaq: Any, tiny: Path, tmp_path: Path) -> None:
    plain, other = tmp_path / "a.csv", tmp_path / "b.csv"
    usual = alphaq("analyze", tiny, "-o", plain, "--json").json
    found = alphaq("analyze", tiny, "-o", other, "--device", "cpu:0", "--no-cache", "--json").json
    assert found["alpha_median"] == pytest.approx(usual["alpha_median"], abs=1e-4)
    assert len(other.read_text().splitlines()) == len(plain.read_text().splitlines())
    refused = alphaq("plan", tiny, "--bits", "2", "--device", "nonsense")
    assert refused.code == 2
    assert "--device nonsense cannot be used" in refused.err


def test_hashed_contents_recognise_a_touched_copy(alphaq: Any, tiny: Path, tmp_path: Path, reads: list[str]) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    plan = ("plan", copy, "--bits", "2", "--method", "alphaq", "--fast", "--workers", "1", "--hash-contents")
    assert alphaq(*plan).code == 0
    os.utime(next(copy.glob("*.safetensors")), ns=(1, 1))
    reads.clear()
    assert alphaq(*plan).code == 0
    assert reads == []


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with Journal(tmp_path / "j") as journal:
        journal.append({"n": 1})
    assert Journal(tmp_path / "j").entries == [{"n": 1}]


def test_kernels_compile_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    from alphaq.simd.vectors import kernel

    def njit(*arguments: Any, _real: Any = numba.njit, **options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return _real(*arguments, **options)

    monkeypatch.setattr(numba, "njit", njit)
    assert kernel(double)(3, 4) == 12
