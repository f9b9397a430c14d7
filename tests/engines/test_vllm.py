"""Files for vLLM: what compressed-tensors and transformers read in them. vLLM itself is run by hand (docs/engines)."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from exported import (
    config_of,
    cycled_plan,
    flip,
    gaussian,
    linear_modules,
    logits_of,
    plan_of,
    quantize,
    quantized_choices,
    round_trip,
    standing_for,
    weight_bytes,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines import vllm
from alphaq.engines.output import PLAN_NAME, read_manifest
from alphaq.errors import MissingExtraError, PlanError, VerificationError
from alphaq.formats.blocks import dequantize
from alphaq.formats.table import parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget
from alphaq.quantizers.affine import quantize_symmetric16
from conftest import FAMILIES, Ran, read_back

CHOICES = ("4g32s", "8g32s", "16")


@pytest.fixture(scope="module")
def out(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with all experts at one choice."""
    plan = plan_of(tiny, "vllm", choices="4g128s")
    return quantize(tiny, plan, tmp_path_factory.mktemp("vllm") / "out")


@pytest.mark.parametrize("choice", quantized_choices(vllm.PROFILE), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compressed_tensors_decodes_what_was_promised(choice: Choice, dtype: torch.dtype) -> None:
    weight = gaussian(48, 384, dtype)
    matrix, restored = round_trip(vllm.PROFILE, choice, weight)
    assert torch.equal(restored, dequantize(matrix).to(matrix.scales.dtype).float())
    error = float((restored - weight.float()).double().square().sum())
    assert matrix.squared_error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("choice", quantized_choices(vllm.PROFILE), ids=str)
def test_packed_words_are_those_that_compressed_tensors_makes(choice: Choice) -> None:
    matrix = quantize_symmetric16(gaussian(48, 384), choice)
    settings = QuantizationArgs(
        num_bits=choice.bits, type="int", symmetric=True, strategy="group", group_size=choice.group_size
    )
    made = PackedQuantizationCompressor.compress(
        {"weight": dequantize(matrix), "weight_scale": matrix.scales.float()},  # so that no quotient is rounded
        QuantizationScheme(targets=["Linear"], weights=settings),
    )
    packed, _, shape = vllm.encode(matrix)
    assert torch.equal(packed, made["weight_packed"])
    assert torch.equal(shape, made["weight_shape"])


def test_command_line_quantizes_and_verifies(tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    result = alphaq("quantize", tiny, "--engine", "vllm", "--bits", 5, "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    plan = Plan.from_json((tmp_path / "out" / PLAN_NAME).read_bytes(), "plan")
    assert weight_bytes(tmp_path / "out") == plan.size_bytes == result.json["size_bytes"]
    assert alphaq("verify", tmp_path / "out", "--reference", tiny).code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "share", [pytest.param(0.0, marks=pytest.mark.slow), 0.3, pytest.param(0.7, marks=pytest.mark.slow)]
)
def test_size_is_never_exceeded(tiny: Path, tmp_path: Path, share: float) -> None:
    small, large = (plan_of(tiny, "vllm", budget=Budget(bits=bits)).size_bytes for bits in (4, 8))
    limit = round((1 - share) * small + share * large)
    plan = plan_of(tiny, "vllm", budget=Budget(size_bytes=limit))
    assert weight_bytes(quantize(tiny, plan, tmp_path / "out")) == plan.size_bytes <= limit


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_every_family_is_read_back_as_quantized(
    save_family: Callable[..., Path], tmp_path: Path, family: str, fused: bool
) -> None:
    source = save_family(family, fused)
    checkpoint = open_checkpoint(source)
    out = quantize(source, cycled_plan(checkpoint, "vllm", CHOICES, None), tmp_path / "out")
    plan = Plan.from_json((out / PLAN_NAME).read_bytes(), "plan")
    assert weight_bytes(out) == plan.size_bytes
    originals = {matrix.name: matrix for matrix in checkpoint.matrices}
    records = read_manifest(out / "alphaq_manifest.json").tensors
    for name, values in read_back(out, checkpoint).items():
        if name not in plan.choices:
            assert torch.equal(values, checkpoint.tensor(name))
            continue
        weight, choice = checkpoint.read(originals[name]), plan.choice(name)
        if choice.bits == 16:
            assert torch.equal(values, weight)
            continue
        assert torch.equal(values, dequantize(quantize_symmetric16(weight, choice), values.dtype))
        error = float((values.double() - weight.double()).square().sum() / weight.double().square().sum())
        assert records[name].relative_error == pytest.approx(error, rel=1e-5)


def test_tensors_have_their_published_names(save_family: Callable[..., Path], tmp_path: Path) -> None:
    source = save_family("mixtral", True)
    out = quantize(source, cycled_plan(open_checkpoint(source), "vllm", ("4g32s",), "4g32s"), tmp_path / "out")
    names = {name for path in out.glob("*.safetensors") for name in load_file(path)}
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight_packed" in names
    assert not any(".mlp." in name for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_gives_every_module_its_choice(save_family: Callable[..., Path], tmp_path: Path, family: str) -> None:
    source = save_family(family)
    checkpoint = open_checkpoint(source)
    plan = cycled_plan(checkpoint, "vllm", CHOICES, "8g32s")
    config = vllm.quantization_config(checkpoint, {name: plan.choice(name) for name in plan.choices})
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.quantization_status == "compressed"

    def matches(pattern: str, module: str) -> bool:  # as vLLM and compressed-tensors do
        return re.match(pattern.removeprefix("re:"), module) is not None

    def found(module: str) -> Choice:
        groups = [one for one in parsed.config_groups.values() if any(matches(t, module) for t in one.targets)]
        if any(matches(pattern, module) for pattern in parsed.ignore):
            assert not groups
            return Choice(16)
        (group,) = groups
        assert group.format == config["format"] == "pack-quantized"
        return Choice(group.weights.num_bits, group.weights.group_size, symmetric=group.weights.symmetric)

    modules = linear_modules(checkpoint)
    for module, matrix in modules.items():
        expected = plan.choice(matrix.name) if matrix.name in plan.choices else Choice(16)
        assert found(module) == expected, module
        if ".experts.0." in module:  # SGLang asks for all three by these names, also where they are w1, w2 and w3
            block = module.rpartition(".")[0]
            assert {found(f"{block}.{leaf}") for leaf in ("gate_proj", "up_proj", "down_proj")} == {expected}
    assert found("model.layers.1.self_attn.o_proj") == Choice(8, 32, symmetric=True)
    if "model.layers.1.self_attn.k_proj" in modules:
        assert found("model.layers.1.self_attn.qkv_proj") == Choice(8, 32, symmetric=True)
    if "model.layers.1.self_attn.q_a_proj" in modules:
        assert found("model.layers.1.self_attn.fused_qkv_a_proj") == Choice(8, 32, symmetric=True)


def test_transformers_computes_with_the_decoded_weights(out: Path, tiny: Path, tmp_path: Path) -> None:
    """transformers decompresses to bf16: the same weights, so the same logits."""
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    expected = standing_for(read_back(out, open_checkpoint(tiny)), tiny, tmp_path / "restored", torch.bfloat16)
    tokens = range(5, 60)
    assert torch.equal(logits_of(loaded, tokens), logits_of(expected, tokens))


def test_what_vllm_runs_as_one_must_agree(save_family: Callable[..., Path], tmp_path: Path) -> None:
    source = save_family("qwen2_moe")
    plan = cycled_plan(open_checkpoint(source), "vllm", ("4g32s",), "4g32s")
    for name, other in (
        ("model.layers.1.self_attn.k_proj.weight", "q_proj"),
        ("model.layers.2.mlp.shared_expert.up_proj.weight", "gate_proj"),
        ("model.layers.0.mlp.experts.3.down_proj.weight", "experts"),
    ):
        changed = Plan(engine="vllm", choices={**plan.choices, name: "16"})
        with pytest.raises(
            PlanError, match=rf"vLLM runs .*{re.escape(name)}.* as one.*(4g32s and 16|16 and 4g32s)"
        ) as why:
            quantize(source, changed, tmp_path / "never")
        assert other in str(why.value)


def test_family_without_known_names_is_refused(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    other = replace(checkpoint, architecture=replace(checkpoint.architecture, name="other_moe"))
    with pytest.raises(
        PlanError, match=r"The vLLM export does not know how vLLM names.*'other_moe'.*Available: mixtral"
    ):
        vllm.PROFILE.writer.layout(other, {})


def test_plan_that_keeps_everything_leaves_a_plain_model(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    kept = {matrix.name: "16" for matrix in checkpoint.with_role(Role.EXPERT)}
    out = quantize(tiny, Plan(engine="vllm", choices=kept), tmp_path / "out")
    assert "quantization_config" not in config_of(out)
    expected = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert torch.equal(logits_of(loaded, range(9)), logits_of(expected, range(9)))


def test_missing_library_is_told_at_the_first_matrix(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors.compressors", None)
    plan = plan_of(tiny, "vllm", choices="4g128s")
    with pytest.raises(MissingExtraError, match=r"pip install 'alphaq\[compressed-tensors\]'"):
        quantize(tiny, plan, tmp_path / "out")


@pytest.fixture
def damaged(out: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(out, tmp_path / "damaged"))


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape"])
def test_verify_names_a_flipped_bit(damaged: Path, part: str) -> None:
    flip(damaged, f"model.layers.2.mlp.experts.5.up_proj.{part}")
    with pytest.raises(VerificationError, match=r"layers\.2\.mlp\.experts\.5\.up_proj\.weight does not have"):
        pipeline.verify(damaged)


@pytest.mark.parametrize("choice", ["8g128s", "4g64s", "16"])
def test_verify_finds_a_plan_that_is_not_the_files(damaged: Path, choice: str) -> None:
    plan = json.loads((damaged / PLAN_NAME).read_text())
    name = next(iter(plan["assignment"]))
    plan["choices"][name], plan["assignment"][name] = choice, parse_choice(choice).bits
    (damaged / PLAN_NAME).write_text(json.dumps(plan))
    with pytest.raises(VerificationError, match=rf"{re.escape(name)} is .*, the plan (says|keeps) {choice.strip('s')}"):
        pipeline.verify(damaged)
