"""`alphaq slice`: a smaller model out of a quantized one, from its top bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alphaq import pipeline
from alphaq.checkpoint.files import PlainFile
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.engines.output import Output
from alphaq.errors import PlanError
from alphaq.formats.blocks import decode, dequantize
from alphaq.formats.coding import decode_tensor
from alphaq.formats.packing import unpack
from alphaq.formats.table import format_of, stored_choice
from alphaq.nouns.matrix import MatrixRef
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import resolve
from alphaq.writing import artifact
from alphaq.writing.artifact import known_alphas, nested_choices, open_artifact, open_source, own_pins
from alphaq.writing.recoding import recode

FAST = ("--method", "alphaq", "--workers", 1)


@pytest.fixture(scope="module")
def nested(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with nested codes of 4 bits, some of 3."""
    out = tmp_path_factory.mktemp("nested") / "out"
    checkpoint = open_checkpoint(tiny)
    request = resolve(PlanConfig(budget=Budget(bits=3.8), choices="3g128-nest,4g128-nest", method="alphaq"))
    plan = pipeline.make_plan(checkpoint, request, pipeline.measure_for_plan(checkpoint, request))
    pipeline.quantize(checkpoint, plan, out)
    return out


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def stored(folder: Path, name: str) -> torch.Tensor:
    """A tensor as it is once decoded."""
    found = Output(folder).stored[name]
    raw = found.typed(PlainFile(folder / found.place.file).read(found.place.begin, found.place.nbytes))
    return decode_tensor(raw.view(found.shape), name)


def codes_of(matrix: QuantizedMatrix) -> np.ndarray:
    return unpack(matrix.codes.numpy(), matrix.choice.bits, matrix.shape[1])


def check_top_bits(source: Path, out: Path) -> None:
    """Codes of every planned matrix are the top bits of what the artifact holds; scales are its own or fitted anew."""
    before, after = Output(source).plan, Output(out).plan
    assert after.assignment.keys() == before.assignment.keys()
    widths = set()
    for name in after.assignment:
        wide, narrow = decode(stored(source, name)), decode(stored(out, name))
        assert format_of(narrow.choice).name == "nested"
        drop = wide.choice.bits - narrow.choice.bits
        assert drop >= 0
        assert np.array_equal(codes_of(narrow), codes_of(wide) >> drop)
        widths.add(drop)
        if not drop:
            assert torch.equal(narrow.scales, wide.scales)
    assert widths - {0}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two stored tensors are the same, byte by byte."""
    return one.dtype == other.dtype and torch.equal(one, other)


def check_rest(source: Path, out: Path) -> None:
    """Everything outside the budget has the bytes that it had."""
    before, after = Output(source), Output(out)
    assert before.stored.keys() == after.stored.keys()
    planned = before.plan.assignment.keys()
    others = before.stored.keys() - planned
    assert others
    for name in others:
        assert same(stored(source, name), stored(out, name)), name
    assert {name: before.plan.choices.get(name) for name in others} == {
        name: after.plan.choices.get(name) for name in others
    }


@pytest.mark.parametrize("coded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_slice_holds_top_bits_and_the_rest_unchanged_in_exactly_the_bytes(
    alphaq: Callable[..., Any], nested: Path, tmp_path: Path, coded: bool
) -> None:
    source = nested
    if coded:
        source = tmp_path / "coded"
        recode(nested, source, "zstd")
    size = int(0.87 * weight_bytes(nested))
    ran = alphaq(
        "slice",
        source,
        "-o",
        tmp_path / "out",
        "--size",
        size,
        *FAST,
        "--choices",
        "2g128-nest,3g128-nest,4g128-nest",
        "--json",
    )
    assert ran.code == 0, ran.err
    assert weight_bytes(tmp_path / "out") == ran.json["size_bytes"] <= size
    assert ran.json["size_bytes"] > 0.99 * size
    check_top_bits(source, tmp_path / "out")
    check_rest(source, tmp_path / "out")
    plan = Output(tmp_path / "out").plan
    counted = {bits: list(plan.assignment.values()).count(bits) for bits in (2, 3, 4)}
    assert plan.histogram == {bits: count for bits, count in counted.items() if count}
    ran = alphaq("verify", tmp_path / "out", "--reference", source, "--workers", 1, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["against_source"]


@pytest.mark.slow
def test_a_slice_of_a_slice_is_a_slice(nested: Path, alphaq: Callable[..., Any], tmp_path: Path) -> None:
    for name, source, bits in (("three", nested, 3), ("two", tmp_path / "three", 2.2)):
        ran = alphaq("slice", source, "-o", tmp_path / name, "--bits", bits, *FAST)
        assert ran.code == 0, ran.err
    two, wide = Output(tmp_path / "two").plan, nested
    for name, choice in two.every_choice().items():
        if name in two.assignment and format_of(choice).name == "nested":
            found, first = decode(stored(tmp_path / "two", name)), decode(stored(wide, name))
            assert np.array_equal(codes_of(found), codes_of(first) >> (first.choice.bits - choice.bits))


@pytest.mark.slow
def test_a_slice_can_be_coded(nested: Path, alphaq: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--bits", 3, "--codec", "zstd", "--choices", "2g128-nest,3g128-nest,4g128-nest")
    ran = alphaq("slice", nested, "-o", tmp_path / "out", *options, *FAST, "--json")
    assert ran.code == 0, ran.err
    assert weight_bytes(tmp_path / "out") == ran.json["size_bytes"]
    check_top_bits(nested, tmp_path / "out")
    check_rest(nested, tmp_path / "out")


@pytest.mark.slow
def test_a_larger_budget_keeps_everything_as_it_is(nested: Path, alphaq: Callable[..., Any], tmp_path: Path) -> None:
    ran = alphaq("slice", nested, "-o", tmp_path / "out", "--size", weight_bytes(nested) + 10_000, *FAST)
    assert ran.code == 0, ran.err
    before, after = Output(nested), Output(tmp_path / "out")
    assert after.plan.choices == before.plan.choices
    for name in before.stored:
        assert same(stored(nested, name), stored(tmp_path / "out", name)), name


def test_an_artifact_reads_as_what_it_stands_for(nested: Path) -> None:
    checkpoint, plan = open_artifact(nested)
    assert plan == Output(nested).plan
    for matrix in checkpoint.matrices:
        values = checkpoint.read(matrix)
        if matrix.name in plan.choices and plan.choices[matrix.name] != "16":
            assert torch.equal(values, dequantize(decode(stored(nested, matrix.name))))
        else:
            assert torch.equal(values, stored(nested, matrix.name))
    offered = nested_choices(checkpoint, plan)
    assert offered == "1g128s,2g128-nest,3g128-nest,4g128-nest"
    assert open_source(str(nested)).fingerprint == checkpoint.fingerprint
    assert {pin.partition("=")[0] for pin in own_pins(checkpoint, plan)} <= {
        "attention",
        "shared_expert",
        "dense_mlp",
        "embedding",
        "head",
        "router",
        *(matrix.name for matrix in checkpoint.matrices),
    }


def test_no_weight_is_restored_for_a_slice_and_no_spectrum_measured(
    nested: Path, alphaq: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned matrices are cut by their codes; α is that of the original weights."""
    read = Checkpoint.read

    def only_others(checkpoint: Checkpoint, matrix: MatrixRef) -> torch.Tensor:
        encoding = checkpoint.info(matrix.tensor).encoding
        assert encoding is None or encoding.decoder is not artifact._values, matrix.name
        return read(checkpoint, matrix)

    monkeypatch.setattr(Checkpoint, "read", only_others)
    choices = ("--choices", "1g128s,2g128-nest,3g128-nest")
    ran = alphaq("slice", nested, "-o", tmp_path / "out", "--bits", 2.2, *FAST, *choices, "--no-cache")
    assert ran.code == 0, ran.err
    assert Output(tmp_path / "out").plan.alpha == Output(nested).plan.alpha


def test_alphas_are_measured_where_the_plan_cannot_tell_them(nested: Path) -> None:
    checkpoint, plan = open_artifact(nested)
    config = PlanConfig(budget=Budget(bits=3), method="alphaq")
    known = known_alphas(checkpoint, plan, config)
    assert known is not None
    assert {name: one.alpha for name, one in known.spectra.items()} == plan.alpha
    forgotten = plan.model_copy(update={"alpha": dict(list(plan.alpha.items())[1:])})
    assert known_alphas(checkpoint, forgotten, config) is None
    for other in ({"spectrum": "whole"}, {"tail": "ks"}, {"noise": "analytic"}):
        assert known_alphas(checkpoint, plan, config.model_copy(update=other)) is None


def test_an_artifact_without_nested_codes_is_planned_anew(
    tiny: Path, alphaq: Callable[..., Any], tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    assert alphaq("quantize", tiny, "-o", plain, "--bits", 3, *FAST, "--fast").code == 0
    checkpoint, plan = open_artifact(plain)
    assert nested_choices(checkpoint, plan) is None
    ran = alphaq("slice", plain, "-o", tmp_path / "out", "--bits", 2, *FAST, "--choices", "1,2,3,4", "--json")
    assert ran.code == 0, ran.err
    assert weight_bytes(tmp_path / "out") == ran.json["size_bytes"] < weight_bytes(plain)
    check_rest(plain, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "bits"), [("mlx", 3), ("gptqmodel", 3), ("vllm", 4)])
def test_a_slice_for_another_engine_is_that_engine_s(
    tiny: Path, alphaq: Callable[..., Any], tmp_path: Path, engine: str, bits: int
) -> None:
    """Also where it names a choice as the artifact does, whose bytes are others all the same."""
    options = ("--method", "uniform", "--workers", 1, "--bits")
    assert (
        alphaq("quantize", tiny, "-o", tmp_path / "in", "--choices", "4g128", "--attention-bits", 4, *options, 4).code
        == 0
    )
    ran = alphaq("slice", tmp_path / "in", "-o", tmp_path / "out", "--engine", engine, *options, bits)
    assert ran.code == 0, ran.err
    assert Output(tmp_path / "out").plan.engine == engine
    assert pipeline.verify(tmp_path / "out", open_artifact(tmp_path / "in")[0]).against_source


@pytest.mark.parametrize("codec", ["none", pytest.param("zstd", marks=pytest.mark.slow)])
def test_whatever_is_outside_the_budget_keeps_its_bytes(
    tiny: Path, alphaq: Callable[..., Any], tmp_path: Path, codec: str
) -> None:
    """Rates, which only coded files have, mixes of widths, and single matrices unlike the others of their role."""
    pins = (
        "attention=@3",
        "shared_expert=3g64-slim",
        "*.1.self_attn.q_proj.weight=4g32-nest",
        "*.0.self_attn.o_proj*=16",
    )
    options = [part for pin in pins for part in ("--pin", pin)]
    common = ("--bits", 3, "--choices", "2g128-nest,3g128-nest", *FAST)
    ran = alphaq("quantize", tiny, "-o", tmp_path / "in", "--codec", "zstd", *common, *options)
    assert ran.code == 0, ran.err
    more = ("--codec", codec) if codec != "none" else ()
    ran = alphaq("slice", tmp_path / "in", "-o", tmp_path / "out", *common[2:], "--bits", 2.5, *more)
    assert ran.code == 0, ran.err
    before, after = Output(tmp_path / "in").plan, Output(tmp_path / "out").plan
    for name in before.choices.keys() - before.assignment.keys():
        assert same(stored(tmp_path / "in", name), stored(tmp_path / "out", name)), (name, before.choices[name])
    assert {
        name: stored_choice(choice) for name, choice in before.every_choice().items() if name not in before.assignment
    } == {name: choice for name, choice in after.every_choice().items() if name not in before.assignment}


@pytest.mark.slow
def test_a_slice_for_llama_cpp_is_a_gguf_file(nested: Path, alphaq: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    ran = alphaq("slice", nested, "-o", tmp_path / "out", "--engine", "llama.cpp", "--bits", 4.6, *FAST)
    assert ran.code == 0, ran.err
    assert list((tmp_path / "out").glob("*.gguf"))


def test_files_of_another_engine_and_what_is_no_output_are_refused(
    tiny: Path, nested: Path, alphaq: Callable[..., Any], tmp_path: Path
) -> None:
    options = ("--bits", 3, "--engine", "vllm", "--method", "uniform", "--workers", 1)
    assert alphaq("quantize", tiny, *options, "--bits", 4.5, "-o", tmp_path / "vllm").code == 0
    with pytest.raises(PlanError, match="is for vllm"):
        open_artifact(tmp_path / "vllm")
    (tmp_path / "full").mkdir()
    for folder, out, words in (
        (tmp_path / "vllm", "out", "is for vllm"),
        (tiny, "out", "plan.json"),
        (nested, "full", "exists"),
    ):
        ran = alphaq("slice", folder, "-o", tmp_path / out, "--bits", 2, *FAST)
        assert ran.code == 2
        assert words in ran.err
        assert not (tmp_path / "out").exists()


def test_a_damaged_artifact_is_refused_by_name(nested: Path, alphaq: Callable[..., Any], tmp_path: Path) -> None:
    recode(nested, tmp_path / "bad", "zstd")
    plan = Output(tmp_path / "bad").plan
    victim = next(iter(plan.assignment))
    place = Output(tmp_path / "bad").stored[victim].place
    data = bytearray((tmp_path / "bad" / place.file).read_bytes())
    data[place.begin + place.nbytes // 2] ^= 0x20
    (tmp_path / "bad" / place.file).write_bytes(data)
    ran = alphaq("slice", tmp_path / "bad", "-o", tmp_path / "out", "--bits", 2, *FAST)
    assert ran.code == 2
    assert victim in ran.err
    assert not (tmp_path / "out").exists()
