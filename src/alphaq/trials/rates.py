"""How fast engines get through weights on this machine: measured format by format when asked for, and kept.

Each format's kernel multiplies one token with a stack of matrices larger than the caches, in several sittings between
which all others have theirs. What a token takes beside its weights is the time of the bundled model, which has few:
whole and with half of its layers, in turns, so that what a layer takes is the difference.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from shutil import copyfile, copytree
from tempfile import TemporaryDirectory

from alphaq.checkpoint.families.architecture import NUMBERED_LAYER
from alphaq.checkpoint.files import memory_bytes
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines import native
from alphaq.engines.gguf import profile as llama_cpp
from alphaq.engines.gguf import rates as in_llama_cpp
from alphaq.engines.profiles import profile
from alphaq.errors import AlphaQError, MissingEngineError, MissingExtraError
from alphaq.formats.kept import KEPT
from alphaq.measuring.bandwidth import Bandwidth, bandwidth_here, keep_bandwidth
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Reads
from alphaq.nouns.rates import SECOND_NS, Rates
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import make_plan, measure_for_plan, resolve
from alphaq.runtime import rates as in_native
from alphaq.work.cores import available_cores
from alphaq.work.locks import alone
from alphaq.work.timing import agree
from alphaq.work.workers import Wrap, silent
from alphaq.writing.quantizing import quantize
from alphaq.writing.records import WriteOptions

STACK_BYTES = 2**28
BESIDE_BITS = 4
"""Of the bundled model's weights while what is beside them is timed."""
BESIDE = "layer and token"
SITTINGS = 3
ROUND_RATE, ROUND_NS = 10**7, 1000
"""Nobody measures more exactly, and a plan repeats what was measured."""


@dataclass(frozen=True)
class Clock:
    """What is timed of an engine. kernel_rates: (choices, bytes of weights at most, threads, how progress is shown) →
    bytes per second of each. step_seconds: (output folder, threads) → seconds of a token. version: of what is timed."""

    kernel_rates: Callable[[Sequence[Choice], int, int, Wrap], list[float]]
    step_seconds: Callable[[Path, int], float]
    version: Callable[[], str]


@dataclass(frozen=True)
class Measured:
    """An engine's rates here. doubtful: formats, or BESIDE, whose sittings differ too much to be kept; missing: why
    only the memory's rate is known."""

    rates: Rates
    doubtful: frozenset[str] = frozenset()
    missing: str = ""


CLOCKS = {
    native.PROFILE.name: Clock(in_native.kernel_rates, in_native.step_seconds, in_native.version),
    llama_cpp.PROFILE.name: Clock(in_llama_cpp.kernel_rates, in_llama_cpp.step_seconds, in_llama_cpp.version),
}
"""Of engines that run here. Others are taken to be as fast as memory."""


def rates_here(folder: Path, engine: str, choices: Iterable[Choice], wrap: Wrap = silent) -> Measured:
    """An engine's rates of some choices and of what is kept, on this machine: known in a folder, or measured and kept
    there. Of an engine that does not run here: the memory's.

    Raises AlphaQError where an engine is there and cannot be measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / "bandwidth.lock"):  # who measures beside another measures wrong, and writes over it
        known = bandwidth_here(folder)
        if engine not in CLOCKS:
            return Measured(Rates(memory=known.bytes_per_second), missing=f"{engine} is not measured by AlphaQ.")
        try:
            found = _known_or_measured(known, engine, choices, wrap)
        except (MissingEngineError, MissingExtraError) as error:
            return Measured(Rates(memory=known.bytes_per_second), missing=str(error))
        except AlphaQError as error:
            raise AlphaQError(f"{engine} cannot be measured. State --bandwidth 80GB/s instead. {error}") from error
        _keep(folder, known, engine, found)
    return replace(found, rates=found.rates.among(map(str, (*choices, *_beside_choices(engine)))))


def all_rates_here(folder: Path, again: bool = False, wrap: Wrap = silent) -> tuple[Bandwidth, dict[str, Measured]]:
    """What this machine's memory and each engine's usual choices do."""
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / "bandwidth.lock"):
        bandwidth_here(folder, again)
    found = {engine: rates_here(folder, engine, _usual_choices(engine), wrap) for engine in CLOCKS}
    engines = {engine: one.rates for engine, one in found.items() if not one.missing}
    return bandwidth_here(folder).model_copy(update={"engines": engines}), found


def _version(engine: str) -> str:
    """What rates are of: others are measured anew. How threads wait for one another may halve them."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    return ", ".join(
        [CLOCKS[engine].version(), *(f"{name}={os.environ[name]}" for name in names if name in os.environ)]
    )


def _usual_choices(engine: str) -> tuple[Choice, ...]:
    """Those that plans for an engine may use unless others are named."""
    return (*profile(engine).defaults, *resolve(PlanConfig(budget=Budget(bits=BESIDE_BITS), engine=engine)).plain)


def _beside_choices(engine: str) -> tuple[Choice, Choice]:
    """What the bundled model is stored at while it is timed."""
    return profile(engine).with_bits(BESIDE_BITS), KEPT


def _keep(folder: Path, known: Bandwidth, engine: str, found: Measured) -> None:
    """Write down what is new and not in doubt: nothing of an engine whose times beside its weights are."""
    if found.doubtful & {BESIDE, *map(str, _beside_choices(engine))}:
        return
    formats = tuple(one for one in found.rates.formats if one[0] not in found.doubtful)
    engines = known.engines | {engine: found.rates.model_copy(update={"formats": formats})}
    versions = known.versions | {engine: _version(engine)}
    if (engines, versions) != (known.engines, known.versions):
        keep_bandwidth(folder, known.model_copy(update={"engines": engines, "versions": versions}))


def _known_or_measured(known: Bandwidth, engine: str, choices: Iterable[Choice], wrap: Wrap) -> Measured:
    """What is known of an engine as it is installed now, and what was measured for lack of it."""
    found = Measured(Rates(memory=known.bytes_per_second))
    if engine in known.engines and known.versions.get(engine) == _version(engine):
        found = Measured(known.engines[engine])
    else:  # first what is quick, so that an engine that is not whole is found out
        found = _with_times(engine, _with_formats(found, engine, _beside_choices(engine), wrap))
    return _with_formats(found, engine, choices, wrap)


def _with_formats(found: Measured, engine: str, choices: Iterable[Choice], wrap: Wrap) -> Measured:
    """With rates of choices that have none yet: of several sittings, each of all choices, the best, since others only
    disturb. In doubt is what no two of them agree on."""
    own = {name for name, _ in found.rates.formats}
    wanted = {str(choice): choice for choice in sorted(choices) if str(choice) not in own}
    if not wanted:
        return found
    sittings = [
        CLOCKS[engine].kernel_rates(list(wanted.values()), stack_bytes(), available_cores(), wrap)
        for _ in range(SITTINGS)
    ]
    by_name = dict(zip(wanted, zip(*sittings, strict=True), strict=True))
    rounded = {name: max(ROUND_RATE, round(max(rates) / ROUND_RATE) * ROUND_RATE) for name, rates in by_name.items()}
    doubtful = {name for name, rates in by_name.items() if not agree([1 / one for one in rates])}
    formats = tuple(sorted([*found.rates.formats, *rounded.items()]))
    return replace(found, rates=found.rates.model_copy(update={"formats": formats}), doubtful=found.doubtful | doubtful)


def stack_bytes() -> int:
    """Of weights that are multiplied: larger than most caches, and a sixteenth of the memory at most."""
    return min(STACK_BYTES, (memory_bytes() or 16 * STACK_BYTES) // 16)


def _with_times(engine: str, found: Measured) -> Measured:
    """With what a layer and a token take beside their weights; the formats of the bundled model are known."""
    with TemporaryDirectory() as scratch, as_file(files("alphaq") / "data" / "tiny") as tiny:
        models = [_quantized(engine, model, Path(scratch)) for model in (tiny, _halved(tiny, Path(scratch) / "half"))]
        turns = [
            [CLOCKS[engine].step_seconds(one.folder, available_cores()) for one in models] for _ in range(SITTINGS)
        ]
    return split_times(found, [one.reads for one in models], list(zip(*turns, strict=True)))


def split_times(found: Measured, reads: Sequence[Reads], seconds: Sequence[Sequence[float]]) -> Measured:
    """The times of a layer and of a token beside, of two models that differ in layers alone. seconds: of a token of
    each, in several turns; the best counts.

    Models so small lie in caches, faster than the rates of their formats, which may leave nothing for a token. But a
    layer more that takes less is a measurement in doubt.
    """
    best = [round(min(turns) * SECOND_NS) for turns in seconds]
    whole, half = (taken - found.rates.token_time_ns(one.by_choice, 0) for taken, one in zip(best, reads, strict=True))
    layer = (whole - half) // (reads[0].layers - reads[1].layers)
    token = half - reads[1].layers * max(0, layer)
    times = (max(0, round(one / ROUND_NS) * ROUND_NS) for one in (layer, token))
    doubtful = best[0] < best[1] or not all(map(agree, seconds))
    rates = found.rates.model_copy(update=dict(zip(("layer_ns", "token_ns"), times, strict=True)))
    return replace(found, rates=rates, doubtful=found.doubtful | ({BESIDE} if doubtful else set()))


@dataclass(frozen=True)
class _Quantized:
    """A model in an output folder, and what a token reads of it."""

    folder: Path
    reads: Reads


def _quantized(engine: str, model: Path, scratch: Path) -> _Quantized:
    checkpoint, out = open_checkpoint(model), scratch / f"{model.name}-quantized"
    config = PlanConfig(budget=Budget(bits=BESIDE_BITS), engine=engine, method="uniform", noise="analytic")
    request = resolve(config)
    plan = make_plan(checkpoint, request, measure_for_plan(checkpoint, request))
    quantize(checkpoint, plan, out, WriteOptions(check=False))
    assert plan.reads is not None  # its files are not coded
    return _Quantized(out, plan.reads)


def _halved(model: Path, out: Path) -> Path:
    """A copy of a model with the first half of its layers."""
    from safetensors.torch import load_file, save_file

    copytree(model, out, copy_function=copyfile)  # without modes: an installation may be read-only
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    layers = config["num_hidden_layers"] // 2
    config |= {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(out / "model.safetensors")
    gone = [name for name in tensors if (number := NUMBERED_LAYER.fullmatch(name)) and int(number[1]) >= layers]
    save_file({name: tensors[name] for name in tensors.keys() - set(gone)}, out / "model.safetensors", {"format": "pt"})
    return out
