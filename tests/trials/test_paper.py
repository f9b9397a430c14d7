"""benchmarks/paper.py: every table offline, the same ones after a stop, and tasks made of texts."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alphaq.calibration.text import Text
from alphaq.checkpoint.hub import model_name
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import AlphaQError, OutputError
from alphaq.evaluation.tasks import TaskRequest
from alphaq.nouns.scoring import Scoring
from conftest import DATA, ROOT

if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks/ is not in the source distribution", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))
import local_tasks
import paper
import paper_models
from paper_runs import Experiment

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
    known = paper.published_of(name)
    found = [figures["paper"][2.5] for figures in (known.perplexity, known.tasks, known.memory_gb)]
    assert found == [8.14, 65.17, 6.4]
    assert not paper.published_of("tiny").tasks and not paper.published_of(f"{name}-Chat").tasks


def test_figures_of_other_data_do_not_stand_beside_the_paper_s() -> None:
    tasks = TaskRequest.of(",".join(paper.TASKS))
    run = SimpleNamespace(name="Qwen1.5-MoE-A2.7B", scoring=Scoring(texts=(Path("wiki.txt"),)))
    asked = paper_models.Asked(run, tasks, 8)  # type: ignore[arg-type]
    assert paper.comparable(asked) == paper.published_of(run.name)
    others = (None, replace(tasks, names=("piqa",)), replace(tasks, limit=20), replace(tasks, include_path=Path("x")))
    for other in others:
        known = paper.comparable(replace(asked, tasks=other))
        assert not known.tasks and known.perplexity
    run.scoring = Scoring(texts=(paper.TEXT,))
    assert not paper.comparable(asked).perplexity


def test_speed_of_the_paper_stands_in_the_row_of_its_method() -> None:
    known = paper.published_of("Mixtral-8x7B-v0.1")
    common = {"bits": 2.5, "quantizer": "", "size_bytes": 1, "tokens_per_second": 3.0, "speedup": 2.0}
    found = [paper_models.Finding(method=method, **common) for method in ("paper", "auto")]
    told = paper_models.speed_table(found, {}, known)
    assert (lines(told, "paper")[0][-1], lines(told, "auto")[0][-1]) == ("1.49", "–")
    assert paper_models.speed_table([], {}, known) == paper_models.tasks_table([], {}, known)  # says why


def test_answers_of_another_device_are_not_mixed(tiny: Path, tmp_path: Path) -> None:
    checkpoint, texts = open_checkpoint(tiny), (paper.TEXT,)
    run = Experiment(checkpoint, Scoring(texts=texts, device="cpu"), (2,), Text("self"), (), tmp_path)
    assert paper_models.findings(paper_models.Asked(run, None, 8), []) == []
    assert paper_models.findings(paper_models.Asked(run, None, 8), []) == []  # goes on
    other = replace(run, scoring=Scoring(texts=texts, device="meta"))
    with pytest.raises(OutputError, match=r"\(timed_on differ\)"):
        paper_models.findings(paper_models.Asked(other, None, 8), [])


def answered(name: str, one: Any) -> tuple[list[str], int]:
    """A document's question with each of its answers, as lm-eval's definitions of the tasks join them, and the number
    of the right one. Of BoolQ the one that is asked about; 1 for none."""
    if name == "boolq":
        return [" ".join([one["passage"], one["question"].removeprefix("does it go on with ")])], 1 - one["label"]
    if name == "hellaswag":
        return [f"{one['ctx_a']} {ending}" for ending in one["endings"]], int(one["label"])
    if name == "piqa":
        return [" ".join([one["goal"], one[f"sol{number}"]]) for number in (1, 2)], one["label"]
    if name == "winogrande":
        return [one["sentence"].replace("_", one[f"option{number}"]) for number in (1, 2)], int(one["answer"]) - 1
    choices = one["choices"]
    return [f"{one['question']} {each}" for each in choices["text"]], choices["label"].index(one["answerKey"])


@pytest.mark.parametrize("name", paper_models.TASKS)
def test_local_questions_have_one_right_answer_that_the_text_gives(name: str) -> None:
    found = local_tasks.documents(name, TEXTS, 20)
    assert found == local_tasks.documents(name, TEXTS, 20)  # whoever makes them
    words = [" ".join(text.replace("_", " ").split()) for text in TEXTS]
    numbers = set()
    for one in found:
        whole, number = answered(name, one)
        numbers.add(number)
        right = [any(each in text for text in words) for each in whole]
        assert right == [place == number for place in range(len(whole))]
    assert len(numbers) > 1
    with pytest.raises(ValueError, match="fewer than 240 words"):
        local_tasks.documents(name, ["too short"], 1)
    with pytest.raises(ValueError, match="repeats itself"):
        local_tasks.documents(name, ["same " * 300], 20)


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
    assert "holds answers of another model, tasks, machine or settings (tasks differ)" in ran(
        *common[:-1], "5", "-o", out, ok=False
    )
