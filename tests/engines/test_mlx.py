"""Files for MLX: what mlx reads in them, and what mlx-lm computes and writes with them."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import (
    config_of,
    cycled_plan,
    flip,
    gaussian,
    logits_of,
    plan_of,
    quantize,
    quantized_choices,
    round_trip,
    standing_for,
    weight_bytes,
)
from transformers import AutoTokenizer

from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.mlx import profile as mlx
from alphaq.engines.output import PLAN_NAME, Output, read_manifest
from alphaq.errors import MissingExtraError, PlanError, VerificationError
from alphaq.evaluation.restored import restored_from
from alphaq.formats.packing import unpack
from alphaq.formats.table import parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.nouns.settings import Budget
from alphaq.quantizers.affine import quantize_affine
from conftest import FAMILIES, MORE_FAMILIES, Ran, random_model, read_back

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")

CHOICES = ("2g32", "3g32", "4g32", "5g32", "6g32", "8g32", "16")
PROMPT = "The history of the town"
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, mscale=0.7, mscale_all_dim=0.7)
YARN |= dict(beta_fast=32, beta_slow=1, original_max_position_embeddings=16)


def values_of(matrix: QuantizedMatrix) -> torch.Tensor:
    """s·q + β in float32, [rows, columns]."""
    codes = torch.from_numpy(unpack(matrix.codes.numpy(), matrix.choice.bits, matrix.shape[1]))

    def spread(per_group: torch.Tensor) -> torch.Tensor:
        return per_group.float().repeat_interleave(matrix.choice.group_size, dim=1)

    assert matrix.offsets is not None
    return codes.float() * spread(matrix.scales) + spread(matrix.offsets)


@pytest.fixture(scope="module")
def out(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with every width that MLX has. None is kept: MLX's CPU multiplies stacks only in float32."""
    plan = cycled_plan(open_checkpoint(tiny), "mlx", ("4g64", "3g32", "5g64", "6g128", "8g32", "2g32"), "4g64")
    return quantize(tiny, plan, tmp_path_factory.mktemp("mlx") / "out")


@pytest.fixture(scope="module")
def restored(out: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the output stands for, run by transformers in float32."""
    values = read_back(out, open_checkpoint(tiny))
    return standing_for(values, tiny, tmp_path_factory.mktemp("restored") / "model", torch.float32)


def mlx_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(model(mx.array([tokens])).astype(mx.float32)))[0]


@pytest.mark.parametrize("choice", quantized_choices(mlx.PROFILE), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mlx_decodes_what_was_promised(choice: Choice, dtype: torch.dtype) -> None:
    weight = gaussian(48, 384, dtype)
    matrix, decoded = round_trip(mlx.PROFILE, choice, weight)
    assert torch.equal(decoded, values_of(matrix))
    error = float((decoded - weight.float()).double().square().sum())
    assert matrix.squared_error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("choice", quantized_choices(mlx.PROFILE), ids=str)
def test_packed_words_are_those_that_mlx_makes(choice: Choice) -> None:
    """Whole numbers from 0 to 2^b − 1 in every group are their own codes."""
    codes = torch.randint(2**choice.bits, (16, 384), generator=torch.Generator().manual_seed(0))
    codes[:, :: choice.group_size], codes[:, 1 :: choice.group_size] = 0, 2**choice.bits - 1
    settings = {"group_size": choice.group_size, "bits": choice.bits}
    packed, scales, biases = mx.quantize(mx.array(codes.float().numpy()), **settings)
    matrix = quantize_affine(codes.float(), choice)
    assert torch.equal(values_of(matrix), codes.float())
    theirs = mx.dequantize(packed, scales, biases, **settings)
    assert np.array_equal(np.array(theirs), codes.numpy())
    found = np.array(packed)
    sign = np.sign(np.array(scales)).repeat(choice.group_size, axis=1)  # mlx may count from the top down
    expected = np.where(sign > 0, codes.numpy(), 2**choice.bits - 1 - codes.numpy()).astype(np.uint8)
    assert np.array_equal(unpack(found.view(np.uint8), choice.bits, 384), expected)


@pytest.mark.slow
def test_command_line_quantizes_and_verifies(tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    result = alphaq("quantize", tiny, "--engine", "mlx", "--bits", 3.5, "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    plan = Plan.from_json((tmp_path / "out" / PLAN_NAME).read_bytes(), "plan")
    assert weight_bytes(tmp_path / "out") == plan.size_bytes == result.json["size_bytes"]
    assert alphaq("verify", tmp_path / "out", "--reference", tiny).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_size_is_never_exceeded(tiny: Path, tmp_path: Path, share: float) -> None:
    settings = {"choices": "2,3,4,6,8"}
    small, large = (plan_of(tiny, "mlx", budget=Budget(bits=bits), **settings).size_bytes for bits in (2, 8))
    limit = round((1 - share) * small + share * large) + 400
    plan = plan_of(tiny, "mlx", budget=Budget(size_bytes=limit), **settings)
    assert weight_bytes(quantize(tiny, plan, tmp_path / "out")) == plan.size_bytes <= limit


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_every_family_is_read_back_as_quantized(
    save_family: Callable[..., Path], tmp_path: Path, family: str, fused: bool
) -> None:
    source = save_family(family, fused)
    if family == "deepseek_v2":  # mlx-lm knows no other rotary embedding for this family
        source = tmp_path / "yarn"
        model = random_model(family, rope_parameters=YARN).bfloat16()
        model.save_pretrained(source, save_original_format=not fused, max_shard_size="150KB")
    checkpoint = open_checkpoint(source)
    out = quantize(source, cycled_plan(checkpoint, "mlx", CHOICES, None), tmp_path / "out")
    plan = Plan.from_json((out / PLAN_NAME).read_bytes(), "plan")
    assert weight_bytes(out) == plan.size_bytes
    originals = {matrix.name: matrix for matrix in checkpoint.matrices}
    records = read_manifest(out / "alphaq_manifest.json").tensors
    for name, values in read_back(out, checkpoint).items():
        if name not in plan.choices:
            assert torch.equal(values, checkpoint.tensor(name))
            continue
        weight, choice = checkpoint.read(originals[name]), plan.choice(name)
        expected = weight if choice.bits == 16 else values_of(quantize_affine(weight, choice))
        assert torch.equal(values, expected)
        error = float((values.double() - weight.double()).square().sum() / weight.double().square().sum())
        assert records[name].relative_error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_mlx_lm_computes_with_the_decoded_weights(tmp_path: Path, family: str) -> None:
    """In float32 both differ only by the order of sums: 1e-5 of logits of about 1."""
    from mlx_lm.utils import load_model

    source = tmp_path / "source"
    rope = {"rope_parameters": YARN} if family == "deepseek_v2" else {}  # mlx-lm knows no other for this family
    random_model(family, **rope).bfloat16().save_pretrained(source, max_shard_size="150KB")
    checkpoint = open_checkpoint(source)
    out = quantize(source, cycled_plan(checkpoint, "mlx", CHOICES, None), tmp_path / "out")
    model, _ = load_model(out)
    model.set_dtype(mx.float32)
    restored = restored_from(Output(out), checkpoint)
    values = {name: restored.tensor(name) for name in checkpoint.shard_of}
    expected = standing_for(values, source, tmp_path / "restored", torch.float32)
    tokens = [(7 * number) % 128 for number in range(24)]
    assert torch.allclose(mlx_logits(model, tokens), logits_of(expected, tokens), atol=1e-5, rtol=1e-5)


def test_mlx_lm_writes_the_text_of_the_decoded_weights(out: Path, tiny: Path, restored: Any) -> None:
    model, tokenizer = mlx_lm.load(str(out))
    text = mlx_lm.generate(model, tokenizer, prompt=PROMPT, max_tokens=20)
    assert text
    tokens = AutoTokenizer.from_pretrained(tiny)(PROMPT)["input_ids"]
    expected = logits_of(restored, tokens)
    # 16-bit sums, with 2^-8 of relative precision, over a few hundred terms in each of four layers.
    assert (mlx_logits(model, tokens) - expected).abs().max() < 0.03 * expected.abs().max()
    model.set_dtype(mx.float32)
    assert torch.allclose(mlx_logits(model, tokens), expected, atol=1e-4)
    written = mlx_lm.generate(model, tokenizer, prompt=PROMPT, max_tokens=20)
    greedy = restored.generate(torch.tensor([tokens]), max_new_tokens=20, do_sample=False)[0, len(tokens) :]
    assert written == tokenizer.decode(greedy.tolist()).lstrip()  # mlx-lm trims the first word's space


def test_config_is_what_mlx_lm_writes(out: Path, tiny: Path) -> None:
    config, choices = config_of(out), json.loads((out / PLAN_NAME).read_text())["choices"]
    assert config["quantization"] == config["quantization_config"]
    usual = config["quantization"]
    assert usual["mode"] == "affine"
    seen = set()
    checkpoint = open_checkpoint(tiny)
    for matrix in checkpoint.matrices:
        if matrix.name not in choices:
            continue
        path = mlx.module_path(checkpoint, matrix)
        choice = parse_choice(choices[matrix.name])
        found = usual.get(path, usual)
        assert (found["bits"], found["group_size"]) == (choice.bits, choice.group_size)
        seen.add(path)
    assert {key for key in usual if "." in key} <= seen


def test_older_names_of_settings_are_added(out: Path, tiny: Path) -> None:
    assert "rope_theta" not in config_of(tiny)
    assert config_of(out)["rope_theta"] == config_of(tiny)["rope_parameters"]["rope_theta"]


def test_stacked_experts_have_mlx_lm_s_names_and_types(out: Path) -> None:
    choice = parse_choice(
        json.loads((out / PLAN_NAME).read_text())["choices"]["model.layers.0.mlp.experts.0.gate_proj.weight"]
    )
    stem, groups = "model.layers.0.mlp.switch_mlp.gate_proj", 256 // choice.group_size
    stored = {name: (one.dtype, one.shape) for name, one in mlx.PROFILE.writer.stored(out).items() if stem in name}
    assert stored == {
        f"{stem}.weight": ("U32", (8, 256, 256 * choice.bits // 32)),
        f"{stem}.scales": ("BF16", (8, 256, groups)),
        f"{stem}.biases": ("BF16", (8, 256, groups)),
    }


def test_experts_of_one_stack_must_agree(save_family: Callable[..., Path], tmp_path: Path) -> None:
    source = save_family("qwen2_moe")
    plan = cycled_plan(open_checkpoint(source), "mlx", ("4g32",), "4g32")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    changed = Plan(engine="mlx", choices={**plan.choices, name: "16"})
    with pytest.raises(
        PlanError, match=rf"MLX runs .*experts\.0\.up_proj\.weight and {re.escape(name)} as one.*4g32 and 16"
    ):
        quantize(source, changed, tmp_path / "never")


def test_missing_library_is_told_at_the_first_matrix(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'alphaq\[mlx\]'"):
        quantize(tiny, plan_of(tiny, "mlx", choices="4"), tmp_path / "out")


@pytest.fixture
def damaged(out: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(out, tmp_path / "damaged"))


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_verify_names_the_expert_of_a_flipped_bit(damaged: Path, part: str) -> None:
    flip(damaged, f"model.layers.0.mlp.switch_mlp.gate_proj.{part}")  # the middle of 8 experts: the first bytes of 4
    with pytest.raises(
        VerificationError, match=r"layers\.0\.mlp\.experts\.4\.gate_proj\.weight does not have its checksum"
    ):
        pipeline.verify(damaged)


def test_verify_finds_a_plan_that_is_not_the_files(damaged: Path) -> None:
    plan = json.loads((damaged / PLAN_NAME).read_text())
    name = "model.layers.0.self_attn.q_proj.weight"
    plan["choices"][name] = "6g64"
    (damaged / PLAN_NAME).write_text(json.dumps(plan))
    with pytest.raises(VerificationError, match=rf"{re.escape(name)} is stored with shapes .*, the plan says 6g64"):
        pipeline.verify(damaged)
