"""Nested and coded models in the runtime: multiplied where they lie, loaded, saved and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import alphaq  # noqa: F401 - registers the plug-in
from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.output import Output
from alphaq.formats.blocks import encode
from alphaq.formats.table import format_of, parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import resolve
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.quantizers.nested import quantize_nested
from alphaq.runtime import multiply as module
from alphaq.runtime.multiply import multiply
from alphaq.runtime.packed import FLAGS, HALVES, SYMMETRIC, PackedWeights
from alphaq.writing.recoding import recode
from families import plain_copy

WIDTHS = range(2, 9)
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def nest(bits: int, group: int) -> Choice:
    return parse_choice(f"{bits}g{group}-nest")


def packed(shape: tuple[int, int], group: int) -> PackedWeights:
    """An expert for each nested width, and plain ones between them."""
    generator = torch.Generator().manual_seed(group)
    tensors = []
    for bits in WIDTHS:
        weight = torch.randn(shape, generator=generator)
        tensors.append(encode(quantize_nested(weight, nest(bits, group))))
        tensors.append(encode(quantize_debiased(weight, Choice(bits, group, symmetric=bool(bits % 2)))))
    weights = PackedWeights([[str(expert) for expert in range(len(tensors))]], shape)
    weights.fill([tensors])
    return weights


def far(found: torch.Tensor, weights: PackedWeights, inputs: torch.Tensor, expert: int) -> float:
    """Relative error of one expert's products."""
    wanted = inputs.double() @ weights.dequantized(0, expert, torch.float64).T
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_table_tells_nested_codes_from_others(group: int) -> None:
    weights = packed((8, 200), group)
    flags = weights.table[0, :, FLAGS].tolist()
    assert flags[::2] == [SYMMETRIC | HALVES] * len(WIDTHS)
    assert flags[1::2] == [SYMMETRIC * (bits % 2) for bits in WIDTHS]
    assert [weights.choice(0, expert) for expert in range(0, 14, 2)] == [nest(bits, group) for bits in WIDTHS]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", [1, 7, 50])
@pytest.mark.parametrize(("shape", "group"), [((64, 128), 32), ((65, 136), 64), ((7, 300), 128), ((130, 384), 128)])
def test_products_are_those_of_the_dequantized_matrices(
    shape: tuple[int, int], group: int, count: int, dtype: torch.dtype
) -> None:
    """Of few tokens in the kernel, of many with restored rows."""
    weights = packed(shape, group)
    inputs = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    experts, tokens = torch.arange(14).repeat_interleave(count), torch.arange(count).repeat(14)
    found = multiply(inputs, weights, experts, tokens)
    for expert in range(14):
        assert far(found[experts == expert], weights, inputs, expert) < TOLERANCE[dtype], weights.choice(0, expert)


def test_restored_rows_give_what_the_kernel_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = packed((300, 200), 64)
    inputs = torch.randn(9, 200, generator=torch.Generator().manual_seed(2))
    experts, tokens = torch.arange(14).repeat_interleave(9), torch.arange(9).repeat(14)
    few = multiply(inputs, weights, experts, tokens)
    monkeypatch.setattr(module, "FEW_TOKENS", 0)
    monkeypatch.setattr(module, "RESTORED_BYTES", 100_000)
    many = multiply(inputs, weights, experts, tokens)
    assert float((few - many).norm() / few.norm()) < 5e-6


def quantized(source: Path, out: Path, codec: str | None) -> Path:
    """A model with nested choices of several widths."""
    checkpoint = open_checkpoint(source)
    config = PlanConfig(
        budget=Budget(bits=3.5), choices="2g32-nest,3g32-nest,5g64-nest,16", method="alphaq", codec=codec
    )
    plan = pipeline.make_plan(checkpoint, resolve(config), pipeline.measure_for_plan(checkpoint, resolve(config)))
    pipeline.quantize(checkpoint, plan, out)
    return out


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(ids).logits.float()


@pytest.mark.parametrize("fused", [False, True])
def test_a_nested_model_coded_or_not_has_the_dequantized_logits(
    save_family: Callable[..., Path], tmp_path: Path, fused: bool
) -> None:
    source = save_family("qwen2_moe", fused)
    plain = quantized(source, tmp_path / "plain", None)
    recode(plain, tmp_path / "coded", "zstd")
    assert any(format_of(choice).name == "nested" for choice in Output(plain).plan.every_choice().values())
    wanted = logits(load(plain_copy(open_checkpoint(source), plain, tmp_path / "restored")))
    found, coded = logits(load(plain)), logits(load(tmp_path / "coded"))
    assert float((found - wanted).abs().max()) < 1e-4
    assert torch.equal(coded, found)


def test_a_coded_model_saved_by_transformers_loads_again(save_family: Callable[..., Path], tmp_path: Path) -> None:
    model = load(quantized(save_family("qwen2_moe", False), tmp_path / "coded", "zstd"))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_a_coded_model_can_be_given_ordinary_parameters(save_family: Callable[..., Path], tmp_path: Path) -> None:
    model = load(quantized(save_family("qwen2_moe", False), tmp_path / "coded", "zstd"))
    wanted = logits(model)
    model.dequantize()
    assert float((logits(model) - wanted).abs().max()) < 1e-4
