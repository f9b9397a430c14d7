"""Files for GPTQModel: read by its documented layout here, and by GPTQModel itself where it is installed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import (
    config_of,
    cycled_plan,
    flip,
    gaussian,
    linear_modules,
    plan_of,
    quantize,
    quantized_choices,
    round_trip,
    weight_bytes,
)
from safetensors.torch import load_file

from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines import gptqmodel
from alphaq.engines.output import PLAN_NAME, read_manifest
from alphaq.errors import VerificationError
from alphaq.formats.blocks import dequantize
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget
from alphaq.quantizers.debiased import quantize_debiased
from conftest import FAMILIES, Ran, read_back

CHOICES = ("2g32", "3g32", "4g32", "8g32", "16")
NAMES = ("qweight", "qzeros", "scales", "g_idx")


def codes_along_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n·b/32, out] → codes [n, out], word by word as GPTQModel's TorchLinear packs them.

    32 codes of 3 bits fill three words: ten codes and two bits of the eleventh, its third bit, ten more and one bit
    of the 22nd, its other two bits and the last ten.
    """
    values = words.long() & 0xFFFFFFFF
    if bits != 3:
        shifts = torch.arange(0, 32, bits)
        return (values[:, None] >> shifts[:, None] & 2**bits - 1).flatten(0, 1)
    first, second, third = values.view(-1, 3, values.shape[1]).unbind(1)
    codes = [first >> 3 * i & 7 for i in range(10)]
    codes.append(first >> 30 & 3 | (second & 1) << 2)
    codes += [second >> 3 * i + 1 & 7 for i in range(10)]
    codes.append(second >> 31 & 1 | (third & 3) << 1)
    codes += [third >> 3 * i + 2 & 7 for i in range(10)]
    return torch.stack(codes, 1).flatten(0, 1)


def decoded(parts: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """float32 [out, in]: scales[g]·(q − zeros[g]) with g = g_idx of each input."""
    codes = codes_along_rows(parts["qweight"], bits)
    zeros = codes_along_rows(parts["qzeros"].T, bits).T
    groups = parts["g_idx"].long()
    return (parts["scales"].float()[groups] * (codes - zeros[groups])).T


def resolved(config: dict[str, Any], module: str) -> Choice:
    """The choice that GPTQModel gives a module: the first rule that matches, else the general one."""
    for pattern, changes in config["dynamic"].items():
        if re.match(pattern[2:], module):
            if pattern.startswith("-:"):
                return Choice(16)
            return Choice(changes["bits"], changes["group_size"])
    return Choice(config["bits"], config["group_size"])


@pytest.fixture(scope="module")
def out(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a choice for each expert and projection."""
    plan = cycled_plan(open_checkpoint(tiny), "gptqmodel", ("4g64", "3g32", "2g128", "8g32", "16"), "4g128")
    return quantize(tiny, plan, tmp_path_factory.mktemp("gptqmodel") / "out")


@pytest.mark.parametrize("choice", quantized_choices(gptqmodel.PROFILE), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_stored_tensors_hold_what_was_promised(choice: Choice, dtype: torch.dtype) -> None:
    weight = gaussian(96, 384, dtype)
    matrix, restored = round_trip(gptqmodel.PROFILE, choice, weight)
    parts = dict(zip(NAMES, gptqmodel.encode(matrix), strict=True))
    promised = gptqmodel.tensors(choice, (96, 384), "F16")
    assert {name: tuple(part.shape) for name, part in parts.items()} == {n: one.shape for n, one in promised.items()}
    assert torch.equal(decoded(parts, choice.bits), dequantize(matrix))
    assert torch.equal(restored, dequantize(matrix))
    error = float((restored - weight.float()).double().square().sum())
    assert matrix.squared_error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("choice", quantized_choices(gptqmodel.PROFILE), ids=str)
def test_gptqmodel_itself_decodes_them(choice: Choice) -> None:
    """TorchLinear multiplies in the type of its scales, float16 here: rounded once."""
    torch_linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    matrix = quantize_debiased(gaussian(96, 384), choice)
    module = torch_linear(
        choice.bits, choice.group_size, sym=False, desc_act=False, in_features=384, out_features=96
    ).eval()
    for name, part in zip(NAMES, gptqmodel.encode(matrix), strict=True):
        assert getattr(module, name).shape == part.shape
        getattr(module, name).copy_(part)
    module.qzero_format(2)
    assert torch.equal(module.dequantize_weight().T, dequantize(matrix).half())


@pytest.mark.slow
def test_command_line_quantizes_and_verifies(tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    result = alphaq("quantize", tiny, "--engine", "gptqmodel", "--bits", 3.5, "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    plan = Plan.from_json((tmp_path / "out" / PLAN_NAME).read_bytes(), "plan")
    assert weight_bytes(tmp_path / "out") == plan.size_bytes == result.json["size_bytes"]
    assert alphaq("verify", tmp_path / "out", "--reference", tiny).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_size_is_never_exceeded(tiny: Path, tmp_path: Path, share: float) -> None:
    small, large = (plan_of(tiny, "gptqmodel", budget=Budget(bits=bits)).size_bytes for bits in (2, 8))
    limit = round((1 - share) * small + share * large)
    plan = plan_of(tiny, "gptqmodel", budget=Budget(size_bytes=limit))
    assert weight_bytes(quantize(tiny, plan, tmp_path / "out")) == plan.size_bytes <= limit


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_every_family_is_read_back_as_quantized(
    save_family: Callable[..., Path], tmp_path: Path, family: str, fused: bool
) -> None:
    source = save_family(family, fused)
    checkpoint = open_checkpoint(source)
    plan = cycled_plan(checkpoint, "gptqmodel", CHOICES, None)
    out = quantize(source, plan, tmp_path / "out")
    plan = Plan.from_json((out / PLAN_NAME).read_bytes(), "plan")
    assert weight_bytes(out) == plan.size_bytes
    stored = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert not any("block_sparse_moe" in name for name in stored)
    originals = {matrix.name: matrix for matrix in checkpoint.matrices}
    records = read_manifest(out / "alphaq_manifest.json").tensors
    for name, values in read_back(out, checkpoint).items():
        if name not in plan.choices:
            assert torch.equal(values, checkpoint.tensor(name))
            continue
        weight, choice = checkpoint.read(originals[name]), plan.choice(name)
        module = gptqmodel.module_path(checkpoint, originals[name])
        if choice.bits == 16:
            assert torch.equal(stored[f"{module}.weight"], weight)
            continue
        assert torch.equal(values, dequantize(quantize_debiased(weight, choice)))
        assert torch.equal(values, decoded({part: stored[f"{module}.{part}"] for part in NAMES}, choice.bits))
        error = float((values.double() - weight.double()).square().sum() / weight.double().square().sum())
        assert records[name].relative_error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rules_give_every_module_its_choice(save_family: Callable[..., Path], tmp_path: Path, family: str) -> None:
    source = save_family(family)
    checkpoint = open_checkpoint(source)
    plan = cycled_plan(checkpoint, "gptqmodel", CHOICES, None)
    out = quantize(source, plan, tmp_path / "out")
    config = json.loads((out / "quantize_config.json").read_text())
    assert config == config_of(out)["quantization_config"]
    assert (config["quant_method"], config["checkpoint_format"]) == ("gptq", "gptq_v2")
    assert (config["sym"], config["desc_act"]) == (False, False)
    for matrix in linear_modules(checkpoint).values():
        expected = plan.choice(matrix.name) if matrix.name in plan.choices else Choice(16)
        module = gptqmodel.module_path(checkpoint, matrix)
        assert resolved(config, module) == expected, module
        assert sum(re.match(pattern[2:], module) is not None for pattern in config["dynamic"]) <= 1


def test_a_uniform_plan_needs_no_rule_but_for_what_is_kept(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    plan = cycled_plan(checkpoint, "gptqmodel", ("3g64",), "3g64")
    config = gptqmodel.quantization_config(checkpoint, {name: plan.choice(name) for name in plan.choices})
    assert list(config["dynamic"]) == [
        "-:^lm_head$",
        r"-:^model\.layers\.(0|1|2|3)\.mlp\.(gate|shared_expert_gate)$",
    ]


@pytest.fixture
def damaged(out: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(out, tmp_path / "damaged"))


@pytest.mark.parametrize("part", NAMES)
def test_verify_names_a_flipped_bit(damaged: Path, part: str) -> None:
    flip(damaged, f"model.layers.2.self_attn.k_proj.{part}")
    with pytest.raises(VerificationError, match=r"layers\.2\.self_attn\.k_proj\.weight does not have its checksum"):
        pipeline.verify(damaged)


@pytest.mark.parametrize("choice", ["3g128", "4g32", "8g64", "16"])
def test_verify_finds_a_plan_that_is_not_the_files(damaged: Path, choice: str) -> None:
    plan = json.loads((damaged / PLAN_NAME).read_text())
    name = "model.layers.0.self_attn.q_proj.weight"
    plan["choices"][name] = choice
    (damaged / PLAN_NAME).write_text(json.dumps(plan))
    with pytest.raises(VerificationError, match=rf"{re.escape(name)} is .*, the plan (says|keeps) {choice}"):
        pipeline.verify(damaged)
