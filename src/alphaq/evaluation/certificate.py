"""A record of how faithful a quantized model is to its reference, with what it takes to check it.

Figures are those of `fidelity`, each with a bootstrap interval: windows are the independent samples, drawn anew within
each text. Of a text's n windows each draw takes n − 1, so that the spread of the draws is the standard error without
bias however few windows there are (Rao and Wu, 1988); drawing n of them gives intervals too narrow by √((n − 1)/n).
Every figure comes from the same draws, and both models are scored on the same windows, so ratios are paired. A mean
over texts counts each text once.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field

import alphaq
from alphaq.checkpoint.files import PlainFile
from alphaq.checkpoint.gguf.source import find_gguf
from alphaq.checkpoint.hub import resolve_folder
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.weights import read_shards
from alphaq.checkpoint.writer import atomic_file
from alphaq.errors import AlphaQError, CheckpointError
from alphaq.evaluation.fidelity import WindowScore
from alphaq.nouns.plan import Plan, first_fault
from alphaq.work.untrusted import parse_json, read_bounded

FORMAT_VERSION = 1
CONFIDENCE = 0.95
DRAWS = 2000
SEED = 0
LOSSLESS_EAR = 0.99
"""What SLQ calls distribution-lossless."""

Verdict = Literal["yes", "undecided", "no"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Estimate(_Record):
    """A figure, and the interval that holds it with the certificate's confidence."""

    value: float
    low: float
    high: float

    def verdict(self, threshold: float) -> Verdict:
        """Whether it reaches a threshold: `undecided` where the interval holds values on both sides."""
        return "yes" if self.low >= threshold else "no" if self.high < threshold else "undecided"

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f} … {self.high:.4f})"


class Figures(_Record):
    """KL in nats per token; top1 and ear are shares; perplexity_ratio is the model's over the reference's."""

    ear: Estimate
    kl: Estimate
    top1: Estimate
    perplexity: Estimate
    reference_perplexity: Estimate
    perplexity_ratio: Estimate


class TextFigures(Figures):
    """Figures on one text. sha256: of the whole text in UTF-8. tokens: predicted ones, all but each window's first."""

    name: str
    sha256: str
    tokens: int
    windows: int


class TaskFigures(_Record):
    """One metric of one lm-eval task.

    difference: model − reference, with an interval where there is one. paired: whether it comes from the same documents
    one by one, and not from two standard errors. lossless: `no` where the whole interval is on the worse side of 0.
    """

    task: str
    metric: str
    filter: str
    higher_is_better: bool
    documents: int
    value: float
    reference: float
    difference: float
    low: float | None
    high: float | None
    paired: bool
    lossless: Verdict


class Tasks(_Record):
    """What lm-eval was asked, and what came out. batch_size: None layer by layer, where as many requests go together
    as there is room for; seeds: lm-eval's own, by name."""

    names: tuple[str, ...]
    limit: int | None
    few_shot: int | None
    batch_size: int | None
    seeds: dict[str, int]
    results: tuple[TaskFigures, ...]
    lossless: Verdict


class ModelIdentity(_Record):
    """Which files were run.

    fingerprint: SHA-256 over names, sizes and headers of the weight files, as plans have it of their source. contents:
    SHA-256 over names and SHA-256 of the weight files. manifest: SHA-256 of alphaq_manifest.json, where there is one.
    source: fingerprint of the checkpoint that the model was quantized from, where its plan says so.
    """

    name: str
    engine: str | None
    fingerprint: str
    contents: str
    manifest: str | None
    source: str | None
    size_bytes: int


class Settings(_Record):
    """How texts were scored. computed_in: the dtype of activations; dtype is what was asked for. begins_with: special
    tokens put before each window, in words. layer_by_layer: whether weights were read from disk as they were used."""

    window: int
    max_tokens: int | None
    skip_tokens: int
    dtype: str
    computed_in: str
    device: str
    confidence: float = CONFIDENCE
    draws: int = DRAWS
    seed: int = SEED
    begins_with: str = ""
    layer_by_layer: bool = False


class Certificate(_Record):
    """What `certificate.json` holds."""

    format_version: Literal[1] = 1
    alphaq_version: str
    versions: dict[str, str]
    command: str
    model: ModelIdentity
    reference: ModelIdentity
    settings: Settings
    texts: tuple[TextFigures, ...] = Field(min_length=1)
    overall: Figures
    threshold: float
    distribution_lossless: Verdict
    tasks: Tasks | None = None

    def to_json(self) -> str:
        """Indented JSON with a final newline."""
        return self.model_dump_json(indent=1) + "\n"

    def write(self, path: Path) -> None:
        """Put it at `path`, complete or not at all. Raises OutputError."""
        with atomic_file(path) as partial:
            partial.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Certificate:
        """Read and check a certificate. Raises CheckpointError naming the first fault."""
        try:
            return cls.model_validate(parse_json(read_bounded(path), strict=True))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}. Check the path.") from None
        except ValueError as error:
            raise CheckpointError(
                f"{path} is not a valid certificate: {first_fault(error)}. Make it again with `alphaq certify`."
            ) from None

    def belongs_to(self, folder: Path) -> bool:
        """Whether it was made of the files in this folder, as far as their headers and the manifest tell."""
        identity = identity_of(folder, hashed=False)
        return (identity.fingerprint, identity.manifest) == (self.model.fingerprint, self.model.manifest)


def figures(scores: Mapping[str, Sequence[WindowScore]]) -> tuple[Figures, dict[str, Figures]]:
    """Over all texts, and of each. Raises AlphaQError for a text of a single window, or figures that are no numbers."""
    generator = np.random.default_rng(SEED)
    values: dict[str, np.ndarray] = {}
    draws: dict[str, np.ndarray] = {}
    for name, windows in scores.items():
        count = len(windows)
        if count < 2:
            raise AlphaQError(
                f"Text {name!r} gives a single window, and an interval needs two. Use a longer text, more "
                "--max-tokens, or a shorter --window."
            )
        tokens = np.array([score.tokens for score in windows], dtype=float)
        sums = np.array(
            [(s.ear, s.kl, s.top1, s.negative_log_likelihood, s.reference_negative_log_likelihood) for s in windows]
        )
        picks = generator.integers(0, count, (DRAWS, count - 1))
        values[name] = sums.sum(axis=0) / tokens.sum()
        draws[name] = sums[picks].sum(axis=1) / tokens[picks].sum(axis=1)[:, None]
        if not np.isfinite(values[name]).all():
            raise AlphaQError(f"A model gives NaN or infinite figures on text {name!r}. Check it with `alphaq verify`.")
    mean = sum(values.values()) / len(values), sum(draws.values()) / len(draws)
    return _figures(*mean), {name: _figures(values[name], draws[name]) for name in scores}  # type: ignore[arg-type]


def _figures(values: np.ndarray, draws: np.ndarray) -> Figures:
    """values: ear, kl, top-1, loss and the reference's loss, [5]; the same of each draw, [draws, 5]."""

    def perplexity(losses: np.ndarray) -> np.ndarray:
        return np.exp(np.minimum(losses, 700.0))

    def both(values: np.ndarray) -> dict[str, np.ndarray]:
        ear, kl, top1, loss, reference = values.T
        by_name = {"ear": ear, "kl": kl, "top1": top1, "perplexity": perplexity(loss)}
        return by_name | {
            "reference_perplexity": perplexity(reference),
            "perplexity_ratio": perplexity(loss - reference),
        }

    own, drawn = both(values), both(draws)
    return Figures(**{name: estimate(float(own[name]), drawn[name]) for name in own})


def estimate(value: float, draws: np.ndarray) -> Estimate:
    """A figure with the percentiles of its draws."""
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value=value, low=float(low), high=float(high))


def digest_of(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def text_figures(
    scores: Mapping[str, Sequence[WindowScore]], contents: Mapping[str, str]
) -> tuple[Figures, tuple[TextFigures, ...]]:
    """Over all texts, and of each with what identifies it."""
    overall, each = figures(scores)
    return overall, tuple(
        TextFigures(
            name=name,
            sha256=digest_of(contents[name]),
            tokens=sum(score.tokens for score in windows),
            windows=len(windows),
            **dict(each[name]),
        )
        for name, windows in scores.items()
    )


def versions(*packages: str) -> dict[str, str]:
    """Of what computes: Python, torch, transformers, and further packages that are installed."""
    from importlib.metadata import version

    own = {"alphaq": alphaq.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return own | {"transformers": transformers.__version__} | {name: version(name) for name in packages}


def identity_of(model: str | Path, hashed: bool = True) -> ModelIdentity:
    """Which files a model is made of. hashed: read them all for `contents`, which is empty otherwise.

    Raises CheckpointError for what is no model.
    """
    if (path := find_gguf(Path(model).expanduser())) is not None:
        checkpoint = open_checkpoint(path, quantized=True)
        folder, files, fingerprint = checkpoint.folder, checkpoint.weight_files, checkpoint.fingerprint
    else:
        folder = resolve_folder(str(model))
        shards, fingerprint = read_shards(folder)
        files = list(shards)
    plan_path, manifest_path = folder / "plan.json", folder / "alphaq_manifest.json"
    ours = plan_path.is_file() and manifest_path.is_file()
    plan = Plan.read(plan_path) if ours else None
    digest = hashlib.sha256()
    for file in sorted(files) if hashed else ():
        own, nbytes = hashlib.sha256(), (folder / file).stat().st_size
        for piece in PlainFile(folder / file).chunks(0, nbytes):
            own.update(piece)
        digest.update(f"{file}\0{own.hexdigest()}\n".encode())
    name = path.name if path is not None else folder.resolve().name
    return ModelIdentity(
        name=str(model) if not Path(model).expanduser().exists() else name,
        engine=None if plan is None else plan.engine,
        fingerprint=fingerprint,
        contents=digest.hexdigest() if hashed else "",
        manifest=hashlib.sha256(read_bounded(manifest_path)).hexdigest() if ours else None,
        source=None if plan is None else plan.original,
        size_bytes=sum((folder / file).stat().st_size for file in files),
    )


def task_verdict(results: Sequence[TaskFigures]) -> Verdict:
    """Over all tasks: `no` if any is worse beyond sampling error, `yes` if none is."""
    verdicts = {one.lossless for one in results}
    return "no" if "no" in verdicts else "undecided" if "undecided" in verdicts or not verdicts else "yes"


def other_source(model: ModelIdentity, reference: ModelIdentity) -> str | None:
    """Why the reference may be the wrong one: the model's plan names another source. None where it does not."""
    if model.source in (None, reference.fingerprint):
        return None
    return (
        f"{model.name} was quantized from another checkpoint than {reference.name}: the figures compare it "
        "with this one all the same"
    )
