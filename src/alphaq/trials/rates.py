"""How fast engines get through weights on this machine: measured format by format when asked for, and kept.

Each format's kernel multiplies one token with a stack of matrices larger than the caches. What a token takes beside its
weights is the time of the bundled model, which has few: whole and with half of its layers, so that what a layer takes
is the difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

from alphaq.checkpoint.families.architecture import NUMBERED_LAYER
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines import native
from alphaq.engines.gguf import profile as llama_cpp
from alphaq.engines.gguf import rates as in_llama_cpp
from alphaq.engines.profiles import profile
from alphaq.errors import ChoiceError, MissingEngineError, MissingExtraError
from alphaq.formats.kept import KEPT
from alphaq.measuring.bandwidth import Bandwidth, bandwidth_here, keep_bandwidth, usable_cores
from alphaq.nouns.choice import Choice
from alphaq.nouns.rates import SECOND_NS, Rates
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import make_plan, measure_for_plan, resolve
from alphaq.planning.request import WIDTHS
from alphaq.runtime import rates as in_native
from alphaq.work.workers import Wrap, silent
from alphaq.writing.quantizing import quantize
from alphaq.writing.records import WriteOptions

STACK_BYTES = 2**28
BESIDE_BITS = 4
"""Of the bundled model's weights while what is beside them is timed."""
ROUND_RATE, ROUND_NS = 10**7, 1000
"""Nobody measures more exactly, and a plan repeats what was measured."""


@dataclass(frozen=True)
class Clock:
    """What is timed of an engine. kernel_rates: (choices, bytes of weights at most, threads, how progress is shown) →
    bytes per second of each. step_seconds: (output folder, threads) → seconds of a token."""

    kernel_rates: Callable[[Sequence[Choice], int, int, Wrap], list[float]]
    step_seconds: Callable[[Path, int], float]


CLOCKS = {
    native.PROFILE.name: Clock(in_native.kernel_rates, in_native.step_seconds),
    llama_cpp.PROFILE.name: Clock(in_llama_cpp.kernel_rates, in_llama_cpp.step_seconds),
}
"""Of engines that run here. Others are taken to be as fast as memory."""


def plain_choices(engine: str) -> set[Choice]:
    """The choice of each width that the engine has."""
    found = set()
    for bits in WIDTHS:
        try:
            found.add(profile(engine).with_bits(bits))
        except ChoiceError:
            continue
    return found


def usual_choices(engine: str) -> set[Choice]:
    """Those that plans for an engine may use unless others are named."""
    one = profile(engine)
    return {*one.defaults, *plain_choices(engine)}


def rates_here(folder: Path, engine: str, choices: Iterable[Choice], wrap: Wrap = silent) -> Rates:
    """An engine's rates of some choices and of what is kept, on this machine: known in a folder, or measured and kept
    there. Of an engine that does not run here: the memory's.
    """
    known = bandwidth_here(folder)
    rates = known.engines.get(engine) or Rates(memory=known.bytes_per_second)
    if engine not in CLOCKS:
        return rates
    named = {name for name, _ in rates.formats}
    wanted = {str(choice): choice for choice in (*choices, profile(engine).with_bits(BESIDE_BITS), KEPT)}
    try:
        found = _measured(engine, {name: wanted[name] for name in sorted(wanted.keys() - named)}, wrap)
        rates = rates.model_copy(update={"formats": tuple(sorted([*rates.formats, *found.items()]))})
        if engine not in known.engines:
            rates = _with_times(engine, rates)
    except (MissingEngineError, MissingExtraError):
        return Rates(memory=known.bytes_per_second)
    if found:
        keep_bandwidth(folder, known.model_copy(update={"engines": known.engines | {engine: rates}}))
    return rates.among(wanted)


def all_rates_here(folder: Path, again: bool = False, wrap: Wrap = silent) -> Bandwidth:
    """What is known of this machine once all engines' usual choices are measured."""
    bandwidth_here(folder, again)
    for engine in CLOCKS:
        rates_here(folder, engine, usual_choices(engine), wrap)
    return bandwidth_here(folder)


def _measured(engine: str, choices: Mapping[str, Choice], wrap: Wrap) -> dict[str, int]:
    """Bytes per second of choices by name."""
    if not choices:
        return {}
    found = CLOCKS[engine].kernel_rates(list(choices.values()), STACK_BYTES, usable_cores(), wrap)
    rounded = (max(ROUND_RATE, round(one / ROUND_RATE) * ROUND_RATE) for one in found)
    return dict(zip(choices, rounded, strict=True))


def _with_times(engine: str, rates: Rates) -> Rates:
    """With what a layer and a token take beside their weights; the formats of the bundled model are known."""
    with TemporaryDirectory() as scratch, as_file(files("alphaq") / "data" / "tiny") as tiny:
        half = _halved(tiny, Path(scratch) / "half")
        beside = [_beside(engine, rates, model, Path(scratch)) for model in (tiny, half)]
    (whole_layers, whole), (half_layers, half_beside) = beside
    layer = max(0, (whole - half_beside) // (whole_layers - half_layers))
    token = max(0, half_beside - half_layers * layer)
    rounded = (round(one / ROUND_NS) * ROUND_NS for one in (layer, token))
    return rates.model_copy(update=dict(zip(("layer_ns", "token_ns"), rounded, strict=True)))


def _beside(engine: str, rates: Rates, model: Path, scratch: Path) -> tuple[int, int]:
    """Layers of a model, and nanoseconds of a token beside its weights."""
    checkpoint, out = open_checkpoint(model), scratch / f"{model.name}-quantized"
    config = PlanConfig(budget=Budget(bits=BESIDE_BITS), engine=engine, method="uniform", noise="analytic")
    request = resolve(config)
    plan = make_plan(checkpoint, request, measure_for_plan(checkpoint, request))
    quantize(checkpoint, plan, out, WriteOptions(check=False))
    assert plan.reads is not None  # its files are not coded
    taken = round(CLOCKS[engine].step_seconds(out, usable_cores()) * SECOND_NS)
    return plan.reads.layers, taken - rates.token_time_ns(plan.reads.by_choice, plan.reads.layers)


def _halved(model: Path, out: Path) -> Path:
    """A copy of a model with the first half of its layers."""
    from safetensors.torch import load_file, save_file

    copytree(model, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    layers = config["num_hidden_layers"] // 2
    config |= {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(out / "model.safetensors")
    gone = [name for name in tensors if (number := NUMBERED_LAYER.fullmatch(name)) and int(number[1]) >= layers]
    save_file({name: tensors[name] for name in tensors.keys() - set(gone)}, out / "model.safetensors", {"format": "pt"})
    return out
