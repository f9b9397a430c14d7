"""From a GGUF file of an architecture that no table of ours describes to a quantized one that llama.cpp runs."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from alphaq.checkpoint.gguf.format import layout, read_gguf
from alphaq.checkpoint.gguf.values import GgufValue
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.gguf.profile import FILE_NAME, OF_ONE_FILE
from alphaq.errors import CheckpointError, PlanError
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.pipeline import make_plan, measure_for_plan, quantize
from alphaq.planning import resolve
from conftest import ROOT
from families import FAMILIES as SMALL_FAMILIES
from llama_converter import CONVERTER, MISSING

FAMILIES = ("granitemoe", "glm4_moe", "lfm2_moe")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gguf_families", ROOT / "scripts" / "gguf_families.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["gguf_families"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()
slow = pytest.mark.slow  # transformers, the converter and three families by llama.cpp: a minute


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with FAMILY.gguf in 16 bits of each."""
    if not CONVERTER.is_dir():
        pytest.skip(MISSING)
    root = tmp_path_factory.mktemp("converted")
    assert not script.made(FAMILIES, root)
    return root


def planned(path: Path, out: Path, quantized: bool = False, **settings: object) -> Path:
    """Quantize a file, also one that is quantized already."""
    checkpoint = open_checkpoint(path, quantized=quantized)
    request = resolve(PlanConfig(engine="llama.cpp", **settings)).with_stored(checkpoint)
    quantize(checkpoint, make_plan(checkpoint, request, measure_for_plan(checkpoint, request)), out)
    return out / FILE_NAME


@slow
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_with_the_file_what_its_weights_say(family: str, converted: Path) -> None:
    row = script.row_of(family, converted / f"{family}.gguf")
    assert not row.why and row.arch and row.types.count(",") >= 2
    # llama.cpp rounds the inputs of quantized weights to 8 bits, which restored ones do not have.
    assert 0 < row.exact < 0.25 * row.change < 1


@slow
def test_metadata_and_what_is_kept_are_those_of_the_source(converted: Path, tmp_path: Path) -> None:
    source = converted / "glm4_moe.gguf"
    size = source.stat().st_size // 2
    out = planned(source, tmp_path / "out", budget=Budget(size_bytes=size))  # by the default method, which runs it
    before, after = read_gguf(source), read_gguf(out)
    same = {key: value for key, value in before.metadata.items() if key not in OF_ONE_FILE}
    assert after.metadata == same and list(after.metadata) == list(same)
    assert list(after.tensors) == list(before.tensors)
    assert out.stat().st_size <= size
    for name, tensor in before.tensors.items():
        if tensor.type == "F32":
            assert script.values_of(after, name, False) == script.values_of(before, name, False)
    whole, found = script.logits(source), script.logits(out)
    assert 0 < script.divergence(whole, found) < 0.2


@slow
def test_what_has_a_type_already_is_copied(converted: Path, tmp_path: Path) -> None:
    settings = dict(method="alphaq", choices="Q3_K,Q4_0,Q5_1,Q6_K", budget=Budget(bpw=5.0))
    first = planned(converted / "granitemoe.gguf", tmp_path / "first", **settings)
    with pytest.raises(CheckpointError, match=r"already quantized to .* or add --requantize"):
        open_checkpoint(first)
    whole = dict(method="alphaq", budget=Budget(bpw=8.0))
    again = planned(first, tmp_path / "again", quantized=True, **whole)
    assert again.read_bytes() == first.read_bytes()


@slow
def test_other_engines_refuse_it_in_words_of_its_own(converted: Path) -> None:
    checkpoint = open_checkpoint(converted / "granitemoe.gguf")
    request = resolve(PlanConfig(engine="native", budget=Budget(bits=3.0), method="alphaq"))
    with pytest.raises(PlanError, match=r"'granitemoe', which is known by the names .* native cannot take it\. Start"):
        measure_for_plan(checkpoint, request)


@pytest.mark.parametrize(
    ("last_words", "said"),
    [
        (
            "print('/tmp/x/ggml.c:7: GGML_ASSERT(a == b) failed', file=sys.stderr); os.abort()",
            "llama.cpp cannot: ggml.c:7: GGML_ASSERT(a == b) failed",
        ),
        ("os.kill(os.getpid(), 8)", "llama.cpp cannot: the process ended with -8"),
        ("time.sleep(60)", "llama.cpp cannot: it took more than 3 seconds"),
    ],
)
def test_process_that_ends_or_hangs_is_a_row(
    last_words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = json.dumps(vars(script.Row("odd", "odd-arch", why="llama.cpp cannot")))
    (tmp_path / "child.py").write_text(f"import os, sys, time\nprint({told!r}, flush=True)\n{last_words}\n")
    monkeypatch.setattr(script, "__file__", str(tmp_path / "child.py"))
    monkeypatch.setattr(script, "LIMIT_S", 3)
    assert script.row_of("odd", tmp_path / "odd.gguf") == script.Row("odd", "odd-arch", why=said)


def test_file_that_llama_cpp_refuses_is_a_row(tmp_path: Path) -> None:
    header, _, _ = layout({"general.architecture": GgufValue.of("string", "unheard-of")}, {})
    (tmp_path / "odd.gguf").write_bytes(header)
    row = script.row_of("odd", tmp_path / "odd.gguf")
    assert row.arch == "unheard-of" and row.why.startswith("llama.cpp cannot: ") and "architecture" in row.why


def test_page_has_every_family_once_and_none_that_we_cannot() -> None:
    page = (ROOT / "docs" / "engines" / "gguf-families.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    unknown = page.rpartition("no such model: ")[2].strip().rstrip(".").split(", ")
    assert sorted([row[0].removeprefix("| ") for row in rows] + unknown) == sorted(SMALL_FAMILIES)
    assert all(
        re.match(r"ok|kept as stored: .* \(rows of \d+ weights, which are no whole blocks of 32\)", row[-1])
        for row in rows
    )
