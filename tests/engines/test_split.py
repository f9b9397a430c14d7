"""GGUF files in parts: what llama.cpp loads, what a plan promises of them, and what commands make of them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama import Llama

from alphaq import pipeline
from alphaq.checkpoint.gguf.format import layout, read_gguf
from alphaq.checkpoint.gguf.parts import MOST_PARTS, PART_BYTES, parts_layout
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import OutputError
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget, PlanConfig
from conftest import DATA, Ran
from contents import digests
from injection import Job, Place, killed_after, run

TYPES = "Q3_K,Q4_K,Q6_K"
ASKED = ("--engine", "llama.cpp", "--method", "alphaq", "--choices", TYPES, "--noise", "analytic")
MOST = 700_000


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.gguf"))


@pytest.fixture(scope="module")
def outputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The bundled model in one file, and in parts."""
    from alphaq.cli.app import main

    folder = tmp_path_factory.mktemp("split")
    for name, more in (("whole", ()), ("split", ("--split-size", MOST))):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, ("quantize", tiny, *ASKED, "--bits", 3.4, *more, "-o", folder / name))])
        assert not stop.value.code
    return folder / "whole", folder / "split"


def test_parts_are_named_and_marked_as_llama_cpp_s_own(outputs: tuple[Path, Path]) -> None:
    whole, split = outputs
    files = parts_of(split)
    count = len(files)
    assert count > 5
    assert [file.name for file in files] == [f"model-{n + 1:05d}-of-{count:05d}.gguf" for n in range(count)]
    tensors = []
    for number, file in enumerate(files):
        reader = gguf.GGUFReader(file)
        for key, value, kind in (
            ("split.no", number, gguf.GGUFValueType.UINT16),
            ("split.count", count, gguf.GGUFValueType.UINT16),
            ("split.tensors.count", len(read_gguf(whole / "model.gguf").tensors), gguf.GGUFValueType.INT32),
        ):
            assert reader.fields[key].contents() == value and reader.fields[key].types == [kind]
        assert ("general.architecture" in reader.fields) == (number == 0)
        assert reader.tensors and (file.stat().st_size <= MOST or len(reader.tensors) == 1)
        tensors += [(tensor.name, tensor.tensor_type, tensor.data.tobytes()) for tensor in reader.tensors]
    assert tensors == [
        (tensor.name, tensor.tensor_type, tensor.data.tobytes())
        for tensor in gguf.GGUFReader(whole / "model.gguf").tensors
    ]


def test_llama_cpp_computes_the_same(outputs: tuple[Path, Path]) -> None:
    whole, split = outputs
    ids = list(range(5, 50))
    with Llama(whole / "model.gguf", 64) as one, Llama(parts_of(split)[0], 64) as other:
        assert np.array_equal(one.logits(ids), other.logits(ids))


def test_the_promised_size_is_that_of_all_parts(outputs: tuple[Path, Path]) -> None:
    for folder in outputs:
        promised = Plan.read(folder / "plan.json").size_bytes
        assert promised == sum(file.stat().st_size for file in parts_of(folder))


@pytest.mark.parametrize("most", [300, 150_000])
@pytest.mark.parametrize("size", [5_300_001, 7_000_000])
def test_no_budget_is_exceeded_and_none_is_wasted(most: int, size: int, tiny: Path, alphaq: Callable[..., Ran]) -> None:
    asked = (*ASKED, "--split-size", most, "--json")
    ran = alphaq("plan", tiny, *asked, "--size", size)
    assert ran.code == 0, ran.err
    plain = alphaq("plan", tiny, *ASKED, "--size", size, "--json").json["size_bytes"]
    tensors = 91 if most < 20_000 else 2 * size // most + 2
    assert plain - tensors * PART_BYTES - 100_000 < ran.json["size_bytes"] <= size
    outline = alphaq("plan", tiny, *asked, "--size", size, "--dry-run").json
    assert outline["least_bytes"] <= ran.json["size_bytes"] <= outline["most_bytes"]


def test_the_least_size_that_is_named_will_do(tiny: Path, alphaq: Callable[..., Ran]) -> None:
    asked = (*ASKED, "--split-size", "64KiB")
    refused = alphaq("plan", tiny, *asked, "--size", "2MB")
    least = refused.err.partition("--size ")[2].split()[0]
    assert refused.code == 2 and least.isdigit()
    assert alphaq("plan", tiny, *asked, "--size", least).code == 0
    assert alphaq("plan", tiny, *asked, "--size", int(least) - 1).code == 2


def test_outputs_are_verified_and_their_damage_is_found(
    outputs: tuple[Path, Path], tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    _, split = outputs
    assert alphaq("verify", split, "--reference", tiny, "--run").code == 0
    for damage in ("missing", "short", "renamed", "data"):
        copy = tmp_path / damage
        copy.mkdir()
        for file in split.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        second = parts_of(copy)[1]
        if damage == "missing":
            second.unlink()
        elif damage == "short":
            second.write_bytes(second.read_bytes()[:-32])
        elif damage == "renamed":
            second.write_bytes(parts_of(copy)[2].read_bytes())
        else:
            whole = bytearray(second.read_bytes())
            whole[-64] ^= 255
            second.write_bytes(whole)
        ran = alphaq("verify", copy)
        assert ran.code == 2 and ("model-00002-of" in ran.err or damage == "data"), ran.err


def test_a_killed_run_goes_on(outputs: tuple[Path, Path], tiny: Path, tmp_path: Path) -> None:
    _, split = outputs
    place, job = Place(tmp_path, tiny), Job("", f"quantize {tiny} --plan {split / 'plan.json'} -o {{out}}")
    place.prepare()
    assert run(job, place, killed_after(60)).code == -signal.SIGKILL
    assert not place.out.exists() and place.left()
    assert run(job, place).code == 0 and not place.left()
    for file in split.iterdir():
        assert (place.out / file.name).read_bytes() == file.read_bytes()


def test_parts_are_scored(outputs: tuple[Path, Path], tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    whole, split = outputs
    text = tmp_path / "text.txt"
    text.write_text((DATA / "texts" / "tech.txt").read_text()[:2000])
    first = parts_of(split)[0]
    ran = alphaq("eval", first, "--reference", whole / "model.gguf", "--text", text, "--json")
    assert ran.code == 0 and ran.json["run_by"] == ["llama.cpp", "llama.cpp"], ran.err
    assert next(iter(ran.json["texts"].values()))["kl"] == pytest.approx(0, abs=1e-9)


def test_parts_are_joined_and_cut_again(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Everything keeps its type, so these are copies."""
    whole, split = outputs
    choices, first = Plan.read(split / "plan.json").choices, parts_of(split)[0]
    for source, most in ((first, None), (whole / "model.gguf", MOST), (first, MOST)):
        config = PlanConfig(budget=Budget(), engine="llama.cpp", split_bytes=most)
        out, expected = tmp_path / f"{source.stem} {most}", whole if most is None else split
        plan = Plan(engine="llama.cpp", choices=choices, config=config)
        pipeline.quantize(open_checkpoint(source, quantized=True), plan, out)
        assert digests(parts_of(out)) == digests(parts_of(expected))


def test_the_command_to_run_names_the_first_part(
    outputs: tuple[Path, Path], tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    _, split = outputs
    ran = alphaq("quantize", tiny, "--plan", split / "plan.json", "-o", tmp_path / "out")
    assert f"llama-server -m {tmp_path / 'out' / parts_of(split)[0].name}" in ran.out
    assert parts_of(split)[0].name in (alphaq("card", split).out or (split / "README.md").read_text())


@pytest.mark.parametrize(
    "options, said",
    [
        (("--engine", "native", "--split-size", "2GiB"), "--split-size splits GGUF files, which are for llama.cpp"),
        (("--engine", "llama.cpp", "--split-size", "0"), "'0' is no size of a file"),
        (("--engine", "llama.cpp", "--split-size", "two"), "'two' is not a size"),
    ],
)
def test_what_cannot_be_is_refused(options: tuple[str, ...], said: str, tiny: Path, alphaq: Callable[..., Ran]) -> None:
    ran = alphaq("plan", tiny, "--bits", 3, *options)
    assert ran.code == 2 and said in ran.err


METADATA = {"general.architecture": GgufValue.of("string", "x"), "k": GgufValue.of("string", "v" * 50)}


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 50)), min_size=1, max_size=30),
    most=st.integers(1, 20_000),
)
def test_parts_hold_every_tensor_once_within_the_size(rows: list[tuple[int, int]], most: int) -> None:
    tensors = {f"t{number}{'x' * name}": ("F32", (size, 7)) for number, (size, name) in enumerate(rows)}
    parts = parts_layout(METADATA, tensors, "m", most)
    assert list(parts.tensors) == list(tensors)
    held = {file: [one for one in parts.tensors.values() if one.file == file] for file in parts.files}
    for file, (header, nbytes) in parts.files.items():
        assert held[file] and (nbytes <= most or len(held[file]) == 1)
        assert nbytes == len(header) + sum(-(-one.nbytes // 32) * 32 for one in held[file])
    whole = layout(METADATA, tensors)[2]
    total = sum(nbytes for _, nbytes in parts.files.values())
    assert total <= whole + len(parts.files) * PART_BYTES
    if len(parts.files) > 1 and most > 2 * PART_BYTES:
        assert len(parts.files) <= (2 * whole + most) / (most - 2 * PART_BYTES) + 1
    sizes = [nbytes for _, nbytes in parts.files.values()]
    assert all(one + other > most for one, other in pairwise(sizes))


def test_too_many_parts_are_refused() -> None:
    tensors = {f"t{number}": ("F32", (1,)) for number in range(MOST_PARTS + 1)}
    with pytest.raises(OutputError, match=f"--split-size 1 makes {MOST_PARTS + 1} files, more than"):
        parts_layout({}, tensors, "m", 1)
