"""The carving script: neurons keep their weights, all experts on are the dense model, equal seeds give equal bytes."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.nouns.matrix import Role
from conftest import ROOT
from dense_models import save_dense
from injection import Ended, forked

SCRIPT = ROOT / "scripts" / "carve_moe.py"
NEURONS, SHARED, EXPERTS, LAYERS = 96, 32, 4, 2
SIZES = (
    *("--shared", str(SHARED), "--experts", str(EXPERTS), "--windows", "6", "--length", "24"),
    *("--layer-steps", "5"),
)


def carve(dense: Path, output: Path, *options: str) -> Ended:
    """The script in a fork, which has torch imported and changes no settings of the other tests."""
    arguments = [str(dense), "-o", str(output), *SIZES, *options]
    return forked(lambda: sys.exit(runpy.run_path(str(SCRIPT))["main"](arguments)))


def carved(dense: Path, output: Path, *options: str) -> Path:
    result = carve(dense, output, *options)
    assert result.code == 0, result.err
    return output


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"), "llama", intermediate_size=NEURONS)


@pytest.fixture(scope="module")
def moe(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of four experts on, everything fitted."""
    return carved(dense, tmp_path_factory.mktemp("moe") / "model", "--active", "2", "--steps", "3")


def test_folder_opens_as_checkpoint_with_experts_of_equal_width(moe: Path) -> None:
    checkpoint = open_checkpoint(moe)
    experts = checkpoint.with_role(Role.EXPERT)
    assert len(experts) == LAYERS * EXPERTS * 3
    assert {min(matrix.shape) for matrix in experts} == {(NEURONS - SHARED) // EXPERTS}
    assert {min(matrix.shape) for matrix in checkpoint.with_role(Role.SHARED_EXPERT)} == {SHARED}


def neurons(weights: dict[str, torch.Tensor], mlp: str, up: int = 1, down: int = 1) -> list[list[float]]:
    """A row for each: its weights in gate, in up and in down, the last two without their scale."""
    parts = [weights[f"{mlp}.{part}_proj.weight"] for part in ("gate", "up", "down")]
    return torch.cat([parts[0], parts[1] / up, parts[2].T / down], dim=1).tolist()


def test_every_neuron_keeps_its_weights_and_stands_in_one_expert(dense: Path, moe: Path) -> None:
    before, after = load_file(dense / "model.safetensors"), load_file(moe / "model.safetensors")
    for layer in range(LAYERS):
        mlp = f"model.layers.{layer}.mlp"
        parts = [neurons(after, f"{mlp}.experts.{expert}", up=2, down=2) for expert in range(EXPERTS)]
        parted = sum(parts, neurons(after, f"{mlp}.shared_expert", down=2))
        assert sorted(parted) == sorted(neurons(before, mlp))


def test_only_routers_and_norms_are_trained(dense: Path, moe: Path) -> None:
    before, after = load_file(dense / "model.safetensors"), load_file(moe / "model.safetensors")
    kept = {name for name in before if ".mlp." not in name}
    changed = {name for name in kept if not torch.equal(before[name], after[name])}
    assert changed
    assert all("norm" in name for name in changed)
    assert kept == {name for name in after if ".mlp." not in name}
    assert all(after[f"model.layers.{layer}.mlp.gate.weight"].any() for layer in range(LAYERS))


def test_all_experts_on_are_the_dense_model(dense: Path, tmp_path: Path) -> None:
    whole = carved(dense, tmp_path / "whole", "--active", str(EXPERTS), "--steps", "0")
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    logits = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits for f in (dense, whole)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_fewer_experts_are_another_model(dense: Path, moe: Path) -> None:
    ids = torch.arange(40)[None]
    logits = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits for f in (dense, moe)]
    assert (logits[1] - logits[0]).abs().mean() > 0.01


def test_equal_seed_gives_equal_bytes_and_another_one_others(dense: Path, moe: Path, tmp_path: Path) -> None:
    options = ("--active", "2", "--steps", "3")
    again = carved(dense, tmp_path / "again", *options)
    other = carved(dense, tmp_path / "other", *options, "--seed", "1")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (moe, again, other)]
    assert weights[0] == weights[1] != weights[2]
    assert (moe / "config.json").read_bytes() == (again / "config.json").read_bytes()


def test_perplexity_of_both_is_printed_for_each_text(dense: Path, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("The kernel reads a file, and writes it. " * 40, encoding="utf-8")
    result = carve(dense, tmp_path / "moe", "--active", str(EXPERTS), "--steps", "0", "--text", str(text))
    assert result.code == 0, result.err
    found = re.search(r"words.txt: perplexity (\S+) dense, (\S+) carved, (\S+) times", result.out)
    assert found
    assert float(found[1]) > 1
    assert float(found[3]) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--experts", "8", "--shared", "33"), "96 neurons less --shared 33 are not equal parts for --experts 8"),
        (("--experts", "6", "--shared", "36"), "--experts must be a power of two"),
        (("--active", "5"), "--active 5 is more than --experts 4"),
        (("--shared", "96"), "96 neurons less --shared 96 are not equal parts"),
    ],
)
def test_impossible_parts_are_refused(dense: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = carve(dense, tmp_path / "out", *options)
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_other_families_and_biases_are_refused(tmp_path: Path) -> None:
    gemma = save_dense(tmp_path / "gemma", "gemma")
    assert "is of the family gemma; only llama can be carved" in carve(gemma, tmp_path / "out").err
    biased = save_dense(tmp_path / "biased", "llama", attention_bias=True)
    assert "which Qwen2-MoE cannot hold" in carve(biased, tmp_path / "out").err
    assert "holds no config.json" in carve(tmp_path / "nothing", tmp_path / "out").err
    assert not (tmp_path / "out").exists()


def test_existing_output_is_refused(dense: Path, tmp_path: Path) -> None:
    result = carve(dense, tmp_path)
    assert result.code == 2
    assert result.err == f"carve_moe: {tmp_path} already exists; choose another output folder\n"
