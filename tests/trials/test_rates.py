"""How fast engines read each format here: measured once, format by format, and what is done where it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from alphaq.engines.gguf import rates as in_llama_cpp
from alphaq.errors import MissingEngineError
from alphaq.formats.table import parse_choice
from alphaq.measuring import bandwidth
from alphaq.measuring.bandwidth import Bandwidth, bandwidth_here, keep_bandwidth
from alphaq.nouns.choice import Choice
from alphaq.nouns.rates import Rates
from alphaq.runtime import rates as in_native
from alphaq.trials import rates
from alphaq.trials.rates import Clock, rates_here
from alphaq.work.workers import silent
from conftest import Ran


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A machine whose memory reads 10 GB/s and whose llama.cpp reads n GB/s of a type of n bits; what it is asked."""
    seen: list[list[str]] = []

    def kernel_rates(choices: Sequence[Choice], *_: object) -> list[float]:
        seen.append(sorted(map(str, choices)))
        return [1e9 * choice.bits + 1 for choice in choices]

    def beside(engine: str, known: Rates, model: Path, scratch: Path) -> tuple[int, int]:
        return (4, 5_000_400) if model.name == "tiny" else (2, 3_000_000)

    monkeypatch.setattr(rates, "CLOCKS", {"llama.cpp": Clock(kernel_rates, lambda *_: 1.0)})
    monkeypatch.setattr(rates, "_beside", beside)
    monkeypatch.setenv("ALPHAQ_CACHE", str(tmp_path))
    keep_bandwidth(tmp_path, Bandwidth(machine=bandwidth.machine_name(), threads=2, bytes_per_second=10**10))
    return seen


def test_each_format_is_measured_once(tmp_path: Path, asked: list[list[str]]) -> None:
    first = rates_here(tmp_path, "llama.cpp", [parse_choice("Q4_K"), parse_choice("IQ4_NL")])
    assert dict(first.formats) == {name: parse_choice(name).bits * 10**9 for name in ("16", "Q4_K", "IQ4_NL")}
    assert (first.memory, first.layer_ns, first.token_ns) == (10**10, 1_000_000, 1_000_000)
    assert rates_here(tmp_path, "llama.cpp", [parse_choice("Q4_K")]) == first.among(("16", "Q4_K"))
    second = rates_here(tmp_path, "llama.cpp", [parse_choice("Q4_0")])
    assert asked == [["16", "IQ4_NL", "Q4_K"], ["Q4_0"]] and second.layer_ns == 1_000_000
    assert {"Q4_0", "IQ4_NL"} <= dict(bandwidth_here(tmp_path).engines["llama.cpp"].formats).keys()


def test_what_does_not_run_here_is_as_fast_as_memory(
    tmp_path: Path, tiny: Path, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, alphaq: Callable[..., Ran]
) -> None:
    def missing(*_: object) -> list[float]:
        raise MissingEngineError("llama.cpp", "'alphaq[gguf]'")

    monkeypatch.setitem(rates.CLOCKS, "llama.cpp", Clock(missing, lambda *_: 1.0))
    for engine in ("llama.cpp", "vllm"):
        assert rates_here(tmp_path, engine, []) == Rates(memory=10**10)
    quick = ("--method", "distortion", "--noise", "analytic", "--size", "14MB", "--min-speed", "1", "--json")
    told = alphaq("plan", tiny, "--engine", "vllm", *quick)
    assert "vllm is not measured here" in told.err and told.json["config"]["bandwidth"] == "10GB/s"


def test_plans_go_by_what_was_measured(tiny: Path, asked: list[list[str]], alphaq: Callable[..., Ran]) -> None:
    options = ("--engine", "llama.cpp", "--method", "distortion", "--noise", "analytic", "--choices", "Q4_K")
    told = alphaq("plan", tiny, *options, "--size", "14MB", "--min-speed", "1", "--json")
    assert "llama.cpp's kernels" in told.err
    plan, counted = told.json, Rates.parse(told.json["config"]["bandwidth"])
    assert counted.of("Q4_K") == 4 * 10**9 and counted.layer_ns == 1_000_000
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


def test_kernels_of_both_engines_are_timed() -> None:
    """Of stacks that caches hold: whether it works, not how fast it is."""
    pytest.importorskip("xllamacpp")
    names = (("Q4_K", "IQ4_NL", "16"), in_llama_cpp), (("2g128", "t2", "16"), in_native)
    for choices, engine in names:
        found = engine.kernel_rates([parse_choice(name) for name in choices], 2**23, 1, silent)
        assert len(found) == 3 and all(1e6 < one < 1e13 for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", "llama.cpp"])
def test_the_bundled_model_is_timed(tmp_path: Path, engine: str) -> None:
    if engine == "llama.cpp":
        pytest.importorskip("xllamacpp")
    timed = rates._with_times(engine, Rates(memory=10**13))
    assert timed.layer_ns + timed.token_ns > 0
