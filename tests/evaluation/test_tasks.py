import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alphaq.errors import AlphaQError
from alphaq.evaluation.answers import lm_eval_model
from alphaq.evaluation.certificate import Certificate
from alphaq.evaluation.tasks import TaskRequest, compare_results, find_tasks
from conftest import DATA, Ran

Run = Callable[..., Ran]
TEXT = DATA / "texts" / "dict.txt"


def results(scores: list[float], stderr: float | str, keep: bool = True, metric: str = "acc") -> dict[str, Any]:
    """What lm-eval returns for one task."""
    samples = [
        {"doc_id": number, "doc_hash": str(number), "filter": "none", metric: score}
        for number, score in enumerate(scores)
    ]
    return {
        "results": {
            "t": {"alias": "t", f"{metric},none": sum(scores) / len(scores), f"{metric}_stderr,none": stderr},
            "group": {f"{metric},none": 0.5},
        },
        "configs": {"t": {}},
        "higher_is_better": {"t": {metric: metric != "loss"}},
        "n-samples": {"t": {"effective": len(scores)}},
        "samples": {"t": samples} if keep else {},
    }


def test_difference_is_taken_document_by_document() -> None:
    reference = [float(number % 2) for number in range(200)]
    own = [0.0 if number < 20 else score for number, score in enumerate(reference)]  # ten of them fail now
    (found,) = compare_results(results(own, 0.035), results(reference, 0.035))
    assert found.paired and found.difference == pytest.approx(-0.05) and found.documents == 200
    assert found.high is not None and found.high < 0 and found.lossless == "no"
    (unpaired,) = compare_results(results(own, 0.035, keep=False), results(reference, 0.035, keep=False))
    assert not unpaired.paired and unpaired.lossless == "yes"  # two standard errors do not tell them apart
    assert unpaired.high == pytest.approx(-0.05 + 1.959964 * 0.035 * 2**0.5)


def test_same_answers_are_lossless_and_groups_are_left_out() -> None:
    scores = [1.0, 0.0, 1.0, 1.0]
    (found,) = compare_results(results(scores, 0.2), results(scores, 0.2))
    assert (found.low, found.difference, found.high, found.lossless) == (0, 0, 0, "yes")


def test_worse_is_more_where_less_is_better() -> None:
    (found,) = compare_results(
        results([1.5, 1.6] * 50, 0.1, metric="loss"), results([1.0, 1.1] * 50, 0.1, metric="loss")
    )
    assert found.difference == pytest.approx(0.5) and found.lossless == "no"


def test_metric_without_errors_decides_nothing() -> None:
    (found,) = compare_results(results([1.0, 0.0], "N/A", keep=False), results([1.0, 1.0], "N/A", keep=False))
    assert found.low is None and found.lossless == "undecided"


def test_metric_that_is_no_mean_of_documents_is_not_paired() -> None:
    own, reference = results([1.0, 0.0], 0.1), results([1.0, 1.0], 0.1)
    own["results"]["t"]["acc,none"] = 0.7
    assert not compare_results(own, reference)[0].paired


def test_tasks_without_numbers_are_refused() -> None:
    with pytest.raises(AlphaQError, match="no metric"):
        compare_results({"results": {}, "configs": {}}, {"results": {}})


def test_missing_lm_eval_says_what_to_install(
    alphaq: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    ran = alphaq("certify", tiny, "--reference", tiny, "--text", TEXT, "--tasks", "x", "-o", tmp_path / "c.json")
    assert ran.code == 2 and "pip install 'alphaq[eval]'" in ran.err
    assert not list(tmp_path.iterdir())


def test_lm_eval_that_asks_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(__version__="9.9", HFLM=type("HFLM", (), {"generate_until": None}))
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, other)
    with pytest.raises(AlphaQError, match=r"lm-eval 9.9 has no HFLM._loglikelihood_tokens"):
        lm_eval_model(None, None)  # type: ignore[arg-type]


def test_empty_list_of_tasks_is_refused() -> None:
    with pytest.raises(AlphaQError, match="--tasks is empty"):
        TaskRequest.of(" , ")


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; `make test-eval` installs it and runs this")


@pytest.fixture
def which_continuation(tmp_path: Path) -> Path:
    """A task of our own: which of four pieces of text is the one that follows."""
    words = TEXT.read_text().split()
    generator = random.Random(0)
    pieces = [" ".join(words[start : start + 12]) for start in range(0, 12 * 80, 12)]
    lines = []
    for number in range(0, 40, 2):
        wrong = generator.sample(pieces[40:], 3)
        answer = generator.randrange(4)
        choices = [*wrong[:answer], pieces[number + 1], *wrong[answer:]]
        lines.append(json.dumps({"context": pieces[number], "choices": choices, "answer": answer}))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "which.yaml").write_text(
        f"""
task: which_continuation
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "data.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    )
    return folder


@pytest.mark.usefixtures("lm_eval")
def test_local_task_runs_end_to_end_on_a_quantized_model(
    alphaq: Run, tiny: Path, tiny_quantized: Path, which_continuation: Path, tmp_path: Path
) -> None:
    common = ("certify", tiny_quantized, "--reference", tiny, "--text", TEXT, "--max-tokens", 96, "--window", 48)
    tasks = ("--tasks", which_continuation / "which.yaml", "--batch-size", 8, "-o", tmp_path / "certificate.json")
    ran = alphaq(*common, *tasks, "--stream")
    assert ran.code == 0, ran.err
    streamed = Certificate.read(tmp_path / "certificate.json")
    ran = alphaq(*common, *tasks)
    assert ran.code == 0, ran.err
    made = Certificate.read(tmp_path / "certificate.json")
    assert made.tasks is not None and "lm-eval" in made.versions
    (found,) = made.tasks.results
    assert (found.task, found.metric, found.documents, found.paired) == ("which_continuation", "acc", 20, True)
    assert found.reference >= 0.5 and 0 <= found.value <= 1  # chance is a quarter: it did read the text
    assert found.value - found.reference == pytest.approx(found.difference)
    assert "which_continuation" in ran.out and "Task-lossless" in ran.out
    assert streamed.settings.layer_by_layer and streamed.tasks is not None
    assert (made.tasks.batch_size, streamed.tasks.batch_size) == (8, None)
    assert [(one.value, one.reference) for one in streamed.tasks.results] == [(found.value, found.reference)]


@pytest.mark.usefixtures("lm_eval")
def test_tasks_are_found_by_name_and_unknown_ones_are_named(which_continuation: Path, tmp_path: Path) -> None:
    manager = find_tasks(TaskRequest.of("which_continuation", include_path=which_continuation))
    assert "which_continuation" in manager.all_tasks
    (which_continuation / "data.jsonl").unlink()
    with pytest.raises(AlphaQError, match=r"lm-eval cannot run which_continuation .* Check that its data is at hand"):
        find_tasks(TaskRequest.of("which_continuation", include_path=which_continuation))
    with pytest.raises(AlphaQError, match="No task file"):
        find_tasks(TaskRequest.of(str(tmp_path / "none.yaml")))
    with pytest.raises(AlphaQError, match="is not a folder"):
        find_tasks(TaskRequest.of("which_continuation", include_path=tmp_path / "none"))
