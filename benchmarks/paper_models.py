"""What `paper.py` asks of whole models: zero-shot tasks of lm-eval, bytes in memory, speed of decoding.

Each row of the comparison is quantized once more, asked, and thrown away. Answers are kept in OUT/models, so that a run
that was stopped goes on. Models that do not fit into memory are asked layer by layer; they are not timed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

from common import alternate, machine, markdown_table
from paper_published import Published, cell
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from paper_runs import Experiment

    from alphaq.evaluation.tasks import TaskRequest
    from alphaq.measuring.resources import Resources
    from alphaq.trials.results import Row

TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "winogrande")
TIMED = ("paper", "auto")
PROMPT, ROUNDS, LIMIT_S = 16, 5, 60.0
NONE_ASKED = "No answers: no model was asked yet, or none has a plan in these bytes."
METRICS = ("acc_norm", "acc")
"""Of several that a task has, the first counts: normalised by length where lm-eval does that."""


class Finding(BaseModel):
    """One model's answers. tasks: accuracy and its standard error, by task. held_bytes: of weights in memory.
    speedup: of decoding, against the original in its own type, in the same rounds."""

    model_config = ConfigDict(frozen=True)

    method: str
    bits: float
    quantizer: str
    size_bytes: int
    tasks: dict[str, tuple[float, float]] = {}
    held_bytes: int | None = None
    tokens_per_second: float | None = None
    speedup: float | None = None

    @property
    def key(self) -> tuple[str, float, str]:
        """What tells rows apart."""
        return self.method, self.bits, self.quantizer

    @property
    def mean(self) -> tuple[float, float]:
        """Of the accuracies, with its standard error."""
        values = list(self.tasks.values())
        return sum(one for one, _ in values) / len(values), math.hypot(*(error for _, error in values)) / len(values)


@dataclass(frozen=True)
class Asked:
    """What models are asked. tasks: None for none; steps: of decoding, 0 for no timing."""

    run: Experiment
    tasks: TaskRequest | None
    steps: int

    @property
    def timed(self) -> bool:
        """Whether there is a clock: not for models that are run from disk."""
        return bool(self.steps) and not self.run.scoring.stream

    @property
    def job(self) -> dict[str, object]:
        """What answers depend on, apart from the row."""
        import alphaq

        tasks = self.tasks
        return {
            "checkpoint": self.run.checkpoint.fingerprint,
            "contents": self.run.checkpoint.contents(),
            "calibration": str(self.run.calibration),
            "dtype": self.run.scoring.dtype,
            "layer_by_layer": bool(self.run.scoring.stream),
            "tasks": None if tasks is None else [*tasks.names, tasks.limit, tasks.few_shot],
            "own_tasks": None if tasks is None or tasks.include_path is None else _digest(tasks.include_path),
            "steps": self.steps,
            "timed_on": _place(self.run.scoring.device) if self.timed else None,
            "alphaq": alphaq.__version__,
        }

    @cached_property
    def manager(self) -> Any:
        """lm-eval's. Raises AlphaQError for tasks that it does not know."""
        from alphaq.evaluation.tasks import find_tasks

        return None if self.tasks is None else find_tasks(self.tasks)

    def _loaded(self, folder: Path) -> Any:
        from alphaq.runtime.loading import load_model

        return load_model(folder, "auto", self.run.scoring.device)[0]

    def accuracies(self, folder: Path) -> dict[str, tuple[float, float]]:
        """Of every task, with standard errors."""
        from alphaq.evaluation.loading import pair_of
        from alphaq.evaluation.tasks import run_tasks

        if self.tasks is None:
            return {}
        model, _, tokenizer = pair_of(folder, None, self.run.scoring)
        said = run_tasks(model, tokenizer, self.manager, self.tasks)
        return {name: _accuracy(name, said["results"][name]) for name in sorted(said["configs"])}

    def speed(self, folder: Path | None) -> dict[str, float]:
        """Bytes of weights in memory, tokens per second and the quotient to the original; of the original itself
        without a folder. The original is loaded each time: beside the tasks there may be no room for it."""
        if not self.timed:
            return {}
        original = self._loaded(self.run.checkpoint.folder)
        own = original if folder is None else self._loaded(folder)
        contestants = {"own": lambda: _decode_s(own, self.steps)}
        if folder is not None:
            contestants["original"] = lambda: _decode_s(original, self.steps)
        timings, _ = alternate(contestants, ROUNDS, LIMIT_S)
        return {
            "held_bytes": _held_bytes(own),
            "tokens_per_second": self.steps / timings["own"].median_s,
            "speedup": 1.0 if folder is None else timings["original"].ratio,
        }


def _accuracy(task: str, figures: Mapping[str, Any]) -> tuple[float, float]:
    from alphaq.errors import AlphaQError

    for metric in METRICS:
        if f"{metric},none" in figures:
            return float(figures[f"{metric},none"]), float(figures[f"{metric}_stderr,none"])
    raise AlphaQError(f"Task {task} has no accuracy ({' or '.join(METRICS)}). Leave it out of --tasks.")


def _digest(folder: Path) -> str:
    """Of all files of a folder."""
    found = hashlib.sha256()
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _place(device: str | None) -> dict[str, object]:
    """What tokens per second depend on: processor, threads, device. The system's release is left out, so that a run
    goes on after an update."""
    import torch

    from alphaq.runtime.loading import usual_device

    target = usual_device(device)
    card = torch.cuda.get_device_name(target) if target.startswith("cuda") else None
    here = {key: value for key, value in machine().items() if key != "system"}
    return {**here, "threads": torch.get_num_threads(), "device": target, "card": card}


def _decode_s(model: Any, steps: int) -> float:
    """Seconds of so many greedy steps after a short prompt, one sequence."""
    import torch

    with torch.inference_mode():
        rows = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(rows, (1, PROMPT), generator=generator).to(model.device)
        out = model(prompt, use_cache=True, logits_to_keep=1)
        begin = perf_counter()
        for _ in range(steps):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        out.logits.sum().item()  # waits for a card
        return perf_counter() - begin


def _held_bytes(model: Any) -> int:
    from alphaq.runtime.packed import PackedWeights

    packed = sum(module.nbytes for module in model.modules() if isinstance(module, PackedWeights))
    return packed + sum(parameter.nbytes for parameter in model.parameters())


def findings(asked: Asked, rows: Sequence[Row]) -> list[Finding]:
    """Answers of the models of all rows that have a plan. Raises OutputError where OUT/models holds those of others."""
    from alphaq.errors import OutputError
    from alphaq.work.journal import Journal

    folder = asked.run.out / "models"
    folder.mkdir(exist_ok=True)
    wanted = {(row.method, row.bits, row.quantizer): row for row in rows if not row.error}
    with Journal(folder / "results.jsonl") as journal:
        job = json.loads(json.dumps(asked.job))
        if not journal.entries:
            journal.append({"job": job})
        begun = journal.entries[0]["job"] if journal.entries else job
        if other := [key for key in job if begun.get(key) != job[key]]:
            raise OutputError(
                f"{folder} holds answers of another model, tasks, machine or settings ({', '.join(other)} differ). "
                "Choose another output."
            )
        known = {one.key: one for one in map(Finding.model_validate, journal.entries[1:])}
        for finding in _asked(asked, [row for key, row in wanted.items() if key not in known]):
            known[finding.key] = finding
            journal.append(finding.model_dump())
    return [known[key] for key in wanted]


def _asked(asked: Asked, rows: Sequence[Row]) -> Iterator[Finding]:
    if not rows:
        return
    with asked.run.resources() as resources, TemporaryDirectory(dir=asked.run.out) as scratch:
        for row in resources.wrap(rows, len(rows), "tasks and speed"):
            with TemporaryDirectory(dir=scratch) as folder:
                out = _quantized(asked.run, row, Path(folder) / "model", resources)
                common = Finding(
                    method=row.method, bits=row.bits, quantizer=row.quantizer, size_bytes=row.size_bytes or 0
                )
                timed = row.method in TIMED and row.quantizer == asked.run.roundings[0].name
                speed = asked.speed(out) if timed or out is None else {}
                tasks = asked.accuracies(out or asked.run.checkpoint.folder)
                yield Finding.model_validate(common.model_dump() | {"tasks": tasks} | speed)


def _quantized(run: Experiment, row: Row, out: Path, resources: Resources) -> Path | None:
    """A row's model, written; None for the original."""
    from alphaq.trials.results import REFERENCE
    from alphaq.writing.quantizing import quantize
    from alphaq.writing.records import WriteOptions

    if row.method == REFERENCE:
        return None
    rounding = next(one for one in run.roundings if one.name == row.quantizer)
    plan = run.plan(run.request(row.method, row.budget_bytes), resources)
    quantize(run.checkpoint, plan, out, WriteOptions(rounding, check=False), resources)
    return out


def tasks_table(found: Sequence[Finding], called: Mapping[str, str], published: Published) -> str:
    """Accuracies in per cent."""
    if not found:
        return NONE_ASKED
    names = list(found[0].tasks)
    lines = []
    for one in found:
        mean, error = one.mean
        there = cell(published.tasks, one.method, one.bits)
        each = [f"{100 * one.tasks[name][0]:.1f}" for name in names]
        named = [called.get(one.method, one.method), f"{one.bits:g}", one.quantizer or "–"]
        lines.append([*named, *each, f"{100 * mean:.2f} ± {100 * error:.2f}", there])
    return markdown_table(["method", "bits", "quantizer", *names, "mean", "in the paper"], lines)


def speed_table(found: Sequence[Finding], called: Mapping[str, str], published: Published) -> str:
    """Memory and decoding of the models that were timed."""
    timed = [one for one in found if one.tokens_per_second is not None]
    if not timed:
        return NONE_ASKED
    lines = [
        [
            called.get(one.method, one.method),
            f"{one.bits:g}",
            f"{one.size_bytes / 1e9:.4g}",
            f"{(one.held_bytes or 0) / 1e9:.4g}",
            cell(published.memory_gb, one.method, one.bits, 1),
            f"{one.tokens_per_second:.1f}",
            f"{one.speedup:.2f}",
            cell(published.speed, one.method, one.bits),
        ]
        for one in timed
    ]
    header = ["method", "bits", "files, GB", "weights in memory, GB", "in the paper", "tokens/s", "× 16 bits"]
    return markdown_table([*header, "in the paper"], lines)
