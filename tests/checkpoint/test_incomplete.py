import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.checkpoint.safetensors_format import parse_header
from alphaq.checkpoint.weights import read_shards
from alphaq.errors import CheckpointError
from conftest import Ran

Run = Callable[..., Ran]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 19967784\n"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """The bundled model, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("command", [("inspect",), ("generate", "def main")], ids=["inspect", "generate"])
def test_a_pointer_in_place_of_a_file_asks_for_git_lfs_pull(
    alphaq: Run, model: Path, name: str, command: tuple[str, ...]
) -> None:
    (model / name).write_bytes(POINTER)
    ran = alphaq(command[0], model, *command[1:])
    assert ran.code == 2
    assert (
        ran.err.split()
        == f"error: {model / name} is a Git LFS pointer, not the file. Run `git lfs pull` in the folder.".split()
    )


def test_a_pointer_among_shards_on_a_store_is_told_by_its_bytes() -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors is a Git LFS pointer"):
        parse_header("x.safetensors", len(POINTER), lambda begin, nbytes: POINTER[begin : begin + nbytes])


@pytest.mark.parametrize("name", ["i.gguf", "model.gguf", "plan.json"])
def test_other_files_may_be_pointers_too(alphaq: Run, tiny: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    commands = {
        "i.gguf": ("plan", tiny, "--bits", "3", "--engine", "llama.cpp", "--imatrix", tmp_path / name),
        "model.gguf": ("inspect", tmp_path / name),
        "plan.json": ("quantize", tiny, "--plan", tmp_path / name, "-o", tmp_path / "out"),
    }
    ran = alphaq(*commands[name])
    assert ran.code == 2 and "Run `git lfs pull`" in ran.err.replace("\n", " ")


def test_a_file_that_nothing_needs_may_stay_a_pointer(model: Path) -> None:
    for name in ("pytorch_model.bin", "consolidated.safetensors", "figure.png"):
        (model / name).write_bytes(POINTER)
    assert len(open_checkpoint(model).planned) == 96


@pytest.mark.parametrize("command", [("inspect",), ("generate", "def main")], ids=["inspect", "generate"])
def test_stubs_of_zero_3_are_told_from_damage(alphaq: Run, model: Path, command: tuple[str, ...]) -> None:
    weights = load_file(model / "model.safetensors")
    stubs = {name: torch.empty(0, dtype=one.dtype) if one.ndim > 1 else one for name, one in weights.items()}
    save_file(stubs, model / "model.safetensors", {"format": "pt"})
    ran = alphaq(command[0], model, *command[1:])
    said = ran.err.replace("\n", " ")
    assert ran.code == 2 and "is empty (shape [0])" in said
    assert "zero_to_fp32.py" in said and "stage3_gather_16bit_weights_on_model_save" in said


def test_one_stub_is_enough_and_empty_state_that_is_no_weight_is_not_one(model: Path) -> None:
    path = model / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "model.norm._extra_state": torch.empty(0, dtype=torch.uint8)}, path, {"format": "pt"})
    read_shards(model)
    first = next(name for name, one in weights.items() if one.ndim == 2)
    save_file({**weights, first: torch.empty(0, dtype=torch.bfloat16)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{first} is empty .*one of 1 such tensors of {len(weights)}"):
        open_checkpoint(model)


def test_a_settings_file_with_a_byte_order_mark_is_named(alphaq: Run, model: Path) -> None:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text())), encoding="utf-8-sig")
    ran = alphaq("inspect", model)
    assert ran.code == 2 and "begins with a byte-order mark" in ran.err.replace("\n", " ")
