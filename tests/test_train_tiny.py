"""The training script: what it saves loads everywhere, equal seeds give equal bytes, mistakes are told in one line."""

from __future__ import annotations

import math
import re
import runpy
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.nouns.matrix import Role
from injection import Ended, forked

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_tiny.py"
TEXT = str(files("alphaq") / "data" / "texts" / "tech.txt")
LAYERS, EXPERTS, VOCABULARY = 2, 4, 512
SIZES = (
    *("--steps", "3", "--tokens-per-step", "256", "--window", "64", "--log-every", "1"),
    *("--layers", str(LAYERS), "--experts", str(EXPERTS), "--hidden", "64", "--expert-width", "64"),
    *("--vocabulary", str(VOCABULARY)),
)


def forked_script(*arguments: str) -> Ended:
    """The script in a fork, which has torch and transformers imported and changes no settings of the other tests."""
    return forked(lambda: sys.exit(runpy.run_path(str(SCRIPT))["main"](arguments)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and printed text of one run."""
    output = tmp_path_factory.mktemp("train") / "model"
    result = forked_script(TEXT, "-o", str(output), *SIZES)
    assert result.code == 0, result.err
    return output, result.out


def test_loss_is_printed_and_falls(trained: tuple[Path, str]) -> None:
    printed = [float(loss) for loss in re.findall(r"loss (\S+)", trained[1])]
    assert len(printed) == 3
    assert all(math.isfinite(loss) and loss < math.log(VOCABULARY) + 1 for loss in printed)
    assert printed[-1] < printed[0]


def test_saved_folder_loads_with_transformers(trained: tuple[Path, str]) -> None:
    folder = trained[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    text = "The kernel reads a file, é."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 0
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(model(ids).logits).all()


def test_saved_folder_opens_as_checkpoint(trained: tuple[Path, str]) -> None:
    checkpoint = open_checkpoint(trained[0])
    assert len(checkpoint.with_role(Role.EXPERT)) == LAYERS * EXPERTS * 3


def test_equal_seed_gives_equal_bytes(trained: tuple[Path, str], tmp_path: Path) -> None:
    result = forked_script(TEXT, "-o", str(tmp_path / "again"), *SIZES)
    assert result.code == 0, result.err
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (trained[0] / name).read_bytes()


def test_existing_output_is_refused(tmp_path: Path) -> None:
    result = forked_script(TEXT, "-o", str(tmp_path), *SIZES)
    assert result.code == 2
    assert result.err == f"train_tiny: {tmp_path} already exists; choose another output folder\n"
    assert not list(tmp_path.iterdir())


def test_short_text_is_refused_with_a_given_tokenizer(
    trained: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.\n", encoding="utf-8")
    main = runpy.run_path(str(SCRIPT))["main"]
    tokenizer = str(trained[0] / "tokenizer.json")
    assert main([str(short), "-o", str(tmp_path / "out"), "--tokenizer", tokenizer, *SIZES]) == 2
    assert re.fullmatch(r"train_tiny: the text is too short: \d+ tokens, .*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
