"""benchmarks/paper.py: every table offline, and the same ones after a stop."""

import subprocess
import sys
from pathlib import Path

import pytest

from alphaq.checkpoint.hub import model_name
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
published_of = pytest.importorskip("paper").published_of

TITLES = ["Methods, of the experts alone", "All roles in the same bytes", "γ at 2.5 bits", "One budget for each block"]


def test_a_model_of_the_hub_stands_beside_the_paper() -> None:
    name = model_name(Path("hub/models--Qwen--Qwen1.5-MoE-A2.7B/snapshots/0123abcd"))
    assert name == "Qwen1.5-MoE-A2.7B" and published_of(name)["paper"][2.5] == 8.14


@pytest.mark.slow
def test_paper_s_experiments_run_offline_and_go_on(tiny: Path, tmp_path: Path) -> None:
    options = ["--quick", "--bits", "2.5", "--max-tokens", "128", "--calibration-tokens", "1024"]
    command = [sys.executable, ROOT / "benchmarks" / "paper.py", tiny, "-o", tmp_path / "out", *options]
    first = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert all(f"## {title}" in first for title in [*TITLES, "One choice for all experts of a layer"])
    lines = [line.split(" | ") for line in first.splitlines() if line.startswith("| ours ")]
    uniform = next(line.split(" | ") for line in first.splitlines() if line.startswith("| uniform "))
    assert len(lines) == 2 and all(float(line[6]) < float(uniform[6]) for line in lines)
    for journal in tmp_path.glob("out/*/*.jsonl"):
        kept = journal.read_text().splitlines(keepends=True)[:-1]
        journal.write_text("".join(kept))  # as if the last result were still being made
    (tmp_path / "out" / "paper.md").unlink()
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert again == first
    assert (tmp_path / "out" / "paper.md").read_text() == first
    other = subprocess.run([*command, "--skip-tokens", "9"], capture_output=True, text=True)
    assert other.returncode == 1 and "holds a comparison of another model, texts or settings" in other.stderr
