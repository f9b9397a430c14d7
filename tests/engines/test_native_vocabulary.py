"""Embedding and head in native checkpoints: kept unless a user asks, then of exactly the bytes that were planned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.output import Output
from alphaq.formats.table import storage_bytes
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Role
from conftest import random_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FAST = ("--method", "alphaq", "--group-size", 32, "--workers", 1)


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


def succeeded(ran: Any) -> Any:
    assert ran.code == 0, ran.err
    return ran


@pytest.fixture
def small(save_family: Callable[..., Path]) -> Path:
    """A random model with a head of its own."""
    return save_family("qwen2_moe")


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    random_model("qwen2_moe", tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def test_both_are_copied_unless_asked_for(save_family: Callable[..., Path], tmp_path: Path, alphaq: Any) -> None:
    source = save_family("qwen2_moe", dtype=torch.float32)
    succeeded(alphaq("quantize", source, "--bits", 3, "-o", tmp_path / "out", *FAST))
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(source)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    for name in (EMBEDDING, HEAD):
        assert torch.equal(found[name], wanted[name]) and name not in plan["choices"]


def test_widths_that_were_asked_for_are_stored_in_exactly_the_planned_bytes(
    small: Path, tmp_path: Path, alphaq: Any
) -> None:
    asked = ("--embedding-bits", 4, "--head-bits", 6)
    planned = succeeded(alphaq("plan", small, "--bits", 3, *asked, *FAST, "--json")).json
    kept = succeeded(alphaq("plan", small, "--bits", 3, *FAST, "--json")).json
    assert (planned["choices"][EMBEDDING], planned["choices"][HEAD]) == ("4g32", "6g32")
    assert planned["assignment"] == kept["assignment"]  # the budget of --bits is the experts'
    shape = open_checkpoint(small).with_role(Role.EMBEDDING)[0].shape
    saved = sum(2 * shape[0] * shape[1] - storage_bytes(Choice(bits, 32), shape) for bits in (4, 6))
    assert abs(kept["size_bytes"] - planned["size_bytes"] - saved) <= 16  # header entries differ by their shapes
    written = succeeded(alphaq("quantize", small, "--bits", 3, *asked, *FAST, "-o", tmp_path / "out", "--json")).json
    assert weight_bytes(tmp_path / "out") == planned["size_bytes"] == written["size_bytes"]
    succeeded(alphaq("verify", tmp_path / "out", "--reference", small, "--workers", 1))


def test_a_size_counts_them_and_gives_the_rest_to_the_experts(small: Path, alphaq: Any) -> None:
    size = 105_000
    averages = []
    for asked in ((), ("--embedding-bits", 8, "--head-bits", 8), ("--embedding-bits", 3, "--head-bits", 4)):
        plan = succeeded(alphaq("plan", small, "--size", size, *asked, *FAST, "--json")).json
        assert 0.99 * size < plan["size_bytes"] <= size
        averages.append(plan["bits_per_weight"])
    assert averages == sorted(averages) and averages[0] < averages[1] < averages[2]


def test_pins_reach_them_as_they_reach_other_roles(small: Path, alphaq: Any) -> None:
    common = ("plan", small, "--bits", 3, *FAST, "--json")
    by_option = succeeded(alphaq(*common, "--embedding-bits", 4, "--head-bits", 6)).json
    by_pin = succeeded(alphaq(*common, "--pin", "embedding=4", "--pin", "head=6")).json
    by_name = succeeded(alphaq(*common, "--pin", "embed_tokens=4", "--pin", f"{HEAD}=6")).json
    assert by_pin["choices"] == by_option["choices"] == by_name["choices"]
    assert by_pin["size_bytes"] == by_option["size_bytes"] == by_name["size_bytes"]
    special = succeeded(alphaq(*common, "--pin", "embedding=3g64-slim", "--pin", "head=8g32-nest")).json
    assert (special["choices"][EMBEDDING], special["choices"][HEAD]) == ("3g64-slim", "8g32-nest")


def test_a_width_for_a_tied_head_names_the_matrix_that_there_is(tied: Path, alphaq: Any) -> None:
    ran = alphaq("plan", tied, "--bits", 3, "--head-bits", 6, *FAST)
    assert ran.code == 2
    assert "stores no head of its own: it is tied to the embedding. Use --embedding-bits" in ran.err
    ran = alphaq("plan", tied, "--bits", 3, "--pin", "head=6", *FAST)
    assert ran.code == 2 and "--pin 'head' names no matrix" in ran.err
    plan = succeeded(alphaq("plan", tied, "--bits", 3, "--embedding-bits", 6, *FAST, "--json")).json
    assert plan["choices"][EMBEDDING] == "6g32"


def test_coded_files_hold_them_and_run_as_uncoded_ones(tiny: Path, tmp_path: Path, alphaq: Any) -> None:
    from transformers import AutoModelForCausalLM

    asked = ("--bits", 3, "--choices", "3", "--embedding-bits", 4, "--head-bits", 5)
    coded, plain, again = (tmp_path / name for name in ("coded", "plain", "again"))
    result = succeeded(alphaq("quantize", tiny, *asked, *FAST, "--codec", "zstd", "-o", coded, "--json")).json
    assert weight_bytes(coded) == result["size_bytes"]
    succeeded(alphaq("verify", coded, "--reference", tiny, "--workers", 1))
    succeeded(alphaq("recode", coded, "--codec", "none", "-o", plain))
    succeeded(alphaq("recode", plain, "--codec", "zstd", "-o", again))
    assert {name: one.tolist() for name, one in tensors_of(again).items() if name == EMBEDDING} == {
        EMBEDDING: tensors_of(coded)[EMBEDDING].tolist()
    }
    assert tensors_of(coded)[EMBEDDING].nbytes < tensors_of(plain)[EMBEDDING].nbytes
    ids = torch.arange(100, 130)[None]
    with torch.inference_mode():
        answers = [AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)(ids).logits for one in (coded, plain)]
    assert torch.equal(*answers)


def test_a_slice_keeps_them_unless_told_otherwise(small: Path, tmp_path: Path, alphaq: Any) -> None:
    nested = ("--choices", "4g32-nest", "--pin", "embedding=6g64-nest", "--head-bits", 5)
    succeeded(alphaq("quantize", small, "--bits", 4, *nested, *FAST, "-o", tmp_path / "out"))
    succeeded(alphaq("slice", tmp_path / "out", "--bits", 3, *FAST, "-o", tmp_path / "same"))
    before, after = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "same")
    assert all(torch.equal(before[name], after[name]) for name in (EMBEDDING, HEAD))
    succeeded(
        alphaq(
            *("slice", tmp_path / "out", "--bits", 3, *FAST, "-o", tmp_path / "less"),
            *("--pin", "embedding=4g64-nest", "--head-bits", 4),
        )
    )
    plan = Output(tmp_path / "less").plan
    assert (plan.choices[EMBEDDING], plan.choices[HEAD]) == ("4g64-nest", "4g32")
    assert weight_bytes(tmp_path / "less") == plan.size_bytes
    succeeded(alphaq("verify", tmp_path / "less", "--reference", tmp_path / "out", "--workers", 1))


def test_a_slice_of_a_model_that_keeps_them_does_not_convert_them(
    save_family: Callable[..., Path], tmp_path: Path, alphaq: Any
) -> None:
    source = save_family("qwen2_moe", dtype=torch.float32)
    succeeded(alphaq("quantize", source, "--bits", 4, "--choices", "4g32-nest", *FAST, "-o", tmp_path / "out"))
    succeeded(alphaq("slice", tmp_path / "out", "--bits", 3, *FAST, "-o", tmp_path / "slice"))
    assert torch.equal(tensors_of(tmp_path / "slice")[EMBEDDING], tensors_of(source)[EMBEDDING])


@pytest.mark.slow
def test_a_quantizer_that_looks_at_inputs_names_what_has_none(tiny: Path, tmp_path: Path, alphaq: Any) -> None:
    (tmp_path / "text").write_text("def main():\n    return 1\n" * 200)
    asked = ("--bits", 3, "--choices", "3", "--embedding-bits", 4, "--head-bits", 4, "--quantizer", "gptq")
    result = succeeded(
        alphaq("quantize", tiny, *asked, *FAST, "--calibration", tmp_path / "text", "-o", tmp_path / "out", "--json")
    ).json
    assert {EMBEDDING, HEAD} <= result["not_calibrated"].keys()
    assert weight_bytes(tmp_path / "out") == result["size_bytes"]
