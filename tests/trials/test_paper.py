"""benchmarks/paper.py: every table offline, the same ones after a stop, and tasks made of texts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alphaq.checkpoint.hub import model_name
from alphaq.errors import AlphaQError
from conftest import DATA, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
published_of = pytest.importorskip("paper").published_of
local_tasks = pytest.importorskip("local_tasks")
paper_models = pytest.importorskip("paper_models")

TITLES = [
    *("Methods, of the experts alone", "All roles in the same bytes", "γ at 2.5 bits", "One budget for each block"),
    *("One choice for all experts of a layer", "Zero-shot tasks", "Memory and decode speed"),
]
QUICK = ("--quick", "--bits", "2.5", "--max-tokens", "128", "--calibration-tokens", "1024")
TEXTS = [(DATA / "texts" / f"{name}.txt").read_text() for name in ("tech", "dict")]
Lines = list[list[str]]


def test_a_model_of_the_hub_stands_beside_the_paper() -> None:
    name = model_name(Path("hub/models--Qwen--Qwen1.5-MoE-A2.7B/snapshots/0123abcd"))
    assert name == "Qwen1.5-MoE-A2.7B"
    known = published_of(name)
    assert (known.perplexity["paper"][2.5], known.tasks["paper"][2.5], known.memory_gb[2.5]) == (8.14, 65.17, 6.4)
    assert not published_of("tiny").tasks


def right_answer(name: str, one: dict[str, Any]) -> str:
    """A document's question with its right answer, as lm-eval's definitions of the tasks join them."""
    if name == "boolq":
        return " ".join([one["passage"], one["question"].removeprefix("does it go on with ")])
    if name == "hellaswag":
        return f"{one['ctx_a']} {one['endings'][int(one['label'])]}"
    if name == "piqa":
        return " ".join([one["goal"], one[f"sol{one['label'] + 1}"]])
    if name == "winogrande":
        return str(one["sentence"].replace("_", one[f"option{one['answer']}"]))
    return f"{one['question']} {one['choices']['text'][one['choices']['label'].index(one['answerKey'])]}"


@pytest.mark.parametrize("name", paper_models.TASKS)
def test_local_questions_have_one_right_answer_that_the_text_gives(name: str) -> None:
    found = local_tasks.documents(name, TEXTS, 20)
    assert found == local_tasks.documents(name, TEXTS, 20)  # whoever makes them
    words = [" ".join(text.replace("_", " ").split()) for text in TEXTS]
    right = [any(right_answer(name, one) in text for text in words) for one in found]
    labels = [one["label"] for one in found] if name == "boolq" else [1] * 20
    assert right == [bool(label) for label in labels] and any(labels)
    with pytest.raises(ValueError, match="fewer than 240 words"):
        local_tasks.documents(name, ["too short"], 1)


def test_accuracy_is_normalised_where_a_task_is() -> None:
    figures = {"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.6, "acc_norm_stderr,none": 0.2}
    assert paper_models._accuracy("piqa", figures) == (0.6, 0.2)
    with pytest.raises(AlphaQError, match="Task squad has no accuracy"):
        paper_models._accuracy("squad", {"f1,none": 0.5})
    finding = paper_models.Finding(
        method="auto", bits=2, quantizer="", size_bytes=1, tasks={"a": (0.5, 0.3), "b": (1.0, 0.4)}
    )
    assert finding.mean == pytest.approx((0.75, 0.25))


def ran(*command: object, ok: bool = True) -> str:
    """What a benchmark prints; what it complains about if it should."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stderr
    return done.stdout if ok else done.stderr


def lines(told: str, label: str) -> Lines:
    return [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith(f"| {label} ")]


def stopped(folder: Path) -> None:
    """As if the last result of everything were still being made."""
    journals = list(folder.glob("*/*.jsonl"))
    assert len(journals) >= 5
    for journal in journals:
        journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    (folder / "paper.md").unlink()


def but_speed(told: str) -> str:
    """Without the one table that a clock has a say in."""
    return told.partition("## Memory and decode speed")[0]


@pytest.mark.slow
def test_paper_s_experiments_run_offline_and_go_on(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = (ROOT / "benchmarks" / "paper.py", tiny, "-o", out, *QUICK, "--tasks", "none")
    first = ran(*command)
    assert all(f"## {title}" in first for title in TITLES) and "Not run (`--tasks none`)" in first
    ours, (uniform, *_) = lines(first, "ours"), lines(first, "uniform")
    assert len(ours) == 3 and all(float(line[6]) < float(uniform[6]) for line in ours[:2])
    held, whole = float(ours[2][3]), float(lines(first, "16 bits")[-1][3])
    assert held < 0.4 * whole and float(ours[2][5]) > 0
    stopped(out)
    again = ran(*command)
    assert but_speed(again) == but_speed(first) and len(again.splitlines()) == len(first.splitlines())
    assert (out / "paper.md").read_text() == again
    assert "holds a comparison of another model, texts or settings" in ran(*command, "--skip-tokens", "9", ok=False)


@pytest.mark.slow
def test_paper_s_tasks_run_offline(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; `make test-eval` installs it and runs this")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    texts = [DATA / "texts" / f"{name}.txt" for name in ("tech", "dict")]
    ran(ROOT / "benchmarks" / "local_tasks.py", *texts, "-o", tmp_path / "tasks", "--documents", "8")
    common = (ROOT / "benchmarks" / "paper.py", tiny, *QUICK, "--include-path", tmp_path / "tasks", "--limit", "6")
    out = tmp_path / "out"
    first = ran(*common, "-o", out)
    _, _, _, *each, mean, published = lines(first.partition("## Zero-shot tasks")[2], "16 bits")[0]
    right = [float(one) * 6 / 100 for one in each]  # of six documents
    assert len(right) == 6 and all(abs(one - round(one)) < 0.01 for one in right) and published == "–"
    assert float(mean.split(" ± ")[0]) == pytest.approx(100 * sum(right) / 36, abs=0.01)
    stopped(out)
    assert but_speed(ran(*common, "-o", out)) == but_speed(first)
    assert "holds answers of another model, tasks or settings" in ran(*common[:-1], "5", "-o", out, ok=False)
