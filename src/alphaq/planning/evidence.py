"""What must be known for a plan: spectra and errors, and what a method asks for beyond: statistics, passes, text."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch

from alphaq.calibration.prior import routing_prior, seen_uses
from alphaq.calibration.text import Text, own_writing
from alphaq.calibration.tokens import model_prefix
from alphaq.calibration.traffic import FORMAT_VERSION, PROBE, Calibration, gather
from alphaq.checkpoint.imatrix import ImportanceMatrix
from alphaq.checkpoint.reader import Checkpoint
from alphaq.checkpoint.safetensors_format import FILE_OVERHEAD
from alphaq.engines.gguf.importance import importance_of
from alphaq.engines.gguf.profile import GAUSSIAN_ERROR, gaussian_errors
from alphaq.errors import CheckpointError, QuantizationError, StatsError
from alphaq.measuring.cache import Cache
from alphaq.measuring.measurement import Sampling, coded_bytes, measure
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.spectrum import Spectrum
from alphaq.planning.limits import outside_experts, pinned, problem_of
from alphaq.planning.measured import Measurements
from alphaq.planning.request import Request
from alphaq.quantizers.base import quantizer_version
from alphaq.quantizers.coding import coder_version
from alphaq.quantizers.rounded import SAMPLE_VALUES
from alphaq.sensitivity.distortion import analytic_noise
from alphaq.sensitivity.methods import Evidence, Need
from alphaq.simd.sums import squared_norm
from alphaq.spectra.measure import Stats, read_stats
from alphaq.spectra.variants import SpectrumVariant
from alphaq.work.workers import Workers, Wrap, silent

T = TypeVar("T")
SYNTHETIC_WINDOWS, SYNTHETIC_LENGTH = 8, 256
SAMPLE_MEMBERS = 32  # matrices of a unit whose errors are measured


def measure_for_plan(
    checkpoint: Checkpoint | None,
    request: Request,
    stats: Path | Stats | None = None,
    wrap: Wrap = silent,
    workers: Workers | None = None,
    cache: Cache | None = None,
    device: str = "cpu",
    calibration: Text | None = None,
    needs: Iterable[Need] | None = None,
    check_budget: bool = True,
    imatrix: ImportanceMatrix | None = None,
) -> Measurements:
    """What the request's method needs to know of the matrices to plan, from the weights, a stats file, or both.

    needs: measure for these instead of the method's own. check_budget: raise BudgetError before any work if the
    request's budget is infeasible. Raises StatsError if the stats lack a matrix of the
    checkpoint, or the method needs weights or a text that were not given.
    """
    config, choices = request.config, request.choices
    wanted = set(request.method.needs if needs is None else needs)
    given = read_stats(stats) if isinstance(stats, Path) else stats
    if checkpoint is None:
        return _from_stats(request, wanted, given)

    matrices = checkpoint.planned
    if check_budget and config.codec is None:  # what coded files take is only known when they have been coded
        # A model that the engine's files cannot hold, or an infeasible budget, is told before any measuring.
        request.profile.writer.layout(checkpoint, {})
        problem_of(checkpoint, request)
    if given is None and needs is None and request.method.by_shapes and config.noise == "analytic":
        return _from_headers(checkpoint, request)
    if given is not None:
        for matrix in matrices:
            if matrix.name not in given.spectra:
                reason = given.left_out.get(matrix.name, "no row")
                raise StatsError(f"{stats} has no usable row for {matrix.name!r} ({reason}). Analyze this model again.")
    if "text" in wanted and calibration is None:
        raise StatsError(f"--method {config.method} needs a text. Give one with --calibration FILE.")
    coded = config.codec is not None
    real = tuple(choice for choice in choices if not choice.kept or coded) if config.noise == "measured" else ()
    variant = SpectrumVariant(config.spectrum, config.tail)
    begin = time.perf_counter()
    importance = {} if imatrix is None else importance_of(checkpoint, imatrix).columns
    digest = f"{quantizer_version(request.profile.quantizer)} {imatrix.digest if imatrix else ''}".strip()

    sets: dict[frozenset[Choice], frozenset[Choice]] = {}  # most are alike, and there may be 70,000 matrices

    def able(matrix: MatrixRef) -> frozenset[Choice]:
        pin = pinned(request, matrix)
        wanted = request.offered if pin is None else {pin}
        found = frozenset(c for c in real if c in wanted and request.profile.obstacle(c, matrix) is None)
        return sets.setdefault(found, found)

    possible = {matrix.name: able(matrix) for matrix in matrices}
    units: dict[str, list[MatrixRef]] = {}
    for matrix in matrices:
        units.setdefault(request.profile.unit_of(matrix), []).append(matrix)
    results = measure(
        matrices,
        workers or Workers(1, checkpoint),
        cache,
        given is None,
        real,
        device,
        "statistics" in wanted,
        variant,
        _sampling(request.profile.quantizer, units, possible, importance, digest, config.codec),
    )
    spectra, statistics = {}, []
    rows, deviations = np.empty((2, len(matrices), len(choices)))
    nbytes = np.empty((len(matrices), len(choices)), np.int64)
    for number, (matrix, found) in enumerate(zip(matrices, wrap(results, len(matrices), "measure"), strict=True)):
        own = found.spectrum or (given.spectra[matrix.name] if given is not None else None)
        assert own is not None  # measured unless given
        measured = found.squared_errors
        if math.isnan(own.mean_square):  # only α is known
            mean_square = measured.energy / matrix.parameters
            own = replace(own, variance=mean_square, mean_square=mean_square)
        spectra[matrix.name] = own
        energy = own.mean_square * matrix.parameters
        formula = (c for c in choices if c not in possible[matrix.name])
        others = {c: _expected(own, c, energy, matrix.parameters) for c in formula}
        rows[number] = [others[c] if c in others else measured.expected.get(c, np.nan) for c in choices]
        deviations[number] = [measured.deviation.get(c, 0.0) for c in choices]
        nbytes[number] = [measured.coded.get(c) or c.storage_bytes(matrix.shape) for c in choices]
        if found.statistics is not None:
            statistics.append(found.statistics)
    joined = {}
    if request.joint and real:
        others_too = outside_experts(checkpoint, request)[1]
        each = {matrix.name: able(matrix) for matrix in others_too}
        whole = Sampling(request.profile.quantizer, SAMPLE_VALUES, each, importance, digest)
        results = measure(others_too, workers or Workers(1, checkpoint), cache, False, real, sampling=whole)
        usual = gaussian_errors(choices)
        for matrix, found in zip(others_too, wrap(results, len(others_too), "measure the rest"), strict=True):
            seen_errors, energy = found.squared_errors.expected, found.squared_errors.energy or 1.0
            relative = [
                seen_errors[c] / energy if c in seen_errors else error for c, error in zip(choices, usual, strict=True)
            ]
            joined[matrix.name] = np.array(relative)
    seconds = {"errors": time.perf_counter() - begin}
    weights = np.array([matrix.parameters for matrix in matrices], dtype=np.int64)
    energies = np.array([found.mean_square for found in spectra.values()]) * weights
    errors, deviation = _by_unit(units, spectra, rows, deviations, energies)
    left_out = {} if given is None else {n: why for n, why in given.left_out.items() if "not an expert" not in why}
    seen: dict[Need, Any] = {}

    def synthetic() -> Calibration:
        return seen["synthetic"] if "synthetic" in seen else _synthetic_pass(checkpoint, config.bos, cache, wrap)

    passes: dict[Need, Callable[[], Any]] = {
        "synthetic": synthetic,
        "prior": lambda: routing_prior(checkpoint) if checkpoint.architecture.router_norm else seen_uses(synthetic()),
        "text": lambda: _text_pass(
            checkpoint, cast(Text, calibration), choices if "outputs" in wanted else (), cache, wrap
        ),
    }
    for need, run in passes.items():
        if need in wanted:
            begin = time.perf_counter()
            seen[need] = _sound(checkpoint, run)
            seconds[need] = time.perf_counter() - begin
    evidence = Evidence(
        tuple(spectra),
        choices,
        errors,
        energies,
        weights,
        _alphas(spectra),
        tuple(matrices),
        tuple(statistics) if statistics else None,
        seen.get("prior"),
        seen.get("synthetic"),
        seen.get("text"),
        coded=nbytes if coded else None,
        rest_bytes=_coded_rest(checkpoint, request, workers or Workers(1, checkpoint), cache, wrap) if coded else 0,
    )
    return Measurements(
        spectra, choices, request.offered, errors, weights, left_out, evidence, seconds, deviation, joined, importance
    )


def _coded_rest(checkpoint: Checkpoint, request: Request, workers: Workers, cache: Cache | None, wrap: Wrap) -> int:
    """Bytes of entropy-coded files without the planned matrices."""
    fixed, _ = outside_experts(checkpoint, request)
    planned = {matrix.name for matrix in checkpoint.planned}
    within = checkpoint.matrices_by_tensor(fixed.keys() | planned)
    quantizer = request.profile.quantizer
    tasks: list[tuple[str | MatrixRef, Choice | None, str]] = [
        (tensor, None, quantizer)
        for tensors in checkpoint.shards.values()
        for tensor in tensors
        if tensor not in within
    ]
    tasks += [
        (matrix, fixed[matrix.name], quantizer)
        for matrices in within.values()
        for matrix in matrices
        if matrix.name not in planned
    ]

    def size(task: tuple[str | MatrixRef, Choice | None, str]) -> int:
        source = task[0]
        return checkpoint.info(source).nbytes if isinstance(source, str) else 2 * source.parameters

    def run() -> str:
        own = Workers(1, checkpoint) if workers.cluster else workers
        found = own.map(coded_bytes, tasks, size)
        return str(FILE_OVERHEAD * len(checkpoint.shards) + sum(wrap(found, len(tasks), "measure the rest")))

    if cache is None:
        return int(run())
    key = f"{coder_version(str(request.config.codec))} {quantizer_version(quantizer)} {sorted(fixed.items())}"
    return cache.kept(f"rest-{hashlib.sha256(key.encode()).hexdigest()[:16]}.txt", run, int)


def _sampling(
    quantizer: str,
    units: dict[str, list[MatrixRef]],
    possible: dict[str, frozenset[Choice]],
    importance: dict[str, np.ndarray],
    digest: str,
    codec: str | None,
) -> Sampling:
    """Where matrices share a choice, their errors are only needed in sum: less of each is enough."""
    drawn = {
        matrix.name: possible[matrix.name]
        for unit, members in units.items()
        for matrix in random.Random(unit).sample(members, min(len(members), SAMPLE_MEMBERS))
    }
    values = SAMPLE_VALUES // min(max(map(len, units.values())), SAMPLE_MEMBERS)
    return Sampling(quantizer, values, drawn, importance, digest, codec)


def _by_unit(
    units: dict[str, list[MatrixRef]],
    spectra: dict[str, Spectrum],
    errors: np.ndarray,
    deviations: np.ndarray,
    energies: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Errors [matrices, choices] of matrices left out of the sample (NaN) from those of their unit, in proportion to
    their energy; and the relative standard error [matrices, choices] of their unit's sum."""
    numbers = {name: number for number, name in enumerate(spectra)}
    errors, relative = errors.copy(), np.zeros_like(errors)
    for members in units.values():
        rows = np.array([numbers[matrix.name] for matrix in members])
        seen = rows[np.isfinite(errors[rows]).all(axis=1)]
        total, energy = errors[seen].sum(axis=0), energies[seen].sum()
        ratio = total / energy if energy > 0 else np.zeros(errors.shape[1])
        missing = np.setdiff1d(rows, seen)
        spread = np.square(deviations[seen]).sum(axis=0)
        if len(missing):  # and how much the members differ, as far as they were not all seen
            misses = errors[seen] - ratio * energies[seen, None]
            bessel = len(seen) / max(1, len(seen) - 1)
            spread = spread + np.square(misses).sum(axis=0) * bessel * len(missing) / len(rows)
        relative[rows] = np.sqrt(spread) / np.where(total > 0, total, 1.0)
        errors[missing] = ratio * energies[missing, None]
    return errors, relative


def _from_headers(checkpoint: Checkpoint, request: Request) -> Measurements:
    """What a formula says of weights of variance 1, which none was read to learn."""
    choices, matrices = request.choices, checkpoint.planned
    unit = Spectrum(None, 0, 0, 1.0, 1.0, math.nan)
    weights = np.array([matrix.parameters for matrix in matrices], dtype=np.int64)
    errors = weights[:, None] * np.array([_expected(unit, choice, 1.0, 1) for choice in choices])
    evidence = Evidence(
        tuple(matrix.name for matrix in matrices),
        choices,
        errors,
        weights.astype(float),
        weights,
        np.full(len(matrices), np.nan),
        tuple(matrices),
    )
    return Measurements({}, choices, request.offered, errors, weights, {}, evidence, by_shapes=True)


def _from_stats(request: Request, wanted: set[Need], given: Any) -> Measurements:
    config, choices = request.config, request.choices
    if given is None:
        raise StatsError("Nothing to plan. Give MODEL, or --stats with columns name, alpha, variance.")
    if config.noise == "measured":
        raise StatsError("--noise measured needs the weights. Give MODEL, or use --noise analytic.")
    if beyond := wanted - {"errors", "alpha"}:
        raise StatsError(f"--method {config.method} needs the weights ({', '.join(sorted(beyond))}). Give MODEL.")
    known = given.parameters.keys() >= given.spectra.keys()
    weights = np.array([given.parameters[name] if known else 1 for name in given.spectra], dtype=np.int64)
    errors = np.array(
        [
            [_expected(own, choice, own.variance * weight, weight) for choice in choices]
            for own, weight in zip(given.spectra.values(), weights.tolist(), strict=True)
        ]
    )
    energies = np.array([found.variance for found in given.spectra.values()]) * weights
    evidence = Evidence(tuple(given.spectra), choices, errors, energies, weights, _alphas(given.spectra))
    return Measurements(given.spectra, choices, request.offered, errors, weights, given.left_out, evidence)


def _alphas(spectra: dict[str, Spectrum]) -> np.ndarray:
    return np.array([np.nan if found.alpha is None else found.alpha for found in spectra.values()])


def _expected(spectrum: Spectrum, choice: Choice, energy: float, parameters: int) -> float:
    """Σ(w − ŵ)² from a formula: a ggml type's error on Gaussian weights, or Var(W)·2^(−2b)."""
    if choice.scheme or choice.kept:
        return GAUSSIAN_ERROR[str(choice)] * energy
    return float(analytic_noise(spectrum, (choice,))[0]) * parameters


def _synthetic_pass(checkpoint: Checkpoint, bos: bool, cache: Cache | None, wrap: Wrap) -> Calibration:
    """How errors join the signal, seen with random tokens that the model has rewritten once."""

    def run() -> str:
        ids = own_writing(checkpoint, SYNTHETIC_WINDOWS, SYNTHETIC_LENGTH, bos)
        return gather(checkpoint, ids, with_signal=True).to_json()

    prefix = model_prefix(checkpoint) if bos else ()
    given = f"{SYNTHETIC_WINDOWS}x{SYNTHETIC_LENGTH} after {prefix}"
    return _pass(checkpoint, "synthetic", given, run, cache, wrap, "random tokens")


def _text_pass(
    checkpoint: Checkpoint, text: Text, choices: tuple[Choice, ...], cache: Cache | None, wrap: Wrap
) -> Calibration:
    """What the tokens of a text do to each expert."""

    def run() -> str:
        return gather(checkpoint, text.windows(checkpoint), choices, with_baq=True).to_json()

    given = f"{text} {' '.join(map(str, choices))}"
    return _pass(checkpoint, "text", given, run, cache, wrap, f"calibrate on {text.name}")


def _sound(checkpoint: Checkpoint, run: Callable[[], T]) -> T:
    """What a pass through the model found. Raises QuantizationError naming a damaged tensor if it met NaN or infinity.

    Where sound weights overflow, the numbers stay as they are: methods take them for undefined or refuse them.
    """
    try:
        found = run()
    except CheckpointError as error:
        if isinstance(error.__cause__ or error.__context__, torch.linalg.LinAlgError):  # of NaN no matrix is positive
            _refuse_damaged(checkpoint)
        raise
    if not _finite(found):
        _refuse_damaged(checkpoint)
    return found


def _finite(found: Any) -> bool:
    if isinstance(found, float):
        return math.isfinite(found)
    if isinstance(found, Mapping):
        return all(map(_finite, found.values()))
    return not is_dataclass(found) or all(_finite(getattr(found, one.name)) for one in fields(found))


def _refuse_damaged(checkpoint: Checkpoint) -> None:
    """Raise QuantizationError for the first tensor with a weight that is no number, if there is one."""
    held = {matrix.tensor for matrix in checkpoint.matrices}
    for name in sorted(checkpoint.shard_of.keys() - held):
        _refuse_if_damaged(checkpoint.tensor(name), name)
    for matrix in checkpoint.matrices:
        _refuse_if_damaged(checkpoint.read(matrix), matrix.name)


def _refuse_if_damaged(values: torch.Tensor, name: str) -> None:
    if values.is_floating_point() and not math.isfinite(squared_norm(values)):
        raise QuantizationError(f"{name} holds NaN or infinite weights. The checkpoint is damaged.")


def _pass(
    checkpoint: Checkpoint,
    kind: str,
    given: str,
    run: Callable[[], str],
    cache: Cache | None,
    wrap: Wrap,
    label: str,
) -> Calibration:
    """A pass through the model, or what the cache keeps of one with the same model, code and input."""
    depends_on = f"{given} {PROBE} {FORMAT_VERSION} {checkpoint.settings_digest()}"
    key = f"{kind}-{hashlib.sha256(depends_on.encode()).hexdigest()[:24]}.json"
    found = Calibration()
    for _ in wrap([key], 1, label):
        found = Calibration.from_json(run(), key) if cache is None else cache.kept(key, run, Calibration.from_json)
    return found
