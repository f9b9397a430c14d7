"""How fast engines read each format here: measured once, format by format, and what is done where it is not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from alphaq.cli.planning import measured_rates
from alphaq.engines.gguf.library import LlamaError
from alphaq.errors import AlphaQError, MissingEngineError
from alphaq.formats.table import parse_choice
from alphaq.measuring import bandwidth
from alphaq.measuring.bandwidth import Bandwidth, bandwidth_here, keep_bandwidth
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Reads
from alphaq.nouns.rates import Rates
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import resolve
from alphaq.trials import rates
from alphaq.trials.rates import BESIDE, CLOCKS, SITTINGS, Clock, Measured, rates_here, split_times
from alphaq.work.workers import silent
from conftest import Ran

WHOLE, HALF = (Reads(by_choice={"Q4_K": size}, layers=layers) for size, layers in ((2_000_000, 4), (1_000_000, 2)))


@dataclass
class Machine:
    """A stand-in: its memory reads 10 GB/s and its llama.cpp n GB/s of a type of n bits, slower while disturbed."""

    asked: list[list[str]] = field(default_factory=list)
    disturbed: Callable[[Choice, int], float] = lambda choice, sitting: 1.0
    version: str = "1"

    def kernel_rates(self, choices: Sequence[Choice], *_: object) -> list[float]:
        self.asked.append(sorted(map(str, choices)))
        return [(1e9 * choice.bits + 1) / self.disturbed(choice, len(self.asked) % SITTINGS) for choice in choices]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    clock = Clock(found.kernel_rates, lambda *_: 1.0, lambda: found.version)
    monkeypatch.setattr(rates, "CLOCKS", {"llama.cpp": clock})
    monkeypatch.setattr(
        rates, "_with_times", lambda _, known: split_times(known, (WHOLE, HALF), ([5e-3, 9e-3, 5e-3], [3e-3] * 3))
    )
    monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path))
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # commands leave alone what is set
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    keep_bandwidth(tmp_path, Bandwidth(machine=bandwidth.machine_name(), threads=2, bytes_per_second=10**10))
    return found


def test_each_format_is_measured_once(tmp_path: Path, machine: Machine) -> None:
    first = rates_here(tmp_path, "llama.cpp", [parse_choice("Q4_K"), parse_choice("IQ4_NL")]).rates
    assert dict(first.formats) == {name: parse_choice(name).bits * 10**9 for name in ("16", "Q4_K", "IQ4_NL")}
    assert (first.memory, first.layer_ns, first.token_ns) == (10**10, 875_000, 1_000_000)
    assert rates_here(tmp_path, "llama.cpp", [parse_choice("Q4_K")]).rates == first.among(("16", "Q4_K"))
    second = rates_here(tmp_path, "llama.cpp", [parse_choice("Q4_0")])
    assert machine.asked == [["16", "Q4_K"]] * SITTINGS + [["IQ4_NL"]] * SITTINGS + [["Q4_0"]] * SITTINGS
    assert second.rates.layer_ns == 875_000 and not second.doubtful
    assert {"Q4_0", "IQ4_NL"} <= dict(bandwidth_here(tmp_path).engines["llama.cpp"].formats).keys()


def test_another_version_of_an_engine_is_measured_anew(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen() -> int:
        rates_here(tmp_path, "llama.cpp", [])
        return len(machine.asked)

    assert seen() == seen() == SITTINGS
    machine.version = "2"
    assert seen() == seen() == 2 * SITTINGS
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # half as fast
    assert seen() == 3 * SITTINGS


def test_what_others_disturb_is_said_and_not_kept(
    tmp_path: Path, tiny: Path, machine: Machine, alphaq: Callable[..., Ran]
) -> None:
    machine.disturbed = lambda choice, sitting: 1.0 if sitting == 1 or choice.bits != 3 else 2.0 + sitting
    options = ("--engine", "llama.cpp", "--method", "distortion", "--noise", "analytic", "--choices", "Q4_K,Q3_K")
    told = alphaq("plan", tiny, *options, "--size", "14MB", "--min-speed", "1", "--json")
    assert "Q3_K" in told.err.partition("uncertain")[2].partition("took")[0] and "Q4_K" not in told.err
    assert Rates.parse(told.json["config"]["bandwidth"]).of("Q3_K") == 3 * 10**9  # the best of them
    kept = dict(bandwidth_here(tmp_path).engines["llama.cpp"].formats)
    assert "Q4_K" in kept and "Q3_K" not in kept
    machine.disturbed = lambda choice, sitting: 1.0 if sitting == 1 or choice.bits != 16 else 2.0 + sitting
    machine.version = "2"  # what others are told beside is wrong with it: nothing is kept
    assert rates_here(tmp_path, "llama.cpp", []).doubtful == {"16"}
    assert bandwidth_here(tmp_path).versions == {"llama.cpp": "1, OMP_WAIT_POLICY=ACTIVE"}


@pytest.mark.parametrize(
    ("seconds", "times", "doubtful"),
    [
        (([5e-3, 5e-3, 9e-3], [3e-3, 3e-3, 8e-3]), (875_000, 1_000_000), False),
        (([5e-3, 5e-3, 5e-3], [1e-3, 1e-3, 1e-3]), (1_875_000, 0), False),  # a cache holds what it reads
        (([3e-3, 3e-3, 3e-3], [5e-3, 5e-3, 5e-3]), (0, 4_750_000), True),
        (([5e-3, 9e-3, 9e-3], [3e-3, 3e-3, 3e-3]), (875_000, 1_000_000), True),
    ],
)
def test_times_beside_weights_are_told_apart_by_layers(
    seconds: tuple[list[float], ...], times: tuple[int, int], doubtful: bool
) -> None:
    known = Measured(Rates(memory=10**10, formats=(("Q4_K", 4 * 10**9),)))
    found = split_times(known, (WHOLE, HALF), seconds)
    assert (found.rates.layer_ns, found.rates.token_ns) == times and (BESIDE in found.doubtful) == doubtful


def test_two_processes_keep_what_both_measure(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rates.CLOCKS, "native", rates.CLOCKS["llama.cpp"])
    begun, other = threading.Event(), threading.Thread(target=lambda: rates_here(tmp_path, "native", []))
    measure = machine.kernel_rates

    def slow(choices: Sequence[Choice], *_: object) -> list[float]:
        if not begun.is_set():
            begun.set()
            other.start()
            other.join(0.2)  # it waits until this is done
        return measure(choices)

    monkeypatch.setitem(rates.CLOCKS, "llama.cpp", replace(rates.CLOCKS["llama.cpp"], kernel_rates=slow))
    rates_here(tmp_path, "llama.cpp", [])
    other.join()
    assert bandwidth_here(tmp_path).engines.keys() == {"llama.cpp", "native"}


def test_what_does_not_run_here_is_as_fast_as_memory(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, alphaq: Callable[..., Ran]
) -> None:
    def missing(*_: object) -> list[float]:
        raise MissingEngineError("llama.cpp", "'alphaq[gguf]'")

    def broken(*_: object) -> list[float]:
        raise LlamaError("llama.cpp gave up.")

    monkeypatch.setitem(rates.CLOCKS, "llama.cpp", replace(rates.CLOCKS["llama.cpp"], kernel_rates=missing))
    for engine in ("llama.cpp", "vllm"):
        found = rates_here(tmp_path, engine, [])
        assert found.rates == Rates(memory=10**10) and found.missing
    assert "llama.cpp is left out: llama.cpp is not installed" in " ".join(alphaq("bench").err.split())
    assert measured_rates(PlanConfig(budget=Budget(bits=4), engine="vllm")) == Rates(memory=10**10)
    monkeypatch.setitem(rates.CLOCKS, "llama.cpp", replace(rates.CLOCKS["llama.cpp"], kernel_rates=broken))
    with pytest.raises(AlphaQError, match="State --bandwidth"):
        rates_here(tmp_path, "llama.cpp", [])


def test_formats_of_every_role_are_measured(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What options of other roles mean, in the groups that were asked for."""
    monkeypatch.setitem(rates.CLOCKS, "native", rates.CLOCKS["llama.cpp"])
    config = PlanConfig(budget=Budget(bits=2.5), engine="native", choices="2,3", group_size=64, head_bits=8)
    assert {"2g64", "4g64", "5g64", "8g64"} <= dict(measured_rates(config).formats).keys()


@pytest.mark.parametrize(
    ("engine", "given", "plans"),
    [
        ("llama.cpp", "80GB/s, q4_k =1GB/s,F16=2GB/s", "80GB/s,F16=2GB/s,Q4_K=1GB/s"),
        ("native", "80GB/s,4=1GB/s,16=2GB/s", "80GB/s,16=2GB/s,4g128=1GB/s"),
        ("llama.cpp", "80GB/s,q4_k=1GB/s,Q4_K=2GB/s", "names a format twice"),
        ("llama.cpp", "80GB/s,laier=1GB/s", "laier"),
        ("native", "80GB/s,Q4_K=1GB/s", "cannot store Q4_K"),
    ],
)
def test_rates_are_of_formats_that_the_engine_has(engine: str, given: str, plans: str) -> None:
    config = PlanConfig(budget=Budget(bits=4), engine=engine, bandwidth=Rates.parse(given))
    if "=" in plans:
        assert str(resolve(config).config.bandwidth) == plans
    else:
        with pytest.raises(AlphaQError, match=plans):
            resolve(config)


def test_formats_without_a_rate_are_said(tiny: Path, alphaq: Callable[..., Ran]) -> None:
    options = ("--engine", "native", "--method", "distortion", "--noise", "analytic", "--choices", "2,4")
    speed = ("--size", "9MB", "--min-speed", "1", "--bandwidth")
    told = " ".join(alphaq("plan", tiny, *options, *speed, "10GB/s,2g128=1GB/s", "--json").err.split())
    assert "no rate is known of" in told and "4g128 (" in told and "2g128" not in told
    assert "no rate" not in alphaq("plan", tiny, *options, *speed, "10GB/s", "--json").err


def test_plans_go_by_what_was_measured(tiny: Path, machine: Machine, alphaq: Callable[..., Ran]) -> None:
    options = ("--engine", "llama.cpp", "--method", "distortion", "--noise", "analytic", "--choices", "Q4_K")
    told = alphaq("plan", tiny, *options, "--size", "14MB", "--min-speed", "1", "--json")
    assert "llama.cpp's kernels" in told.err
    plan, counted = told.json, Rates.parse(told.json["config"]["bandwidth"])
    assert counted.of("Q4_K") == 4 * 10**9 and counted.layer_ns == 875_000
    shown = alphaq("plan", tiny, *options, "--size", "14MB", "--min-speed", "1")
    taken = counted.token_time_ns(plan["reads"]["by_choice"], plan["reads"]["layers"])
    assert plan["reads"]["layers"] == 4 and f"{1e9 / taken:.3g} tokens per second at" in " ".join(shown.out.split())
    assert "llama.cpp" in alphaq("bench").out


@pytest.mark.parametrize("text", ["80GB/s", "16.49GB/s,Q4_K=7B/s,layer=22us,token=1ms", "3B/s,2g128=1234567891B/s"])
def test_rates_are_read_as_they_are_written(text: str) -> None:
    assert str(Rates.parse(text)) == text and Rates.model_validate(text) == Rates.parse(text)


def test_a_token_takes_what_its_formats_and_layers_take() -> None:
    known = Rates.parse("10GB/s,Q4_K=2GB/s,layer=10us,token=5us")
    assert known.token_time_ns({"Q4_K": 4001, "F32": 100}, 3) == 2001 + 10 + 30_000 + 5_000
    assert Rates.model_validate(10**9) == Rates.parse("1GB/s")  # as plans had it


@pytest.mark.parametrize(("engine", "names"), [("llama.cpp", ("Q4_K", "IQ4_NL", "16")), ("native", ("2g128", "16"))])
def test_kernels_are_timed(engine: str, names: Sequence[str]) -> None:
    """Of stacks that caches hold: whether it works, not how fast it is."""
    if engine == "llama.cpp":
        pytest.importorskip("xllamacpp")
    found = CLOCKS[engine].kernel_rates([parse_choice(name) for name in names], 2**23, 1, silent)
    assert len(found) == len(names) and all(1e6 < one < 1e13 for one in found) and CLOCKS[engine].version()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "llama.cpp"])
def test_the_bundled_model_is_timed(engine: str) -> None:
    if engine == "llama.cpp":
        pytest.importorskip("xllamacpp")
    timed = rates._with_times(engine, Measured(Rates(memory=10**13)))
    assert 0 < timed.rates.layer_ns + timed.rates.token_ns < 10**9
