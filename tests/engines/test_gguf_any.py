"""From a GGUF file of an architecture that no table of ours describes to a quantized one that llama.cpp runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from alphaq.checkpoint.gguf.format import read_gguf
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.gguf.profile import FILE_NAME, OF_ONE_FILE
from alphaq.errors import CheckpointError, PlanError
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.pipeline import make_plan, measure_for_plan, quantize
from alphaq.planning import resolve
from conftest import ROOT

FAMILIES = ("granitemoe", "glm4_moe", "lfm2_moe")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gguf_families", ROOT / "scripts" / "gguf_families.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["gguf_families"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pytestmark = pytest.mark.slow  # the script makes models larger for the whole process, and forks
script: ModuleType


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    global script
    script = load()
    if not script.CONVERTER.is_dir():
        pytest.skip(f"llama.cpp's converter is not in {script.CONVERTER}; `make setup` installs it")
    root = tmp_path_factory.mktemp("converted")
    script.convert([script.save(family, root / family) for family in FAMILIES])
    return root


def planned(path: Path, out: Path, quantized: bool = False, **settings: object) -> Path:
    """Quantize a file, also one that is quantized already."""
    checkpoint = open_checkpoint(path, quantized=quantized)
    request = resolve(PlanConfig(engine="llama.cpp", **settings)).with_stored(checkpoint)
    quantize(checkpoint, make_plan(checkpoint, request, measure_for_plan(checkpoint, request)), out)
    return out / FILE_NAME


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_with_the_file_what_its_weights_say(family: str, converted: Path) -> None:
    row = script.row_of(family, converted / f"{family}.gguf")
    assert not row.why and row.types.count(",") >= 2
    # llama.cpp rounds the inputs of quantized weights to 8 bits, which restored ones do not have.
    assert 0 < row.exact < 0.25 * row.change < 1


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


def test_what_has_a_type_already_is_copied(converted: Path, tmp_path: Path) -> None:
    settings = dict(method="alphaq", choices="Q3_K,Q4_0,Q5_1,Q6_K", budget=Budget(bpw=5.0))
    first = planned(converted / "granitemoe.gguf", tmp_path / "first", **settings)
    with pytest.raises(CheckpointError, match=r"already quantized to .* or add --requantize"):
        open_checkpoint(first)
    whole = dict(method="alphaq", budget=Budget(bpw=8.0))
    again = planned(first, tmp_path / "again", quantized=True, **whole)
    assert again.read_bytes() == first.read_bytes()


def test_other_engines_refuse_it_in_words_of_its_own(converted: Path) -> None:
    checkpoint = open_checkpoint(converted / "granitemoe.gguf")
    request = resolve(PlanConfig(engine="native", budget=Budget(bits=3.0), method="alphaq"))
    with pytest.raises(PlanError, match=r"'granitemoe', which is known by the names .* native cannot take it\. Start"):
        measure_for_plan(checkpoint, request)
