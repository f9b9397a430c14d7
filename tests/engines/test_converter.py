"""llama.cpp's converter where AlphaQ has no mapping of a family: found, run without a folder's code, its errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from alphaq.checkpoint.gguf.format import read_gguf
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.cli import converting
from alphaq.engines.gguf import converter
from alphaq.engines.gguf.converter import converted, find_converter, require_room
from alphaq.errors import AlphaQError, CheckpointError, OutputError
from conftest import Ran
from llama_converter import CONVERTER, MISSING
from runnable import byte_level, save_runnable, save_tokenizer

pytestmark = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp comes with `pip install xllamacpp`")

COPIES = """
import os, shutil, sys
folder, _, out, _, kind = sys.argv[1:]
names = sorted(os.listdir(folder))
print("seen", names, os.environ["HF_HUB_OFFLINE"], kind)
assert "config.json" in names and not any(name.endswith((".py", ".bin")) for name in names), names
shutil.copyfile({source!r}, out)
"""


def checkout(folder: Path, script: str) -> Path:
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(script)
    return folder


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of a family that AlphaQ writes itself."""
    folder = save_runnable(tmp_path_factory.mktemp("mapped") / "model", "qwen2_moe")
    save_tokenizer(folder, byte_level())
    return folder


@pytest.fixture(scope="module")
def full(mapped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It in 16 bits."""
    from alphaq import pipeline
    from alphaq.nouns.matrix import Role
    from alphaq.nouns.plan import Plan

    checkpoint, out = open_checkpoint(mapped), tmp_path_factory.mktemp("full") / "out"
    choices = {matrix.name: "16" for matrix in checkpoint.with_role(Role.EXPERT)}
    pipeline.quantize(checkpoint, Plan(engine="llama.cpp", choices=choices), out)
    return out / "model.gguf"


@pytest.fixture
def unmapped(mapped: Path, tmp_path: Path) -> Path:
    """A model of a family that nobody knows, with code beside it."""
    folder = tmp_path / "strange"
    shutil.copytree(mapped, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "strange_moe"}))
    (folder / "tokenization_strange.py").write_text("raise SystemExit('the code of a stranger ran')")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


QUANTIZE = ("--engine", "llama.cpp", "--bits", "8", "--choices", "Q8_0", "--method", "uniform")


def test_a_family_without_a_mapping_goes_through_the_converter(
    unmapped: Path, full: Path, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    script = checkout(tmp_path / "llama.cpp", COPIES.format(source=str(full)))
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    ran = alphaq("quantize", unmapped, *QUANTIZE, "--converter", script, "-o", out)
    assert ran.code == 0, ran.err
    assert "as a GGUF file in 16 bits first: about " in ran.err.replace("\n", " ")
    assert {tensor.type for tensor in read_gguf(out / "model.gguf").tensors.values()} >= {"Q8_0"}
    assert [path.name for path in out.parent.iterdir()] == ["out"], "the 16-bit file is removed"
    assert "--reference" not in ran.out


def test_further_chat_templates_are_shown_and_no_code_beside_them(unmapped: Path, tmp_path: Path) -> None:
    templates = unmapped / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    (templates / "code.py").touch()
    (unmapped / "onnx").mkdir()
    (unmapped / "onnx" / "model.jinja").touch()
    lists = "import os, sys; print(sorted(os.listdir(sys.argv[1] + '/additional_chat_templates')))\n"
    script = checkout(tmp_path / "llama.cpp", f"{lists}assert 'onnx' not in os.listdir(sys.argv[1])\nsys.exit(1)")
    with (
        pytest.raises(CheckpointError, match=r"\['tool_use.jinja'\]"),
        converted(unmapped, "strange", find_converter(script) or Path(), tmp_path),
    ):
        pass


def test_a_plan_can_be_made_and_used_by_way_of_the_converter(
    unmapped: Path, full: Path, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    script, plan = checkout(tmp_path / "llama.cpp", COPIES.format(source=str(full))), tmp_path / "plan.json"
    ran = alphaq("plan", unmapped, *QUANTIZE, "--converter", script, "-o", plan)
    assert ran.code == 0, ran.err
    ran = alphaq("quantize", unmapped, "--plan", plan, "--converter", script, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err


def test_without_a_converter_the_error_names_the_option_and_the_package(
    unmapped: Path, tmp_path: Path, alphaq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter, "MODULE", "convert_hf_to_gguf_that_nobody_has")
    ran = alphaq("quantize", unmapped, *QUANTIZE, "-o", tmp_path / "out")
    assert ran.code == 2
    said = " ".join(ran.err.split())
    assert "strange_moe" in said and "--converter DIR" in said and "ggml-org/llama.cpp" in said


def test_an_installed_converter_is_used_where_it_is_needed(
    unmapped: Path, full: Path, tmp_path: Path, alphaq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(checkout(tmp_path / "site", COPIES.format(source=str(full))))
    ran = alphaq("quantize", unmapped, *QUANTIZE, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "strange_moe" in ran.err


def test_a_failing_converter_is_quoted(unmapped: Path, tmp_path: Path) -> None:
    script = checkout(tmp_path / "llama.cpp", "import sys; print('many words'); sys.exit('Model X is not supported')")
    with (
        pytest.raises(CheckpointError, match="cannot convert strange: Model X is not supported"),
        converted(unmapped, "strange", find_converter(script) or Path(), tmp_path),
    ):
        pass
    assert not list(tmp_path.glob(".alphaq-convert-*"))


def test_a_converter_that_writes_nothing_is_told(unmapped: Path, tmp_path: Path) -> None:
    script = checkout(tmp_path / "llama.cpp", "print('done')")
    with (
        pytest.raises(CheckpointError, match="it wrote no file"),
        converted(unmapped, "strange", find_converter(script) or Path(), tmp_path),
    ):
        pass


def test_a_folder_without_the_script_is_told(tmp_path: Path, mapped: Path, alphaq: Callable[..., Ran]) -> None:
    with pytest.raises(AlphaQError, match=r"has no convert_hf_to_gguf\.py"):
        find_converter(tmp_path)
    ran = alphaq("quantize", mapped, *QUANTIZE, "--converter", tmp_path, "-o", tmp_path / "out")
    assert ran.code == 2 and "llama.cpp checkout" in " ".join(ran.err.split())


def test_the_option_is_for_llama_cpp(tmp_path: Path, tiny: Path, alphaq: Callable[..., Ran]) -> None:
    ran = alphaq("quantize", tiny, "--bits", 4, "--converter", tmp_path, "-o", tmp_path / "out")
    assert ran.code == 2 and "which is for llama.cpp" in " ".join(ran.err.split())


def test_a_full_disk_is_told_first(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="takes 1,000,000,000,000,000,000 bytes"):
        require_room(10**18, tmp_path)


def test_names_of_links_and_of_the_file_are_the_model_s(full: Path, mapped: Path, tmp_path: Path) -> None:
    script = checkout(tmp_path / "llama.cpp", COPIES.format(source=str(full)))
    with converted(mapped, "Tiny-10M", find_converter(script) or Path(), tmp_path) as path:
        assert path.name == "Tiny-10M.gguf"
        assert open_checkpoint(path).name == "Tiny-10M"
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.skipif(not CONVERTER.is_dir(), reason=MISSING)
def test_the_real_converter_s_file_is_quantized_and_run(tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    from test_gguf_model import save_case

    from alphaq.engines.gguf.library import Llama

    save_case(tmp_path / "sentencepiece", "sentencepiece", byte_level())
    ran = alphaq("quantize", tmp_path / "sentencepiece", *QUANTIZE, "--converter", CONVERTER, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    with Llama(tmp_path / "out" / "model.gguf", 16) as model:
        assert model.logits(list(range(5, 15))).std() > 0


def test_only_ones_without_a_mapping_are_converted(tiny: Path) -> None:
    from alphaq.cli.means import Means

    opened = converting._opened_here(str(tiny), Means(), headers_only=False)
    assert opened is not None and opened.gguf is None
