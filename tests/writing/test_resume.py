"""A killed run, started again, ends with the bytes of an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaq.checkpoint.writer import JOURNAL_NAME, UNFINISHED_NAME
from alphaq.errors import CheckpointError
from alphaq.work.journal import Journal
from alphaq.writing import storing
from conftest import DATA
from contents import contents
from injection import Job, Place, killed_after, run, warm_up

PARTIAL = ".out.partial"
OPTIONS = ("--bits", "2.5", "--fast", "--method", "alphaq")
"""With codes that are fast to find; test_trellis_folder.py stops runs with the default's."""
QUANTIZE = Job("", f"quantize {DATA / 'tiny'} {' '.join(OPTIONS)} -o {{out}}")
MATRICES = 96  # all are measured when so many lines are noted


def command(model: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "alphaq", "quantize", str(model), "-o", str(out), *OPTIONS, *more]


def progress(folder: Path, cache: Path) -> int:
    """Lines that a run has noted so far, of its measurements and of its output."""
    files = [*cache.rglob("*.jsonl"), folder / PARTIAL / JOURNAL_NAME]
    return sum(file.read_bytes().count(b"\n") for file in files if file.is_file())


def kill_after(lines: int, run: list[str], folder: Path, cache: Path, delay_s: float = 0.0) -> bool:
    """Start a run and kill its main process once it has noted so many lines; True if it was killed.

    Its workers are left to notice by themselves, as they would be.
    """
    process = subprocess.Popen(run, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and progress(folder, cache) < lines:
        time.sleep(0.0005)
    time.sleep(delay_s)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    place = Place(folder, DATA / "tiny")
    place.out.parent.mkdir()
    warm_up(QUANTIZE, place)
    yield contents(place.out)
    torch.set_num_threads(threads)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path, DATA / "tiny")
    made.out.parent.mkdir()
    return made


@pytest.mark.parametrize(
    ("workers", "moments"), [(1, [40, 30, 60, 70]), pytest.param(2, [MATRICES + 80], marks=pytest.mark.slow)]
)
def test_killed_run_resumes_to_identical_bytes(
    place: Place, undisturbed: dict[str, str], workers: int, moments: list[int]
) -> None:
    """Each run goes on from where the one before was killed: while it measures, then while it writes.

    workers: of the last one. What is killed with workers of its own is a slow test.
    """
    kill_and_resume(place, QUANTIZE, moments, undisturbed, f" --workers {workers}")


@pytest.mark.slow
def test_killed_run_that_runs_the_model_resumes_to_identical_bytes(place: Place, tiny_quantized: Path) -> None:
    """All matrices are measured and the model begins to run; files are being written. The plan is the command line's,
    which was checked besides."""
    expected = contents(tiny_quantized)
    del expected["plan.json"]
    job = Job("", QUANTIZE.command.replace("--fast --method alphaq -o", "--method auto -o"))
    kill_and_resume(place, job, [MATRICES, 50], expected)


def kill_and_resume(
    place: Place, job: Job, moments: list[int], expected: dict[str, str], more_options: str = ""
) -> None:
    for lines in moments:
        assert run(job, place, killed_after(lines)).code == -signal.SIGKILL
        assert not place.out.exists()
    assert run(Job("", job.command + more_options), place).code == 0
    found = contents(place.out)
    assert {name: found[name] for name in expected} == expected
    assert place.left() == set()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_run_killed_at_any_time_resumes_to_identical_bytes(
    tiny: Path, tmp_path: Path, undisturbed: dict[str, str], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At moments of the clock, so also between stages, while verifying and while publishing."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("ALPHAQ_CACHE", str(cache))
    moments = random.Random(seed)
    run = command(tiny, tmp_path / "out", "--workers", str(1 + seed % 2))
    for _ in range(12):
        killed = kill_after(moments.choice([0, 1, 144, 150, 200, 280]), run, tmp_path, cache, moments.random() * 0.5)
        if not killed:
            break
    if not (tmp_path / "out").exists():
        subprocess.run(run, check=True, capture_output=True)
    assert contents(tmp_path / "out") == undisturbed


@pytest.fixture
def unfinished(place: Place, undisturbed: dict[str, str]) -> Path:
    """An output folder whose run was killed half-way."""
    assert run(QUANTIZE, place, killed_after(MATRICES + 60)).code == -signal.SIGKILL
    return place.out


@pytest.mark.slow
def test_another_plan_is_refused_until_told_to_restart(alphaq: Any, tiny: Path, unfinished: Path) -> None:
    ran = alphaq("quantize", tiny, *OPTIONS, "--bits", "3", "-o", unfinished)
    assert ran.code == 2
    assert "its plan changed since" in ran.err
    assert "--restart" in ran.err
    assert alphaq("quantize", tiny, *OPTIONS, "--bits", "3", "-o", unfinished, "--restart").code == 0
    assert json.loads((unfinished / "plan.json").read_text())["config"]["budget"]["bits"] == 3.0


def test_changed_weights_are_refused(alphaq: Any, tiny: Path, unfinished: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "tiny"
    shutil.copytree(tiny, copy)
    os.utime(next(copy.glob("*.safetensors")), ns=(1, 1))
    ran = alphaq("quantize", copy, *OPTIONS, "-o", unfinished)
    assert ran.code == 2
    assert "its checkpoint" in ran.err


def test_what_was_damaged_meanwhile_is_made_again(
    alphaq: Any, tiny: Path, unfinished: Path, undisturbed: dict[str, str]
) -> None:
    shard = next((unfinished.parent / PARTIAL / UNFINISHED_NAME).glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    for place in range(len(data) // 2, len(data), 5000):
        data[place] ^= 0xFF
    shard.write_bytes(data)
    assert alphaq("quantize", tiny, *OPTIONS, "-o", unfinished).code == 0
    assert contents(unfinished) == undisturbed


def test_two_runs_at_once_are_refused(alphaq: Any, tiny: Path, unfinished: Path) -> None:
    with Journal(unfinished.parent / PARTIAL / JOURNAL_NAME):
        ran = alphaq("quantize", tiny, *OPTIONS, "-o", unfinished)
    assert ran.code == 2
    assert "Another alphaq is at work" in ran.err


@pytest.mark.parametrize("error", [CheckpointError("the disk coughed"), OSError(28, "No space left on device")])
def test_a_passing_error_keeps_what_was_written(
    alphaq: Any,
    tiny: Path,
    tmp_path: Path,
    undisturbed: dict[str, str],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("quantize", tiny, *OPTIONS, "-o", tmp_path / "out", "--workers", "1")
    real, calls = storing.store, []

    def store(checkpoint: Any, task: Any) -> Any:
        calls.append(task.earlier)
        if len(calls) == 40:
            raise error
        return real(checkpoint, task)

    monkeypatch.setattr(storing, "store", store)
    assert alphaq(*options).code == 2
    assert alphaq(*options).code == 0
    assert sum(earlier is not None for earlier in calls[40:]) == 39
    assert contents(tmp_path / "out") == undisturbed


def test_damaged_input_leaves_nothing(alphaq: Any, tiny: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    plan = tmp_path / "plan.json"
    assert alphaq("plan", copy, "--bits", "2", "--fast", "--method", "distortion", "-o", plan).code == 0
    shard = next(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-(1 << 20) :] = b"\xff\x7f" * (1 << 19)  # NaN in bfloat16
    shard.write_bytes(data)
    ran = alphaq("quantize", copy, "--plan", plan, "-o", tmp_path / "out")
    assert ran.code == 2
    assert "NaN" in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "plan.json"]


@pytest.mark.slow
def test_damaged_matrix_kept_in_16_bits_is_refused_too(alphaq: Any, tiny: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    plan = json.loads(alphaq("plan", copy, "--bits", "2", "--method", "distortion", "--json").out)
    plan |= {"choices": dict.fromkeys(plan["choices"], "16"), "assignment": {}, "size_bytes": None, "source": None}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    shard = next(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-(1 << 20) :] = b"\xff\x7f" * (1 << 19)
    shard.write_bytes(data)
    ran = alphaq("quantize", copy, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert ran.code == 2
    assert "holds NaN" in ran.err
