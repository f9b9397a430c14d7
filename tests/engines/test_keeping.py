"""`--memory`: what llama.cpp keeps beside the weights, as it says itself, and what a process really takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.engines.gguf import keeping, library
from alphaq.engines.gguf.profile import PROFILE
from alphaq.errors import BudgetError, PlanError
from alphaq.nouns.serving import CACHE_TYPES, CARD_BYTES, Kept, Memory, Serving
from alphaq.planning.memory import memory_of
from conftest import ROOT, Ran

pytest.importorskip("xllamacpp")
MIB = 2**20
ENGINE = ("--engine", "llama.cpp", "--method", "distortion", "--noise", "analytic")


def kept(checkpoint: Checkpoint, **settings: object) -> Kept:
    return memory_of(checkpoint, "llama.cpp", Serving(memory_bytes=2**40, **settings)).kept


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


def cache_bytes(checkpoint: Checkpoint, tokens: int) -> int:
    """Keys and values of grouped heads in 16 bits."""
    config = checkpoint.config
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * tokens


@pytest.mark.parametrize(("context", "parallel"), [(512, 1), (4096, 1), (1024, 4)])
def test_the_cache_is_that_of_the_formula(checkpoint: Checkpoint, context: int, parallel: int) -> None:
    found = kept(checkpoint, context=context, parallel=parallel)
    assert found.cache_bytes == pytest.approx(cache_bytes(checkpoint, context * parallel), abs=0.02 * MIB)
    assert found.buffer_bytes > 0 and found.engine_bytes > keeping.PROGRAM_BYTES


def test_a_smaller_type_makes_a_smaller_cache(checkpoint: Checkpoint) -> None:
    f16, q8 = (kept(checkpoint, context=8192, kv_type=kind).cache_bytes for kind in ("f16", "q8_0"))
    assert q8 == pytest.approx(f16 * 34 / 64, rel=0.01)


@pytest.mark.slow
def test_a_process_takes_what_is_counted(tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    budget = ("--memory", "96MiB", "--context", "1024", "--parallel", "2", "--kv-type", "q8_0")
    out = tmp_path / "out"
    said = alphaq("quantize", tiny, *ENGINE, *budget, "-o", out)
    flags = "-c 2048 -np 2 -ctk q8_0 -ctv q8_0 --no-repack --cache-ram 0 --ctx-checkpoints 0"
    assert f"llama-server -m {out}/model.gguf {flags}" in said.out
    plan = json.loads((out / "plan.json").read_text())
    counted = Kept(**plan["memory"]["kept"]).total + (out / "model.gguf").stat().st_size
    run = [ROOT / "benchmarks" / "memory.py", "--run", out / "model.gguf", "1024", "2", "q8_0"]
    ran = subprocess.run([sys.executable, *map(str, run)], capture_output=True, text=True, check=True)
    assert 0.9 * counted < int(ran.stdout) < 1.02 * counted


def test_the_budget_is_what_is_left(tiny: Path, checkpoint: Checkpoint, alphaq: Callable[..., Ran]) -> None:
    said = alphaq("plan", tiny, *ENGINE, "--memory", "72MiB", "--context", "256", "--json")
    told = said.json
    left = 72 * MIB - Kept(**told["memory"]["kept"]).total
    assert told["config"]["budget"]["size_bytes"] == left >= told["size_bytes"]
    assert "256 tokens of cache (f16)" in said.err


def test_a_card_gets_what_every_token_reads_and_the_last_layers_experts(
    tiny: Path, checkpoint: Checkpoint, alphaq: Callable[..., Ran]
) -> None:
    asked = kept(checkpoint, context=256)
    card = CARD_BYTES + asked.cache_bytes + asked.buffer_bytes + 5 * MIB
    budget = ("--memory", f"{asked.total + 5 * MIB}", "--vram", str(card), "--context", "256")
    told = alphaq("plan", tiny, *ENGINE, "--choices", "Q2_K,Q4_0,Q8_0", *budget, "--json").json
    memory = Memory.model_validate(told["memory"])
    placement, layers = memory.placement, checkpoint.config["num_hidden_layers"]
    assert placement is not None and 0 < placement.host_layers < layers
    assert placement.card_bytes <= 5 * MIB and placement.host_bytes <= memory.host
    assert placement.card_bytes + placement.host_bytes >= told["size_bytes"] > 6 * MIB
    assert f"-ngl 999 --n-cpu-moe {placement.host_layers} --no-repack" in keeping.flags(memory)
    budget = ("--memory", "72MiB", "--vram", str(card - 5 * MIB + 1), "--context", "256")
    assert "what every token reads takes" in alphaq("plan", tiny, *ENGINE, *budget).err


@pytest.mark.slow
def test_a_small_card_makes_a_smaller_plan_where_more_memory_would_crowd_it(
    tiny: Path, checkpoint: Checkpoint, alphaq: Callable[..., Ran]
) -> None:
    asked = kept(checkpoint, context=256)
    card = CARD_BYTES + asked.cache_bytes + asked.buffer_bytes + 2_300_000
    room = ("--context", "256", "--vram", str(card), "--memory", str(asked.total + 12 * MIB))
    losses = ("--engine", "llama.cpp", "--choices", "Q2_K,Q4_0,Q8_0", "--no-check", "--json")
    told = alphaq("plan", tiny, *losses, *room).json
    assert told["memory"]["placement"]["card_bytes"] <= 2_300_000
    assert told["config"]["budget"]["size_bytes"] < 13 * MIB  # of 14.7 that both memories have


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--memory", "16GiB"), "of native that is not known"),
        ((*ENGINE, "--memory", "16GiB", "--bits", "3"), "--memory is a budget, and so is --bits"),
        ((*ENGINE, "--bits", "3", "--context", "64"), "--context is part of --memory"),
        ((*ENGINE, "--memory", "1MiB"), "leave nothing for weights"),
        ((*ENGINE, "--memory", "56MiB", "--context", "64"), "Raise it"),
        ((*ENGINE, "--memory", "16GiB", "--kv-type", "q3"), "--kv-type"),
        ((*ENGINE, "--memory", "16GiB", "--vram", "400MiB"), "of --vram leave nothing for weights"),
        ((*ENGINE, "--bits", "3", "--vram", "8GiB"), "--vram is part of --memory"),
        ((*ENGINE, "--memory", "-1"), "is not a size"),
        ((*ENGINE, "--memory", "16GiB", "--context", "1000000000", "--parallel", "5"), "more than 1073741824"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny: Path, alphaq: Callable[..., Ran], options: tuple[str, ...], words: str
) -> None:
    failed = alphaq("plan", tiny, *options)
    assert failed.code and words in " ".join(failed.err.split())


def test_a_build_that_does_not_say_is_refused(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    monkeypatch.setitem(library.REPACKING, "no_alloc", True)
    with pytest.raises(library.LlamaError, match="cannot lay out a model without reading it"):
        keeping._model_params(library.opened())


def test_a_build_that_says_less_of_the_cache_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, alphaq: Callable[..., Ran], tmp_path: Path
) -> None:
    assert alphaq("quantize", tiny, *ENGINE, "--bits", "8", "-o", tmp_path / "out").code == 0
    monkeypatch.setattr(keeping, "_CACHE", re.compile("never said"))
    with pytest.raises(library.LlamaError, match="does not say what it keeps"):
        keeping._simulated(tmp_path / "out" / "model.gguf", Serving(memory_bytes=2**30))


def test_engines_that_cannot_tell_are_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(PlanError, match="native"):
        memory_of(checkpoint, "native", Serving(memory_bytes=2**30))
    with pytest.raises(BudgetError, match="--kv-type such as q8_0"):
        memory_of(checkpoint, "llama.cpp", Serving(memory_bytes=2**10))


def test_every_type_of_cache_is_ggmls() -> None:
    from alphaq.formats.ggml import GGML_TYPES

    assert {kind.upper() for kind in CACHE_TYPES} <= GGML_TYPES.keys() and PROFILE.writer.hosting is not None
