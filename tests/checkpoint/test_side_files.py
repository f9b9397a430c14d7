"""What configs and code refer to comes along, from within the folder only; what does not is told, and nothing runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alphaq.checkpoint import side_files as module
from alphaq.checkpoint.side_files import side_files
from alphaq.errors import CheckpointError
from alphaq.work.untrusted import shown
from conftest import Ran

TEMPLATE = "additional_chat_templates/tools.jinja"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config."""
    put(tmp_path / "model", "config.json", {})
    return tmp_path / "model"


def put(folder: Path, name: str, content: Any = "x") -> None:
    """A small file, of JSON unless the content is a text."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def carried(folder: Path) -> set[str]:
    return set(side_files(folder).names)


def test_templates_vocabularies_and_licences_come_along(folder: Path) -> None:
    names = {TEMPLATE, "chat_template.jinja", "tokenizer.json", "qwen.tiktoken", "tokenizer.model.v3"}
    names |= {"merges.txt", "vocab.bpe", "source.spm", "LICENSE", "NOTICE.txt", "README.md", "preprocessor_config.json"}
    for name in names:
        put(folder, name)
    assert carried(folder) == names


def test_what_says_something_of_the_source_s_weights_stays(folder: Path) -> None:
    for name in ("plan.json", "hf_quant_config.json", "adapter_config.json", "pytorch_model.bin.index.json"):
        put(folder, name, {})
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "x.gguf"):
        put(folder, name)
    put(folder, "notes.json", ["model.safetensors", "x.gguf", "hf_quant_config.json"])
    assert carried(folder) == {"notes.json"}
    assert side_files(folder).notes == ()


CODE = {"own.py", "helper.py", "bare.dat", "package/part.py", "package/__init__.py"}


@pytest.mark.parametrize(
    ("config", "content", "names"),
    [
        ("tokenizer_config.json", {"vocab_file": "assets/words.dat"}, {"assets/words.dat"}),
        ("tokenizer_config.json", {"vocab_file": "./assets/words.dat"}, {"assets/words.dat"}),
        ("processor_config.json", {"a": [{"voices_dir": "voices"}]}, {"voices/a.npz", "voices/b/c.json"}),
        ("generation_config.json", {"list_path": "bare.dat"}, {"bare.dat"}),
        (
            "config.json",
            {"auto_map": {"AutoConfig": "code/configuration.Own"}},
            {"code/configuration.py", "code/util.py"},
        ),
        ("config.json", {"auto_map": {"AutoModel": ["own.Own", None]}}, CODE),
        ("config.json", {"auto_map": {"AutoModel": "another/repository--own.Own"}}, set()),
        ("tokenizer_config.json", {"model_type": "voices"}, set()),  # which happens to be the name of a folder
        ("tokenizer_config.json", {"bos_token": ".", "eos_token": "/", "sep": "..", "x": "", "y": "\0"}, set()),
    ],
)
def test_what_a_file_refers_to_comes_along(config: str, content: Any, names: set[str], folder: Path) -> None:
    for name in ("assets/words.dat", "voices/a.npz", "voices/b/c.json", "bare.dat", "code/configuration.py"):
        put(folder, name)
    for name in (
        "code/util.py",
        "package/part.py",
        "package/__init__.py",
        "package/__pycache__/part.pyc",
        "unasked/x.txt",
    ):
        put(folder, name)
    put(folder, "own.py", 'from .helper import f\nFILES = {"vocab_file": "bare.dat"}\nfrom .package.part import g\n')
    put(folder, "helper.py", "import os\n")
    put(folder, "sitecustomize.py")
    put(folder, config, content)
    assert carried(folder) == names | ({config} - {"config.json"})
    assert side_files(folder).notes == ()


def test_what_does_not_come_along_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "secret.txt")
    put(folder, "speaker.pt")
    put(folder, "long.txt", "x" * 1000)
    put(tmp_path, "tokenizer.json")
    put(folder, "tokenizer.json")
    put(folder, "codec/config.json")
    put(folder, "codec/model.safetensors")
    outside = {"old": str(tmp_path / "tokenizer.json"), "codec_path": "codec"}  # of which the folder has its own
    outside |= {"a": "../secret.txt", "b": str(tmp_path / "secret.txt"), "c": "../absent.txt", "d": "/no/such/file"}
    put(folder, "processor_config.json", {**outside, "speaker": "speaker.pt"})
    monkeypatch.setattr(module, "MOST_SIDE_BYTES", 500)
    found = side_files(folder)
    assert found.names == ("processor_config.json", "tokenizer.json", "codec/config.json")
    assert [note.partition(": ")[2] for note in found.notes] == [
        "'../secret.txt', which processor_config.json names, lies outside of the folder",
        f"{shown(tmp_path / 'secret.txt')}, which processor_config.json names, lies outside of the folder",
        "long.txt has 1000 bytes, more than the 500 of a small file",
        "speaker.pt holds weights",
        "codec/model.safetensors holds weights",
    ]


def test_more_files_than_may_come_along_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        put(folder, f"additional_chat_templates/{number}.jinja")
    put(folder, "tokenizer.json")
    monkeypatch.setattr(module, "MOST_SIDE_FILES", 3)
    found = side_files(folder)
    assert found.names == ("tokenizer.json", "additional_chat_templates/0.jinja", "additional_chat_templates/1.jinja")
    assert found.notes == ("not copied: 3 of 6 small files, more than 3",)


@pytest.mark.parametrize("linked", ["a.txt", TEMPLATE, "additional_chat_templates"])
def test_a_link_out_of_the_folder_is_refused(linked: str, folder: Path, tmp_path: Path) -> None:
    put(tmp_path, "elsewhere/tools.jinja")
    (folder / linked).parent.mkdir(exist_ok=True)
    (folder / linked).symlink_to(tmp_path / "elsewhere" / ("" if "." not in linked else "tools.jinja"))
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        side_files(folder)


def test_links_within_the_folder_and_loops_end(folder: Path) -> None:
    put(folder, "templates/tools.jinja")
    (folder / "additional_chat_templates").symlink_to("templates")
    (folder / "templates" / "loop").symlink_to("..")
    assert TEMPLATE in carried(folder)


def test_pipes_are_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "a.json")
    (folder / "additional_chat_templates").mkdir()
    os.mkfifo(folder / TEMPLATE)
    assert carried(folder) == set()


@pytest.fixture
def templated(tiny: Path, tmp_path: Path) -> Path:
    """The bundled model with two templates, and code that must not run."""
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(tiny, tmp_path / "templated"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {
        "default": "{{ messages[0]['content'] }}",
        "tool_use": "TOOLS {{ messages[0]['content'] }}",
    }
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    put(folder, "config.json", config | {"auto_map": {"AutoConfig": "configuration_own.Own"}})
    put(folder, "configuration_own.py", f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom .parts.more import x\n")
    put(folder, "parts/more.py", "x = 1\n")
    return folder


def said(folder: Path) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "hi"}]
    return str(tokenizer.apply_chat_template(messages, chat_template="tool_use", tokenize=False))


QUICK = ("--bits", 4, "--method", "uniform", "--noise", "analytic", "--workers", 1)


@pytest.mark.parametrize(
    "engine", ["native", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mlx", "vllm", "gptqmodel"))]
)
def test_every_engine_s_output_has_them(
    engine: str, templated: Path, tmp_path: Path, alphaq: Callable[..., Ran]
) -> None:
    ran = alphaq("quantize", templated, "--engine", engine, *QUICK, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert said(tmp_path / "out") == said(templated) == "TOOLS hi"
    for name in ("configuration_own.py", "parts/more.py"):
        assert (tmp_path / "out" / name).read_bytes() == (templated / name).read_bytes()
    assert not (tmp_path / "ran").exists()


def test_outputs_of_outputs_have_them_too(tiny_quantized: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    folder = Path(shutil.copytree(tiny_quantized, tmp_path / "model"))
    put(folder, TEMPLATE)
    assert alphaq("recode", folder, "-o", tmp_path / "recoded", "--workers", 1).code == 0
    assert (tmp_path / "recoded" / TEMPLATE).is_file()


def test_a_gguf_file_has_the_templates_and_how_to_sample(tmp_path: Path, templated: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'alphaq[gguf]'")
    from alphaq.engines.gguf.package import general_metadata, special_tokens

    for name in ("b", "a", "d", "c"):
        put(templated, f"additional_chat_templates/{name}.jinja", name)
    config = json.loads((templated / "tokenizer_config.json").read_text())
    put(templated, "tokenizer_config.json", config | {"chat_template": "old"})  # which transformers takes the file for
    found = {key: value.value for key, value in special_tokens(templated, 4096, merges=False).items()}
    assert found["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    assert found["tokenizer.chat_template.tool_use"] == "TOOLS {{ messages[0]['content'] }}"
    assert found["tokenizer.chat_templates"] == ("a", "b", "c", "d", "tool_use")

    def labels() -> dict[str, Any]:
        made = general_metadata(templated, "model", {}, (1, 1, 1), 8)
        return {key: value.value for key, value in made.items() if "sampling" in key}

    put(templated, "generation_config.json", {"do_sample": True, "temperature": 0.5, "top_k": 20, "top_p": "x"})
    assert labels() == {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    put(templated, "generation_config.json", {"temperature": 0.5})
    assert labels() == {}


def test_what_a_gguf_file_has_no_place_for_is_told(templated: Path) -> None:
    from alphaq.checkpoint.reader import open_checkpoint
    from alphaq.engines.gguf.profile import side_notes

    assert side_notes(open_checkpoint(templated)) == ()
    put(templated, "preprocessor_config.json", {})
    assert "not in the GGUF file: preprocessor_config.json" in side_notes(open_checkpoint(templated))[0]
