"""Faults at chosen moments of real command-line runs, and what must be true after each: `scripts/faults.py` and tests.

A run is a fork of a process that has everything imported, so that it costs a fraction of a second. A moment is a count
of calls that the run has made: before any of them, the fault strikes in the run itself, at the same point whenever it
is repeated.
"""

from __future__ import annotations

import ctypes
import errno
import io
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from alphaq.cli.app import main
from alphaq.work.journal import Journal
from contents import digests

LONGEST_S = 120
SYSTEM_CALLS = frozenset(
    (
        *("open", "close", "read", "readinto", "readall", "write", "flush", "seek", "truncate", "posix_fallocate"),
        *("stat", "fstat", "scandir", "listdir", "access", "mkdir", "rmdir", "unlink", "rename", "replace", "fsync"),
        "flock",
    )
)
Strike = Callable[["Place", Random], None]


@dataclass(frozen=True)
class Job:
    """A command; {model} and {out} stand for what differs between runs."""

    name: str
    command: str

    def arguments(self, place: Place) -> list[str]:
        """The command line."""
        return [part.format(model=place.model, out=place.out) for part in self.command.split()]


JOBS = (
    Job("analyze", "analyze {model} -o {out}"),
    Job("plan", "plan {model} --bits 3 -o {out}"),
    Job("plan, llama.cpp", "plan {model} --bits 4.6 --engine llama.cpp -o {out}"),
    Job("quantize", "quantize {model} --bits 3 --method alphaq -o {out}"),
    Job("quantize, llama.cpp", "quantize {model} --bits 4.6 --engine llama.cpp --method alphaq -o {out}"),
)
IN_PROCESSES = Job("quantize, two workers", "quantize {model} --bits 3 --method alphaq --workers 2 -o {out}")


@dataclass(frozen=True)
class Place:
    """A folder of one injection's own: a copy of the model, a cache, and where the output goes."""

    folder: Path
    original: Path

    @property
    def model(self) -> Path:
        """The copy."""
        return self.folder / "model"

    @property
    def cache(self) -> Path:
        """Of measurements."""
        return self.folder / "cache"

    @property
    def out(self) -> Path:
        """What the run is to make."""
        return self.folder / "to" / "out"

    def prepare(self) -> Place:
        """Make everything that is there before a run."""
        self.restore()
        self.cache.mkdir()
        self.out.parent.mkdir()
        return self

    def restore(self) -> None:
        """Give the model its bytes and times back."""
        shutil.rmtree(self.model, ignore_errors=True)
        shutil.copytree(self.original, self.model)

    def made(self) -> dict[str, str] | None:
        """Digests of the output's files, None if it is not there."""
        return digests(self.out.iterdir() if self.out.is_dir() else [self.out]) if self.out.exists() else None

    def left(self) -> set[str]:
        """What lies beside the output."""
        return {path.name for path in self.out.parent.iterdir()} - {self.out.name}


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, or minus the signal that killed it."""

    code: int
    out: str
    err: str

    @property
    def in_one_line(self) -> bool:
        """Whether it told an error, or that it was interrupted, as it should."""
        lines = self.err.strip().splitlines()
        told = [line for line in lines if line.startswith(("error: ", "interrupted; "))]
        return told == lines[-1:] and "Traceback" not in self.err


def forked(work: Callable[[], object], when_stopped: Callable[[int], None] = lambda process: None) -> Ended:
    """Do some work in a fork of this process. when_stopped: called here, with the process, should it stop."""
    pipes = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        _become(work, [write for _, write in pipes])
    for _, write in pipes:
        os.close(write)
    while os.WIFSTOPPED(status := os.waitpid(process, os.WUNTRACED)[1]):
        when_stopped(process)
        os.kill(process, signal.SIGCONT)
    texts = []
    for read, _ in pipes:  # what is said fits into a pipe
        with os.fdopen(read, encoding="utf-8") as file:
            texts.append(file.read())
    return Ended(os.waitstatus_to_exitcode(status), *texts)


def _become(work: Callable[[], object], pipes: list[int]) -> None:
    """Do this fork's work; does not return."""
    code = 0
    try:
        for number, pipe in enumerate(pipes, start=1):
            os.dup2(pipe, number)
            os.close(pipe)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(LONGEST_S)
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        code = 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(
    job: Job,
    place: Place,
    arm: Callable[[], None] = lambda: None,
    when_stopped: Callable[[int], None] = lambda process: None,
) -> Ended:
    """Run a command in a fork of this process. arm: called there first."""

    def work() -> None:
        os.environ["ALPHAQ_CACHE"] = str(place.cache)
        arguments = job.arguments(place)
        arm()
        try:
            main(arguments)
        finally:
            sys.setprofile(None)

    return forked(work, when_stopped)


def warm_up(job: Job, place: Place) -> None:
    """Run a command in this very process: its forks then find everything imported and compiled."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        patch.setenv("ALPHAQ_CACHE", str(place.cache))
        with suppress(SystemExit):
            main(job.arguments(place))
    signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Moment:
    """Before a call that a run makes: of any function, or of those that ask something of the system."""

    number: int
    of_system: bool


def at(moment: Moment, strike: Callable[[], None]) -> None:
    """Let `strike` happen at a moment of this process."""
    left = moment.number + (not moment.of_system)  # the first call is that of the run itself

    def watch(frame: Any, event: str, function: Any) -> None:
        nonlocal left
        if event == "c_call" and function.__name__ in SYSTEM_CALLS if moment.of_system else event.endswith("call"):
            left -= 1
            if left < 0:
                sys.setprofile(None)
                strike()

    sys.setprofile(watch)


@dataclass
class Bench:
    """What every injection into a job is compared with. model: as it is before. expected: the output's bytes."""

    model: Path
    folder: Path
    expected: dict[Job, dict[str, str]] = field(default_factory=dict)
    calls: dict[Job, dict[bool, int]] = field(default_factory=dict)

    def learn(self, job: Job) -> None:
        """Run a job undisturbed: in this process, which warms it, then in a fork that counts the calls."""
        place = self.place()
        counts = {True: 0, False: 0}

        def count(frame: Any, event: str, function: Any) -> None:
            if event.endswith("call"):
                counts[False] += 1
                if event == "c_call" and function.__name__ in SYSTEM_CALLS:
                    counts[True] += 1

        def counted() -> None:
            os.environ["ALPHAQ_CACHE"] = str(place.cache)
            sys.setprofile(count)
            try:
                main(job.arguments(place))
            finally:
                sys.setprofile(None)
                (place.folder / "counts").write_bytes(pickle.dumps(counts))

        warm_up(job, place)
        expected = place.made()
        assert expected is not None, f"{job.name} fails without any fault"
        shutil.rmtree(place.folder)
        place.folder.mkdir()
        place.prepare()
        ended = forked(counted)
        assert ended.code == 0, ended.err
        assert place.made() == expected, "two undisturbed runs differ"
        self.expected[job] = expected
        self.calls[job] = pickle.loads((place.folder / "counts").read_bytes())
        shutil.rmtree(place.folder)

    def place(self) -> Place:
        """A new place, prepared."""
        folder = self.folder / f"place-{time.monotonic_ns()}"
        folder.mkdir(parents=True)
        return Place(folder, self.model).prepare()

    def moment(self, job: Job, random: Random) -> Moment:
        """Any moment of a job; of five, one is its beginning and two are before calls to the system."""
        of_system = random.random() < 0.5
        return Moment(0 if random.random() < 0.2 else random.randrange(self.calls[job][of_system]), of_system)


# -- faults ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong. arm: done in the run before it begins. strike: done there at the moment.

    undo: done before the command is repeated. codes: with which a run may end that did not outlive it. beside: done by
    another process while the run is stopped.
    """

    name: str
    strike: Strike
    codes: tuple[int, ...] = (2,)
    arm: Strike = lambda place, random: None
    undo: Callable[[Place], None] = lambda place: None
    beside: Callable[[Job, Place, int], None] = lambda job, place, process: None
    changes_model: bool = False
    on_small_disk: bool = False


def send(number: signal.Signals) -> Strike:
    return lambda place, random: os.kill(os.getpid(), number)


def limit_files(place: Place, random: Random) -> None:
    """No file can grow beyond some size, as if the disk were full; needs no rights, and works everywhere."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (random.choice([0, random.randrange(200_000)]), resource.RLIM_INFINITY))


def fill_disk(place: Place, random: Random) -> None:
    """Another program takes the space on the disk, up to a few bytes."""
    free = shutil.disk_usage(place.folder).free - random.choice([0, random.randrange(100_000)])
    with (place.folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free))


def clear_disk(place: Place) -> None:
    (place.folder / "filler").unlink(missing_ok=True)


class _Disk(io.FileIO):
    """A file on a disk that can break."""

    broken = False

    def _check(self) -> None:
        if _Disk.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def readinto(self, buffer: Any) -> int:
        self._check()
        return super().readinto(buffer) or 0

    def readall(self) -> bytes:
        self._check()
        return super().readall() or b""


def put_on_breakable_disk(place: Place, random: Random) -> None:
    """Every file of the model that Python opens is one that can break."""
    real = io.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **options: Any) -> Any:
        if not isinstance(file, (str, Path)) or not str(file).startswith(str(place.model)) or set(mode) & set("wxa+"):
            return real(file, mode, buffering, *more, **options)
        raw = _Disk(file)
        if buffering == 0:
            return raw
        buffered = io.BufferedReader(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *more, **options)

    io.open = opened  # type: ignore[assignment]


def break_disk(place: Place, random: Random) -> None:
    _Disk.broken = True


def weights(place: Place) -> Path:
    return next(place.model.glob("*.safetensors"))


def cut(place: Place, random: Random) -> None:
    os.truncate(weights(place), random.randrange(weights(place).stat().st_size))


def rewrite(place: Place, random: Random) -> None:
    """Change the weights in place, or put other ones at their place, or change the tokenizer."""
    shard = weights(place)
    data = bytearray(shard.read_bytes())
    begin = random.randrange(len(data) * 3 // 4, len(data) - 64)
    data[begin : begin + 64] = random.randbytes(64)
    way = random.randrange(3)
    if way == 0:
        with shard.open("r+b") as file:
            file.write(data)
    elif way == 1:
        (place.model / "new").write_bytes(data)
        (place.model / "new").replace(shard)
    else:
        tokenizer = place.model / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text() + " ")


def give_up_privileges(place: Place, random: Random) -> None:
    """Be a user to whom permissions apply, root too."""
    if os.geteuid() == 0:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(header, none):
            raise OSError(ctypes.get_errno(), "capset")


def forbid(mode: int, find: Callable[[Place, Random], list[Path]]) -> Strike:
    def strike(place: Place, random: Random) -> None:
        for path in find(place, random):
            path.chmod(mode)

    return strike


def allow_all(place: Place) -> None:
    for path in sorted(place.folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def a_source_file(place: Place, random: Random) -> list[Path]:
    return [random.choice(sorted(place.model.iterdir()))]


def output_folders(place: Place, random: Random) -> list[Path]:
    return [place.out.parent, *(path for path in place.out.parent.rglob("*") if path.is_dir())]


def cache_folders(place: Place, random: Random) -> list[Path]:
    return [place.cache, *(path for path in place.cache.rglob("*") if path.is_dir())]


def unsteady_clock(place: Place, random: Random) -> None:
    """The clock jumps by years at every look; the files are of the future or of 1970."""
    real = time.time
    time.time = lambda: real() + random.uniform(-1e9, 1e9)
    time.time_ns = lambda: int(time.time() * 1e9)


def begin_with_unsteady_clock(place: Place, random: Random) -> None:
    unsteady_clock(place, random)
    for path in place.model.iterdir():
        os.utime(path, ns=(0, Random(path.name).choice([0, 1, 4_000_000_000_000_000_000])))


def another_run(job: Job, place: Place, process: int) -> None:
    """Start the same command while the run is stopped: it ends well, or says who is at work or that all is done."""
    other = run(job, place)
    told = f"process {process} " in other.err or "already exists" in other.err
    if other.code != 0 and not (other.code == 2 and other.in_one_line and told):
        raise AssertionError(f"the other run ended with {other.code}: {other.err}")


def kill_worker(place: Place, random: Random) -> None:
    for worker in multiprocessing.active_children()[:1]:
        os.kill(worker.pid or 0, signal.SIGKILL)


def interrupt_group(place: Place, random: Random) -> None:
    """What a terminal does on Ctrl-C."""
    os.killpg(0, signal.SIGINT)


def lead_group(place: Place, random: Random) -> None:
    os.setpgid(0, 0)


KILL = Fault("kill -9", send(signal.SIGKILL), (-signal.SIGKILL,))
INTERRUPT = Fault("Ctrl-C (SIGINT)", send(signal.SIGINT), (130,))
TERMINATE = Fault("SIGTERM", send(signal.SIGTERM), (143, -signal.SIGTERM))
SMALL_DISK = Fault("disk full (a small tmpfs)", fill_disk, undo=clear_disk, on_small_disk=True)
FILE_LIMIT = Fault("no file may grow (RLIMIT_FSIZE)", limit_files)
READ_ERROR = Fault("read error (EIO)", break_disk, arm=put_on_breakable_disk)
CUT = Fault("weights cut short after opening", cut, undo=Place.restore, changes_model=True)
REWRITE = Fault("source rewritten while read", rewrite, undo=Place.restore, changes_model=True)
UNREADABLE = Fault("source not readable", forbid(0, a_source_file), arm=give_up_privileges, undo=allow_all)
OUTPUT_LOCKED = Fault(
    "output folder not writable", forbid(0o555, output_folders), arm=give_up_privileges, undo=allow_all
)
CACHE_LOCKED = Fault("cache not writable", forbid(0o555, cache_folders), arm=give_up_privileges, undo=allow_all)
CLOCK = Fault("clock steps, files of 1970 and 2096, kill -9", KILL.strike, KILL.codes, begin_with_unsteady_clock)
TWO_RUNS = Fault("two runs on one output", send(signal.SIGSTOP), beside=another_run)
FAULTS = (
    KILL,
    INTERRUPT,
    TERMINATE,
    SMALL_DISK,
    FILE_LIMIT,
    READ_ERROR,
    CUT,
    REWRITE,
    UNREADABLE,
    OUTPUT_LOCKED,
    CACHE_LOCKED,
    CLOCK,
    TWO_RUNS,
)
# For a job in several processes; they take seconds to start.
WORKER_KILLED = Fault("worker killed", kill_worker)
GROUP_INTERRUPT = Fault("Ctrl-C, two workers", interrupt_group, (130,), lead_group)
GROUP_KILL = replace(KILL, name="kill -9, two workers")
FAULTS_IN_PROCESSES = (WORKER_KILLED, GROUP_INTERRUPT, GROUP_KILL)


# -- what must be true afterwards -----------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came of one injection. broken: what should not be, empty if all is well.

    stopped: the fault ended the run, with a clean error or by the signal sent; else it came too late to matter.
    resumed: the same command then went on and ended well.
    """

    stopped: bool = False
    resumed: bool = False
    broken: str = ""


def inject(fault: Fault, job: Job, bench: Bench, moment: Moment, seed: int) -> Outcome:
    """Let a fault strike a job at a moment, see what is left, undo it, and repeat the command."""
    if fault.on_small_disk:
        return on_small_disk(bench, lambda small: _inject(fault, job, small, moment, seed))
    return _inject(fault, job, bench, moment, seed)


def _inject(fault: Fault, job: Job, bench: Bench, moment: Moment, seed: int) -> Outcome:
    place = bench.place()
    expected = bench.expected[job]
    old = None
    if not job.command.startswith("quantize"):
        place.out.write_text("of an earlier run")
        old = place.made()
    strange: list[str] = []

    def arm() -> None:
        fault.arm(place, Random(seed))
        at(moment, lambda: fault.strike(place, Random(seed)))

    def when_stopped(process: int) -> None:
        try:
            fault.beside(job, place, process)
        except AssertionError as error:
            strange.append(str(error))

    ended = run(job, place, arm, when_stopped)
    found = place.made()
    if strange:
        return Outcome(broken=strange[0])
    if ended.code not in (0, *fault.codes) or (ended.code in (2, 130) and not ended.in_one_line):
        return Outcome(broken=f"ended with {ended.code}: {ended.err}")
    stopped = ended.code != 0
    if found not in (old, expected) and not (fault.changes_model and found == _of_changed_model(job, bench, place)):
        return Outcome(stopped, broken=f"published something else, after: {ended.err}")
    if not stopped and found == old:
        return Outcome(broken="ended well without output")
    left = {name for name in place.left() if not (name == ".out.partial" and stopped)}
    if left and ended.code != -signal.SIGKILL:
        return Outcome(stopped, broken=f"left {sorted(left)}")
    fault.undo(place)
    resumed = False
    if stopped and found == old:
        again = run(job, place, lambda: None if fault is not CLOCK else unsteady_clock(place, Random(seed + 1)))
        if again.code or place.made() != expected or place.left():
            return Outcome(stopped, broken=f"repeated, it ended with {again.code}, left {place.left()}: {again.err}")
        resumed = True
    shutil.rmtree(place.folder)
    return Outcome(stopped, resumed)


def _of_changed_model(job: Job, bench: Bench, place: Place) -> dict[str, str] | None:
    """What an undisturbed run makes of the model as it is now: right if the fault struck before it was opened."""
    fresh = bench.place()
    shutil.rmtree(fresh.model)
    shutil.copytree(place.model, fresh.model)
    return fresh.made() if run(job, fresh).code == 0 else None


NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000
SMALL_DISK_BYTES = 8 << 20


def mount_small_disk(folder: Path) -> None:
    """Mount a tmpfs that only this process sees; without root in a user namespace of its own. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()

    def check(result: int, what: str) -> None:
        if result:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")

    check(libc.unshare(NEW_MOUNTS | (NEW_USER if user else 0)), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    private = 1 << 18 | 1 << 14  # MS_PRIVATE | MS_REC: nothing is mounted for others
    check(libc.mount(b"none", b"/", None, private, None), "mount")
    check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={SMALL_DISK_BYTES}".encode()), "mount")


def on_small_disk(bench: Bench, work: Callable[[Bench], Outcome]) -> Outcome:
    """Do the work in a fork that has a small disk; without the right to mount, the outcome of nothing."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            disk = bench.folder / "disk"
            disk.mkdir(exist_ok=True)
            try:
                mount_small_disk(disk)
                answer: Any = work(replace(bench, folder=disk))
            except OSError as error:
                answer = error
            os.write(write, pickle.dumps(answer))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        answer = pickle.loads(file.read())
    os.waitpid(process, 0)
    if isinstance(answer, OSError):
        raise answer
    return answer


def killed_after(lines: int) -> Callable[[], None]:
    """What makes a run kill itself once it has noted so many lines."""

    def arm() -> None:
        real, noted = Journal.append, []

        def append(self: Journal, entry: dict[str, Any]) -> None:
            real(self, entry)
            noted.append(entry)
            if len(noted) == lines:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.append = append  # type: ignore[method-assign]

    return arm
