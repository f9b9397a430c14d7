"""What becomes of work in a process of its own when that process, this one or the work itself ends."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from jobs import Counter, aborted, crashed, doubled, killed, refused

from alphaq.checkpoint.gguf.format import read_gguf
from alphaq.checkpoint.gguf.imatrix import read_imatrix
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.engines.gguf.apart import Apart, run_apart
from alphaq.engines.gguf.gathering import Sample, gather_apart
from alphaq.engines.gguf.importance_file import write_imatrix
from alphaq.engines.gguf.library import LlamaError
from alphaq.errors import AlphaQError, CheckpointError
from alphaq.work.workers import silent
from conftest import Ran
from runnable import save_runnable

FILE = Path("model.gguf")
LIMIT_S = 300.0
"""Of waiting for what takes a second where nothing else runs."""


def test_results_and_progress_come_back() -> None:
    shown: list[object] = []

    def show(items: Iterable[int], total: int, label: str) -> Iterator[int]:
        shown.append((label, total))
        for item in items:
            shown.append(item)
            yield item
        shown.append("done")

    values = np.arange(1 << 20, dtype=np.float32)
    assert np.array_equal(run_apart(FILE, doubled, values, shown=show), 2 * values)
    assert shown == [("first", 3), 0, 1, 2, "done", ("second", 0), "done", ("third", 1), 0, "done"]


def test_what_is_kept_is_asked_again_and_survives_an_error() -> None:
    with Apart(FILE) as apart:
        apart.hold(Counter, 5)
        assert apart.ask(Counter.add, 2) == 7
        with pytest.raises(TypeError):
            apart.ask(Counter.add, "x")
        assert apart.ask(Counter.add, 1) == 8
    apart.close()


def test_an_error_comes_back_as_it_is() -> None:
    with pytest.raises(CheckpointError, match=r"^It is damaged\.$"):
        run_apart(FILE, refused, shown=silent)


@pytest.mark.parametrize(
    "function, said",
    [
        (aborted, r"gave up on model.gguf \(SIGABRT\)\. The file is damaged, .*\n(.*\n)* .*GGML_ASSERT\(heads > 0\)"),
        (crashed, r"gave up on model.gguf \(SIGSEGV\)\. The file is damaged"),
        (killed, r"gave up on model.gguf \(SIGKILL\)\. It was killed, most likely for lack of memory"),
    ],
)
def test_the_death_of_the_process_is_told_with_its_last_words(function: Callable[[object], None], said: str) -> None:
    with pytest.raises(LlamaError, match=said) as told:
        run_apart(FILE, function, shown=silent)
    assert len(str(told.value)) < 800  # the last words, not all of them


def test_a_dead_process_is_told_again() -> None:
    with Apart(FILE) as apart:
        for _ in range(2):
            with pytest.raises(LlamaError, match="SIGKILL"):
                apart.run(killed, shown=silent)


def test_the_current_folder_puts_no_module_in_another_s_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("alphaq", "numpy", "ctypes", "profile"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert run_apart(FILE, doubled, np.ones(1), shown=silent) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="signals are other there")
@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_this_process(way: int, tmp_path: Path) -> None:
    """Ctrl-C is for the whole group; the others are for the parent alone."""
    mark = tmp_path / "mark"
    code = (  # a shell's background jobs, and tests in one, are started to ignore Ctrl-C
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from alphaq.engines.gguf.apart import run_apart; from jobs import slept\n"
        f"run_apart(Path(), slept, Path({str(mark)!r}), shown=None)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL, env=environment
    )
    wait_for(lambda: mark.exists() and bool(mark.read_text()))
    child = int(mark.read_text())
    if way == signal.SIGINT:
        os.killpg(parent.pid, way)
    else:
        parent.send_signal(way)
    assert parent.wait(LIMIT_S) != 0
    wait_for(lambda: not alive(child))


def alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


# -- files that the real llama.cpp ends the process on -------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("xllamacpp")
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.writing.observing import in_16_bits

    folder = tmp_path_factory.mktemp("sound")
    return in_16_bits(open_checkpoint(save_runnable(folder / "model", "qwen2_moe")), folder)


def changed(source: Path, out: Path, key: str, value: GgufValue) -> Path:
    """The file with one value of its metadata replaced by one of the same length."""
    whole, before = source.read_bytes(), read_gguf(source).metadata[key]
    stored = key.encode() + (4).to_bytes(4, "little") + before.raw
    assert whole.count(stored) == 1 and len(value.raw) == len(before.raw)
    out.write_bytes(whole.replace(stored, stored[: -len(before.raw)] + value.raw))
    return out


HOSTILE = {
    "qwen2moe.attention.head_count": (3, "cannot load .*damaged.gguf"),
    "qwen2moe.embedding_length": (0, "cannot load .*damaged.gguf"),
    "qwen2moe.expert_used_count": (200, r"gave up on .*damaged.gguf \(SIGABRT\).*GGML_ASSERT\(n_expert_used"),
    "qwen2moe.block_count": (100_000, r"gave up on .*damaged.gguf \(SIGABRT\).*GGML_ASSERT\(.*n_layer"),
}


@pytest.mark.parametrize("key", HOSTILE)
def test_no_file_ends_this_process(key: str, sound: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    value, said = HOSTILE[key]
    damaged = changed(sound, tmp_path / "damaged.gguf", key, GgufValue.of("uint32", value))
    text = tmp_path / "text.txt"
    text.write_text("def main(): pass\n" * 40)
    for command in (("eval", damaged, "--text", text), ("imatrix", damaged, "-o", tmp_path / "i.gguf", "--tokens", 64)):
        ran = alphaq(*command)
        assert ran.code == 2 and re.search(said, " ".join(ran.err.split())), ran.err
    assert not (tmp_path / "i.gguf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16))
def test_damaged_numbers_end_in_an_error_or_a_result(seed: int, sound: Path, tmp_path: Path) -> None:
    """Numbers of the metadata and pieces of the weights are replaced by others of the same length."""
    chance, whole, file = random.Random(seed), bytearray(sound.read_bytes()), read_gguf(sound)
    numbers = [key for key, value in file.metadata.items() if value.type in ("uint32", "float32")]
    for key in chance.sample(numbers, chance.choice((1, 1, 2, 4))):
        place = whole.index(key.encode()) + len(key) + 4
        hostile = chance.choice((0, 1, 3, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 0x7FC00000, 0x7F800000))
        whole[place : place + 4] = hostile.to_bytes(4, "little")
    if seed % 4 == 0:
        begin = min(tensor.begin for tensor in file.tensors.values())
        for _ in range(20):
            place = chance.randrange(begin, len(whole) - 64)
            whole[place : place + 64] = chance.choice((b"\xff" * 64, b"\0" * 64, chance.randbytes(64)))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(whole)
    try:
        gathered = gather_apart(damaged, Sample(tokens=64, window=32), 1, silent)
    except AlphaQError as error:
        assert "damaged.gguf" in str(error)
    else:
        write_imatrix(tmp_path / "i.gguf", gathered, ["own"])
        assert read_imatrix(tmp_path / "i.gguf").tensors


def test_what_is_no_number_is_told(sound: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    whole, place = bytearray(sound.read_bytes()), read_gguf(sound).tensors["blk.1.attn_norm.weight"]
    whole[place.begin : place.end] = b"\xff" * place.nbytes
    (tmp_path / "damaged.gguf").write_bytes(whole)
    ran = alphaq("imatrix", tmp_path / "damaged.gguf", "-o", tmp_path / "i.gguf", "--tokens", 64)
    assert ran.code == 2 and "NaN or infinity: first in the inputs of blk.1." in " ".join(ran.err.split())
    (tmp_path / "text.txt").write_text("def main(): pass\n" * 9)
    ran = alphaq("eval", tmp_path / "damaged.gguf", "--text", tmp_path / "text.txt")
    assert ran.code == 2 and "NaN or infinity: in the logits" in " ".join(ran.err.split())
    assert "damaged.gguf" in ran.err
    assert not (tmp_path / "i.gguf").exists()
