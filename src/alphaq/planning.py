"""The stage that makes a plan: what is asked for, what must be known for it, what the budget allows, what is best."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

import alphaq
from alphaq.allocation.problem import Problem, solve_experts, solve_losses, solve_order, solve_shares
from alphaq.cache import Cache
from alphaq.calibration.prior import routing_prior
from alphaq.calibration.stream import random_windows, read_windows
from alphaq.calibration.traffic import Calibration, gather
from alphaq.checkpoint.reader import Checkpoint
from alphaq.config import PlanConfig, Rule
from alphaq.engines import native
from alphaq.engines.llama_cpp import GAUSSIAN_ERROR
from alphaq.engines.profile import Profile
from alphaq.engines.profiles import profile as engine_profile
from alphaq.errors import BudgetError, ChoiceError, StatsError
from alphaq.measurement import measure
from alphaq.records import Choice, MatrixRef, Plan, PlanTable, Solution, Spectrum
from alphaq.sensitivity.distortion import analytic_noise
from alphaq.sensitivity.methods import Evidence, Method, Need, method, resolved_gamma
from alphaq.spectra.measure import read_stats
from alphaq.spectra.variants import SpectrumVariant
from alphaq.workers import Workers

Wrap = Callable[[Iterable[Any], int, str], Iterable[Any]]
WIDTHS = (*range(1, 9), 16)
SYNTHETIC_WINDOWS, SYNTHETIC_LENGTH = 8, 256
CALIBRATION_LENGTH = 512
CALIBRATION_TOKENS = 16_384


@dataclass(frozen=True)
class Request:
    """A config made concrete: which engine, which method, which choices, and how they are accounted.

    choices: every column of the tables, pins included. ladder: the plain choice of each width that is a column.
    offered: those that unpinned matrices may take.
    """

    config: PlanConfig
    profile: Profile
    method: Method
    choices: tuple[Choice, ...]
    offered: frozenset[Choice]
    ladder: tuple[Choice, ...]

    def choice(self, text: str) -> Choice:
        """A choice as a user writes it, for this engine. Raises ChoiceError if it cannot be stored."""
        return parse_choice(text, self.profile, self.config)


def resolve(config: PlanConfig, with_model: bool = True) -> Request:
    """Check a config as far as it can be without a checkpoint. Raises AlphaQError.

    Without a model the default method is `alphaq`, since the others need weights.
    """
    if config.method == "auto" and not with_model:
        config = config.model_copy(update={"method": "alphaq"})
    chosen = method(config.method)
    profile = engine_profile(config.engine)
    if chosen.kind == "expert" and profile.unit != "matrix":
        raise BudgetError(
            f"--method {config.method} chooses per expert, but in {profile.name} experts share a choice. "
            "Use another method or engine."
        )
    preset = {key: value for key, value in chosen.preset.items() if _is_unset(getattr(config, key))}
    config = config.model_copy(update=preset)
    if config.choices is None:
        given = [_storable(_styled(choice, config), profile) for choice in profile.defaults]
    else:
        given = [parse_choice(text, profile, config) for text in config.choices.split(",") if text.strip()]
        if not given:
            raise BudgetError("--choices is empty. Give at least one, for example 1,2,3,4.")
    ladder = _ladder(profile, config, given)
    # Code bits see no scales, so that the finest groups would come for nothing.
    codes_only = config.choices is None and config.budget.bits is not None and (config.unweighted or not with_model)
    if chosen.kind in ("order", "ratio", "expert") or codes_only:
        widths = {choice.bits for choice in given}
        given = [choice for choice in ladder if choice.bits in widths]
        if not given:
            raise BudgetError(
                f"--method {config.method} goes by plain widths, and {profile.name} has none of "
                f"{', '.join(map(str, sorted(widths)))} bits. Offer other --choices."
            )
    offered = frozenset(given)
    pinned = {parse_choice(rule.value, profile, config) for rule in config.pins}
    choices = tuple(sorted(offered | pinned))
    if "outputs" in chosen.needs and any(choice.scheme for choice in choices):
        raise BudgetError(
            f"--method {config.method} needs every choice's output, and {profile.name}'s quantizer is not ours. Use "
            "another method, such as hessian."
        )
    if config.noise is None:
        schemes = any(choice.scheme for choice in choices)
        config = config.model_copy(update={"noise": "measured" if with_model and not schemes else "analytic"})
    elif config.noise == "measured" and any(choice.scheme for choice in choices):
        raise BudgetError(
            f"--noise measured cannot be had for {profile.name}: its quantizer is not ours. Use --noise analytic, "
            "which takes each type's error on Gaussian weights."
        )
    for option, rules in (("--min-bits", config.min_bits), ("--max-bits", config.max_bits)):
        for rule in rules:
            rule.number(option)
    for bits in config.roles().values():
        profile.with_bits(bits)
    if config.unweighted and config.budget.bpw is not None:
        raise BudgetError("--unweighted counts matrices, so stored bits per weight mean nothing. Use --bits or --size.")
    return Request(config, profile, chosen, choices, offered, ladder)


def _is_unset(setting: Any) -> bool:
    """Whether a setting is at its default; a 0 is not, though it equals False."""
    return setting is None or setting is False or setting == "auto"


def parse_choice(text: str, profile: Profile, config: PlanConfig) -> Choice:
    """'3' is the engine's usual 3-bit choice (at --group-size, --symmetric); '3g64', '4g128s', 'Q4_K', '16' are exact.

    Raises ChoiceError if the engine cannot store it.
    """
    text = text.strip()
    if text.isdigit():
        choice = _styled(profile.with_bits(int(text)), config)
    else:
        choice = Choice.parse(text, config.group_size or 128, config.symmetric)
    return _storable(choice, profile)


def _storable(choice: Choice, profile: Profile) -> Choice:
    if choice not in profile.choices:
        raise ChoiceError(f"{profile.name} cannot store {choice}. Available: {', '.join(map(str, profile.choices))}.")
    return choice


def _styled(choice: Choice, config: PlanConfig) -> Choice:
    """A plain choice with the group size and symmetry that the user asked for."""
    if choice.scheme or choice.bits == 16:
        return choice
    return replace(
        choice,
        group_size=config.group_size or choice.group_size,
        symmetric=config.symmetric or choice.symmetric,
    )


def _ladder(profile: Profile, config: PlanConfig, given: Sequence[Choice]) -> tuple[Choice, ...]:
    """The plain choice of every width the engine has; in the coarsest groups offered, if the user named choices."""
    groups = [choice.group_size for choice in given if not choice.scheme and choice.bits != 16]
    rungs = []
    for bits in WIDTHS:
        try:
            choice = _styled(profile.with_bits(bits), config)
        except ChoiceError:
            continue
        if config.choices is not None and groups and not choice.scheme and choice.bits != 16:
            symmetric = all(other.symmetric for other in given if other.bits != 16)
            choice = replace(choice, group_size=max(groups), symmetric=symmetric)
        if choice in profile.choices:
            rungs.append(choice)
    return tuple(rungs)


@dataclass(frozen=True)
class Measurements:
    """What was measured of the matrices to plan; enough for any number of budgets and methods that need no more.

    squared_errors: expected Σ(w − ŵ)² [matrices, choices]. weights: parameters, or ones where unknown.
    """

    spectra: dict[str, Spectrum]
    choices: tuple[Choice, ...]
    squared_errors: np.ndarray
    weights: np.ndarray
    left_out: dict[str, str]
    evidence: Evidence
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that each need took in this run; what the cache held took next to none."""


def measure_for_plan(
    checkpoint: Checkpoint | None,
    request: Request,
    stats: Path | None = None,
    wrap: Wrap = lambda items, total, label: items,
    workers: Workers | None = None,
    cache: Cache | None = None,
    device: str = "cpu",
    calibration: Path | None = None,
    needs: Iterable[Need] | None = None,
) -> Measurements:
    """What the request's method needs to know of the matrices to plan, from the weights, a stats file, or both.

    needs: measure for these instead of the method's own. Raises StatsError if the stats lack a matrix of the
    checkpoint, or the method needs weights or a text that were not given.
    """
    config, choices = request.config, request.choices
    wanted = set(request.method.needs if needs is None else needs)
    given = read_stats(stats) if stats is not None else None
    if checkpoint is None:
        return _from_stats(request, wanted, given)

    matrices = native.planned_matrices(checkpoint)
    problem_of(checkpoint, request)  # an infeasible budget is told before any measuring
    if given is not None:
        for matrix in matrices:
            if matrix.name not in given.spectra:
                reason = given.left_out.get(matrix.name, "no row")
                raise StatsError(f"{stats} has no usable row for {matrix.name!r} ({reason}). Analyze this model again.")
    if "text" in wanted and calibration is None:
        raise StatsError(f"--method {config.method} needs a text. Give one with --calibration FILE.")
    real = tuple(choice for choice in choices if choice.bits != 16) if config.noise == "measured" else ()
    variant = SpectrumVariant(config.spectrum, config.tail)
    begin = time.perf_counter()
    results = measure(
        matrices,
        workers or Workers(1, checkpoint),
        cache,
        given is None,
        real,
        device,
        "statistics" in wanted,
        variant,
    )
    spectra, rows, statistics = {}, [], []
    for matrix, found in zip(matrices, wrap(results, len(matrices), "measure"), strict=True):
        own = found.spectrum or (given.spectra[matrix.name] if given is not None else None)
        assert own is not None  # measured unless given
        spectra[matrix.name] = own
        energy = own.mean_square * matrix.parameters
        rows.append([found.squared_errors.get(c, _expected(own, c, energy, matrix.parameters)) for c in choices])
        if found.statistics is not None:
            statistics.append(found.statistics)
    seconds = {"errors": time.perf_counter() - begin}
    weights = np.array([matrix.parameters for matrix in matrices], dtype=np.int64)
    errors = np.array(rows)
    left_out = {} if given is None else {n: why for n, why in given.left_out.items() if "not an expert" not in why}
    passes: dict[Need, Callable[[], Any]] = {
        "prior": lambda: routing_prior(checkpoint),
        "synthetic": lambda: _synthetic_pass(checkpoint, cache, wrap),
        "text": lambda: _text_pass(
            checkpoint, cast(Path, calibration), choices if "outputs" in wanted else (), cache, wrap
        ),
    }
    seen: dict[Need, Any] = {}
    for need, run in passes.items():
        if need in wanted:
            begin = time.perf_counter()
            seen[need] = run()
            seconds[need] = time.perf_counter() - begin
    evidence = Evidence(
        tuple(spectra),
        choices,
        errors,
        np.array([found.mean_square for found in spectra.values()]) * weights,
        weights,
        _alphas(spectra),
        tuple(matrices),
        tuple(statistics) if statistics else None,
        seen.get("prior"),
        seen.get("synthetic"),
        seen.get("text"),
    )
    return Measurements(spectra, choices, errors, weights, left_out, evidence, seconds)


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
    return Measurements(given.spectra, choices, errors, weights, given.left_out, evidence)


def _alphas(spectra: dict[str, Spectrum]) -> np.ndarray:
    return np.array([np.nan if found.alpha is None else found.alpha for found in spectra.values()])


def _expected(spectrum: Spectrum, choice: Choice, energy: float, parameters: int) -> float:
    """Σ(w − ŵ)² from a formula: a ggml type's error on Gaussian weights, or Var(W)·2^(−2b)."""
    if choice.scheme or choice.bits == 16:
        return GAUSSIAN_ERROR[str(choice)] * energy
    return float(analytic_noise(spectrum, (choice,))[0]) * parameters


def _synthetic_pass(checkpoint: Checkpoint, cache: Cache | None, wrap: Wrap) -> Calibration:
    """How errors join the signal, seen with random tokens."""

    def run() -> str:
        vocabulary = int(checkpoint.text_config["vocab_size"])
        ids = random_windows(vocabulary, SYNTHETIC_WINDOWS, SYNTHETIC_LENGTH)
        return gather(checkpoint, ids, with_signal=True).to_json()

    key = f"synthetic-{SYNTHETIC_WINDOWS}x{SYNTHETIC_LENGTH}.json"
    text = _kept(cache, key, run, wrap, "random tokens")
    return Calibration.from_json(text, key)


def _text_pass(
    checkpoint: Checkpoint, path: Path, choices: tuple[Choice, ...], cache: Cache | None, wrap: Wrap
) -> Calibration:
    """What the tokens of a user's text do to each expert."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StatsError(f"{path} is no UTF-8 text ({error}). Give one with --calibration.") from error
    digest = hashlib.sha256(f"{content}{choices}{CALIBRATION_LENGTH}{CALIBRATION_TOKENS}".encode()).hexdigest()[:24]

    def run() -> str:
        ids = read_windows(checkpoint.folder, content, CALIBRATION_LENGTH, CALIBRATION_TOKENS)
        return gather(checkpoint, ids, choices, with_baq=True).to_json()

    key = f"text-{digest}.json"
    return Calibration.from_json(_kept(cache, key, run, wrap, f"calibrate on {path.name}"), key)


def _kept(cache: Cache | None, key: str, run: Callable[[], str], wrap: Wrap, label: str) -> str:
    for _ in wrap([key], 1, label):
        text = run() if cache is None else cache.text(key, run)
    return text


def problem_of(checkpoint: Checkpoint | None, request: Request, found: Measurements | None = None) -> Problem:
    """What the budget allows, from shapes alone, and from `found` where a bound needs measured errors.

    Raises BudgetError if it is infeasible, a pin names nothing, or a unit is left without a choice.
    """
    config, choices, profile = request.config, request.choices, request.profile
    ladder = tuple(choices.index(choice) for choice in request.ladder if choice in request.offered)
    if checkpoint is None:
        assert found is not None  # stats are read before
        names = tuple(found.spectra)
        counted = np.ones(len(names), np.int64) if config.unweighted else found.weights
        costs = counted[:, None] * np.array([choice.bits for choice in choices], dtype=np.int64)
        if config.budget.bits is None:
            raise BudgetError("Stats alone know no bytes. State the budget as --bits, or give MODEL.")
        if config.engine != "native" or config.pins or config.min_bits or config.max_bits or config.per_layer:
            raise BudgetError("--engine, pins, bounds and --per-layer need to know the matrices. Give MODEL.")
        limit = math.floor(config.budget.bits * int(counted.sum()) + 1e-9)
        problem = Problem(
            names,
            np.arange(len(names)),
            choices,
            costs,
            _clear_enough(config, found),
            limit,
            np.full(len(names), -1),
            ladder,
        )
        floor = int(problem.unit_costs.min(axis=1).sum())
        problem.check(str(config.budget), _least(problem, config, f"--bits {_up(floor / int(counted.sum()))}"))
        return problem

    matrices = native.planned_matrices(checkpoint)
    fixed_choices(checkpoint, request)  # a pin that names nothing is told before any measuring
    allowed = allowed_choices(request, matrices)
    if found is not None:
        allowed &= _clear_enough(config, found)
    units = [profile.unit_of(matrix) for matrix in matrices]
    names = tuple(dict.fromkeys(units))
    numbers = {name: number for number, name in enumerate(names)}
    owner = np.array([numbers[unit] for unit in units])
    layers = np.full(len(names), -1)
    for number, matrix in zip(owner, matrices, strict=True):
        layers[number] = -1 if matrix.layer is None else matrix.layer
    blocks, in_file = byte_tables(profile, matrices, choices)
    parameters = sum(matrix.parameters for matrix in matrices)
    fixed_bytes = 0
    if config.budget.bits is not None and config.unweighted:
        costs = np.tile(np.array([choice.bits for choice in choices], dtype=np.int64), (len(matrices), 1))
        limit = math.floor(config.budget.bits * len(matrices) + 1e-9)
    elif config.budget.bits is not None:
        costs, limit = blocks, nominal_bytes(request, matrices, config.budget.bits)
    elif config.budget.bpw is not None:
        costs, limit = blocks, math.floor(config.budget.bpw * parameters / 8 + 1e-9)
    else:
        assert config.budget.size_bytes is not None
        fixed_bytes = size_bytes(checkpoint, request, {matrix.name: Choice(16) for matrix in matrices})
        kept = byte_tables(profile, matrices, (Choice(16),))[1]
        fixed_bytes -= int(kept.sum())
        costs, limit = in_file, config.budget.size_bytes - fixed_bytes
    problem = Problem(names, owner, choices, costs, allowed, limit, layers, ladder)
    floor = int(problem.unit_costs.min(axis=1).sum())
    if config.budget.size_bytes is not None:
        least = f"--size {floor + fixed_bytes}"
    elif config.budget.bpw is not None:
        least = f"--bpw {_up(8 * floor / parameters)}"
    elif config.unweighted:
        least = f"--bits {_up(floor / len(matrices))}"
    else:
        least = f"--bits {_up(_nominal_bits(request, matrices, floor))}"
    problem.check(str(config.budget), _least(problem, config, least))
    return problem


def _clear_enough(config: PlanConfig, found: Measurements) -> np.ndarray:
    """bool [matrices, choices]: no noisier than --min-sqnr allows."""
    most = math.inf if config.min_sqnr_db is None else 10 ** (-config.min_sqnr_db / 10)
    return found.evidence.relative_errors <= most


def _up(bits: float) -> str:
    return f"{math.ceil(bits * 1e4 - 1e-6) / 1e4:g}"


def _least(problem: Problem, config: PlanConfig, least: str) -> str:
    """The smallest feasible budget, the choice that most experts have in it, and the ways out."""
    cheapest = problem.chosen(problem.unit_costs.argmin(axis=1))
    narrowest = problem.choices[int(np.bincount(cheapest).argmax())]
    ways = ["Raise it"]
    if config.min_bits or config.pins or config.min_sqnr_db is not None:
        ways.append("relax pins and bounds")
    if narrowest.bits > 1:
        ways.append("allow narrower --choices")
    if narrowest.group_size in (32, 64):
        ways.append("use a larger --group-size")
    return f"{least} with most experts at {narrowest}. {', or '.join(ways)}"


def allowed_choices(request: Request, matrices: Sequence[MatrixRef]) -> np.ndarray:
    """bool [matrices, choices] after offers, bounds, pins and what the engine can store.

    Raises BudgetError for a rule that names no matrix.
    """
    config, choices = request.config, request.choices
    allowed = np.tile([choice in request.offered for choice in choices], (len(matrices), 1))
    bits = np.array([choice.bits for choice in choices])
    for option, rules, keeps in (
        ("--min-bits", config.min_bits, lambda least: bits >= least),
        ("--max-bits", config.max_bits, lambda most: bits <= most),
    ):
        for rule in rules:
            allowed[_named(rule, option, matrices)] &= keeps(rule.number(option))
    for rule in config.pins:
        rows = [number for number, matrix in enumerate(matrices) if rule.matches(matrix)]
        allowed[rows] = [choice == request.choice(rule.value) for choice in choices]
    shapes: dict[tuple[Any, Choice], bool] = {}
    for number, matrix in enumerate(matrices):
        for column, choice in enumerate(choices):
            key = (matrix.shape, choice)
            if key not in shapes:
                shapes[key] = request.profile.obstacle(choice, matrix) is None
            allowed[number, column] &= shapes[key]
    return allowed


def _named(rule: Rule, option: str, matrices: Sequence[MatrixRef]) -> list[int]:
    rows = [number for number, matrix in enumerate(matrices) if rule.matches(matrix)]
    if not rows:
        raise BudgetError(
            f"{option} {rule.pattern!r} names no matrix of the budget. Write a projection (down), a role (expert) or "
            f"a glob on names such as {matrices[0].name!r}."
        )
    return rows


def fixed_choices(checkpoint: Checkpoint, request: Request) -> dict[str, Choice]:
    """Choices of matrices outside the budget: by role, or by a pin. Raises BudgetError for a pin that names nothing."""
    widths = {role: str(bits) for role, bits in request.config.roles().items()}
    quantizable = [matrix for matrix in checkpoint.matrices if matrix.role in widths]
    found = {matrix.name: request.choice(widths[matrix.role]) for matrix in quantizable}
    planned = native.planned_matrices(checkpoint)
    for rule in request.config.pins:
        outside = [matrix for matrix in quantizable if rule.matches(matrix)]
        if not outside:
            _named(rule, "--pin", planned)
        found.update({matrix.name: request.choice(rule.value) for matrix in outside})
    for matrix in quantizable:
        if why := request.profile.obstacle(found[matrix.name], matrix):
            raise BudgetError(
                f"{request.profile.name} cannot store {matrix.name} as {found[matrix.name]}: {why}. Keep it with "
                f"--pin '{matrix.name}=16', or its role with --attention-bits 16 or --shared-bits 16."
            )
    return found


def byte_tables(
    profile: Profile, matrices: Sequence[MatrixRef], choices: tuple[Choice, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of each matrix at each choice, int64 [matrices, choices]: its data alone, and what it adds to the files.

    Only the native profile writes files whose headers are known before; elsewhere both are the data. A choice that
    a matrix cannot take (see `Profile.obstacle`) is never chosen, and counted as 16 bits.
    """
    if profile.name == native.PROFILE.name:
        return native.byte_tables(list(matrices), choices)
    known: dict[Any, int] = {}
    table = np.empty((len(matrices), len(choices)), np.int64)
    for number, matrix in enumerate(matrices):
        for column, choice in enumerate(choices):
            key = (matrix.shape, choice)
            if key not in known:
                possible = profile.obstacle(choice, matrix) is None
                known[key] = profile.storage_bytes(choice if possible else Choice(16), matrix.shape)
            table[number, column] = known[key]
    return table, table


def nominal_bytes(request: Request, matrices: Sequence[MatrixRef], bits: float) -> int:
    """Bytes of the experts at `bits` on average in plain choices: what a uniform mix of the engine's widths takes.

    Raises BudgetError if the engine has no plain choice that narrow.
    """
    rungs = sorted(request.ladder, key=lambda choice: choice.bits)
    if not rungs or bits < rungs[0].bits:
        least = rungs[0].bits if rungs else 16
        raise BudgetError(
            f"A budget of {bits:g} bits is below --bits {least}, the narrowest usual width of {request.profile.name}. "
            f"Raise it, or state the bytes with --size or --bpw."
        )
    low = max((choice for choice in rungs if choice.bits <= bits), key=lambda choice: choice.bits)
    high = min((choice for choice in rungs if choice.bits >= bits), key=lambda choice: choice.bits, default=low)
    share = 0.0 if high == low else (bits - low.bits) / (high.bits - low.bits)
    table, _ = byte_tables(request.profile, matrices, (low, high))
    totals = table.sum(axis=0)
    return math.floor((1 - share) * int(totals[0]) + share * int(totals[1]) + 1e-6)


def _nominal_bits(request: Request, matrices: Sequence[MatrixRef], nbytes: int) -> float:
    """The inverse of `nominal_bytes`: bits per weight of the plain mix that takes so many bytes."""
    rungs = sorted(request.ladder, key=lambda choice: choice.bits)
    totals = byte_tables(request.profile, matrices, tuple(rungs))[0].sum(axis=0)
    return float(np.interp(nbytes, totals, [choice.bits for choice in rungs]))


def size_bytes(checkpoint: Checkpoint, request: Request, chosen: dict[str, Choice]) -> int:
    """Bytes of all weight files (native, headers included) or of all tensors' data (other engines)."""
    choices = fixed_choices(checkpoint, request) | chosen
    if request.profile.name == native.PROFILE.name:
        return native.size_bytes(checkpoint, choices)
    by_name = {matrix.name: matrix for matrix in checkpoint.matrices}
    replaced = sum(checkpoint.stored_bytes(by_name[name]) for name in choices)
    stored = sum(request.profile.storage_bytes(choice, by_name[name].shape) for name, choice in choices.items())
    return checkpoint.nbytes - replaced + stored


def plain_size(checkpoint: Checkpoint, request: Request, bits: float) -> int:
    """`--size` that holds a plain mix of `bits` on average exactly: what all methods get when they are compared."""
    matrices = native.planned_matrices(checkpoint)
    kept = {matrix.name: Choice(16) for matrix in matrices}
    data, _ = byte_tables(request.profile, matrices, (Choice(16),))
    return size_bytes(checkpoint, request, kept) - int(data.sum()) + nominal_bytes(request, matrices, bits)


def make_plan(checkpoint: Checkpoint | None, request: Request, found: Measurements) -> Plan:
    """Solve the budget and describe the result.

    `found` may hold more choices than are asked for. Raises BudgetError if it lacks one, or nothing fits.
    """
    if lacking := set(request.choices) - set(found.choices):
        raise BudgetError(
            f"{', '.join(map(str, sorted(lacking)))} was not measured. Measure for this request, or plan with the "
            "same choices."
        )
    request = replace(request, choices=found.choices)
    config, choices = request.config, request.choices
    problem = problem_of(checkpoint, request, found)
    evidence = _accounted(replace(found.evidence, gamma=config.gamma, seed=config.seed), request)
    solution, losses = _solve(problem, request, evidence)

    columns = problem.chosen(solution.columns)
    chosen = {name: choices[column] for name, column in zip(evidence.names, columns, strict=True)}
    parameters = int(found.weights.sum())
    fixed = {} if checkpoint is None else fixed_choices(checkpoint, request)
    blocks = None
    if checkpoint is not None:
        table, _ = byte_tables(request.profile, evidence.matrices, choices)
        blocks = int(table[np.arange(len(columns)), columns].sum())
    resolved = config.model_copy(update={"gamma": resolved_gamma(evidence)} if config.method == "alphaq" else {})
    unit = next(name for name, value in config.budget.model_dump().items() if value is not None)
    bounded = np.isfinite(solution.lower_bound)
    return Plan(
        alphaq_version=alphaq.__version__,
        engine=request.profile.name,
        source=None if checkpoint is None else checkpoint.identity,
        config=resolved.model_dump(mode="json"),
        average_bits=float(found.weights @ [choice.bits for choice in chosen.values()] / parameters),
        bits_per_weight=None if blocks is None else 8 * blocks / parameters,
        size_bytes=None if checkpoint is None else size_bytes(checkpoint, request, chosen),
        budget_unit=unit,
        budget_slack=float(problem.limit - solution.cost),
        objective=solution.objective,
        lower_bound=solution.lower_bound if bounded else None,
        price=solution.price if bounded else None,
        histogram=dict(sorted(Counter(choice.bits for choice in chosen.values()).items())),
        assignment={name: choice.bits for name, choice in chosen.items()},
        choices={name: str(choice) for name, choice in (chosen | fixed).items()},
        alpha={name: s.alpha for name, s in found.spectra.items() if s.alpha is not None},
        unplanned=found.left_out,
        neutral={name: s.reason for name, s in found.spectra.items() if s.alpha is None},
        table=_table(problem, losses, evidence),
    )


def _accounted(evidence: Evidence, request: Request) -> Evidence:
    """Per weight instead of per matrix where every matrix is to count once."""
    if not request.config.unweighted:
        return evidence
    counts = evidence.weights
    return replace(
        evidence,
        errors=evidence.errors / counts[:, None],
        energies=evidence.energies / counts,
        weights=np.ones_like(counts),
    )


def _solve(problem: Problem, request: Request, evidence: Evidence) -> tuple[Solution, np.ndarray]:
    """The solution and the losses [matrices, choices] that it is judged by."""
    kind, rule = request.method.kind, request.method.rule
    per_layer = request.config.per_layer
    if kind in ("order", "ratio"):
        if per_layer:
            raise BudgetError(f"--per-layer needs losses, and {request.config.method} only has an order. Drop it.")
        scores = None if rule is None else rule(evidence)
        if kind == "ratio":
            assert scores is not None  # the table has a rule for it
            return solve_shares(problem, scores, evidence.errors), evidence.errors
        return solve_order(problem, scores, evidence.errors), evidence.errors
    assert rule is not None  # losses come from a rule
    with np.errstate(over="ignore", invalid="ignore"):  # the solver refuses what is not finite, by name
        losses = rule(evidence)
    if kind == "expert":
        experts = [f"layers.{matrix.layer}.experts.{matrix.expert}" for matrix in evidence.matrices]
        return solve_experts(problem, losses, experts), losses
    return solve_losses(problem, losses, per_layer), losses


def _table(problem: Problem, losses: np.ndarray, evidence: Evidence) -> PlanTable:
    """Why the plan is as it is, unit by unit, for `alphaq explain` and reports."""
    totals = problem.per_unit(losses)
    costs = problem.per_unit(problem.costs)
    kinds, kind = np.unique(costs, axis=0, return_inverse=True)
    members: dict[str, list[str]] = {}
    if len(problem.units) != len(evidence.names):
        for number, name in zip(problem.owner, evidence.names, strict=True):
            members.setdefault(problem.units[number], []).append(name)
    return PlanTable(
        choices=tuple(map(str, problem.choices)),
        losses={
            unit: tuple(float(f"{loss:.6g}") if may else None for loss, may in zip(row, mays, strict=True))
            for unit, row, mays in zip(problem.units, totals.tolist(), problem.unit_allowed.tolist(), strict=True)
        },
        costs=tuple(map(tuple, kinds.tolist())),
        cost_of=tuple(kind.reshape(-1).tolist()),
        members={unit: tuple(names) for unit, names in members.items()},
    )
