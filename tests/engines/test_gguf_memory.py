"""A 16-bit GGUF file that no process may hold in memory goes through every command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alphaq.checkpoint import files
from conftest import ROOT

if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks/ is not in the source distribution", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))
import gguf_memory

LIMIT = 700 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process so")


def limited(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ALPHAQ_CACHE": str(folder / "cache")}
    return subprocess.run(gguf_memory.limited(command, LIMIT), env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_file_larger_than_memory_is_analyzed_planned_quantized_and_observed(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    source = gguf_memory.write_model(tmp_path / "model.gguf", 1)
    assert source.stat().st_size > LIMIT
    held = limited([sys.executable, "-c", f"print(len(open({str(source)!r}, 'rb').read()))"], tmp_path)
    assert held.returncode and "MemoryError" in held.stderr  # the limit holds
    for name, command in gguf_memory.commands(source, tmp_path).items():
        ran = limited(command, tmp_path)
        assert ran.returncode == 0, (name, ran.stderr)
    assert (tmp_path / "gguf-out" / "model.gguf").stat().st_size <= source.stat().st_size // 4
    assert (tmp_path / "imatrix.gguf").stat().st_size > 1 << 20


def test_a_limit_of_the_process_is_the_memory_that_there_is() -> None:
    code = "from alphaq.checkpoint.files import memory_bytes; print(memory_bytes())"
    ran = limited([sys.executable, "-c", code], Path())
    assert int(ran.stdout) == min(LIMIT, files.memory_bytes()), ran.stderr
