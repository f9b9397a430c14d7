"""All roles in one budget of bytes (`--size`) for engines of safetensors files: who shares, what must agree, sizes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import config_of, logits_of, quantize, standing_for, weight_bytes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.engines import gptqmodel, vllm
from alphaq.engines.mlx import profile as mlx
from alphaq.engines.profiles import profile
from alphaq.errors import BudgetError, PlanError
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget, PlanConfig, Rule
from alphaq.planning import Scope, make_plan, measure_for_plan, resolve
from alphaq.planning.outline import outline
from alphaq.planning.request import Request
from conftest import random_model, read_back
from dense_models import dense_model

INSIDE = {Role.ATTENTION, Role.SHARED_EXPERT, Role.DENSE_MLP}
SHARING = {"vllm": INSIDE, "mlx": INSIDE | {Role.EMBEDDING, Role.HEAD}, "gptqmodel": INSIDE | {Role.HEAD}}
CHOICES = {"vllm": "4,8", "mlx": "2,4,6,8", "gptqmodel": "2,3,4,8"}
TOKENS = [(7 * number) % 128 for number in range(24)]


def request_of(engine: str, size: int = 10**9, *pins: str, **settings: Any) -> Request:
    """By a method that weighs roles without measuring errors."""
    rules = tuple(Rule.parse(pin, "--pin") for pin in pins)
    config = {"engine": engine, "method": "signal", "noise": "analytic", "group_size": 32, "choices": CHOICES[engine]}
    return resolve(PlanConfig.model_validate(config | {"budget": Budget(size_bytes=size), "pins": rules} | settings))


def made(source: Path, request: Request) -> Plan:
    checkpoint = open_checkpoint(source)
    return make_plan(checkpoint, request, measure_for_plan(checkpoint, request))


def between(source: Path, engine: str, share: float, *pins: str) -> int:
    """A size between the least that there is and that of the widest choices."""
    checkpoint, wide = open_checkpoint(source), CHOICES[engine].rpartition(",")[2]
    least = outline(checkpoint, request_of(engine, 10**9, *pins)).least_bytes
    most = outline(checkpoint, request_of(engine, 10**9, *pins, choices=wide)).least_bytes
    return round(least + share * (most - least)) + 200  # a stack's one header entry is counted as its longest


def of_role(checkpoint: Checkpoint, plan: Plan, role: Role) -> set[str]:
    return {plan.choices[matrix.name] for matrix in checkpoint.with_role(role) if matrix.name in plan.choices}


@pytest.mark.parametrize("engine", SHARING)
def test_every_role_that_the_engine_stores_shares_the_bytes(save_family: Callable[..., Path], engine: str) -> None:
    for family in ("qwen2_moe", "deepseek_v2"):
        checkpoint = open_checkpoint(save_family(family))
        scope = Scope.of(checkpoint, request_of(engine))
        assert {matrix.role for matrix in scope.joined} == SHARING[engine] & set(checkpoint.roles.values())
        assert set(scope.fixed.values()) <= {Choice(16)}  # of rows that are not whole words
        fixed = Scope.of(checkpoint, request_of(engine, roles="fixed"))
        assert not fixed.joined and {Role.EMBEDDING, Role.HEAD}.isdisjoint(checkpoint.roles[one] for one in fixed.fixed)


@pytest.mark.parametrize("engine", SHARING)
@pytest.mark.parametrize("family", ["qwen2_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_files_take_exactly_the_planned_bytes(
    save_family: Callable[..., Path], tmp_path: Path, engine: str, family: str
) -> None:
    source = save_family(family)
    checkpoint, seen = open_checkpoint(source), set()
    for share in (0.0, 0.3, 0.7):
        size = between(source, engine, share)
        plan = made(source, request_of(engine, size))
        out = quantize(source, plan, tmp_path / f"{share}")
        assert 0.9 * size < weight_bytes(out) == (plan.size_bytes or 0) <= size
        seen |= {(role, choice) for role in SHARING[engine] for choice in of_role(checkpoint, plan, role)}
    present = SHARING[engine] & set(checkpoint.roles.values())
    assert all(sum(of is role for of, _ in seen) > 1 for role in present)  # each was given more with more bytes


@pytest.mark.parametrize("engine", SHARING)
def test_a_size_below_the_least_is_told_before_anything_is_measured(
    save_family: Callable[..., Path], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_family("qwen2_moe")
    monkeypatch.setattr("alphaq.planning.evidence.run_passes", lambda *_: pytest.fail("measured"))
    with pytest.raises(BudgetError, match=r"is below the least these choices can reach, --size \d+ with all at"):
        made(source, request_of(engine, between(source, engine, 0.0) - 4000))


def test_what_vllm_merges_has_one_choice(save_family: Callable[..., Path]) -> None:
    units: dict[str, set[str]] = {}
    for family in ("qwen2_moe", "deepseek_v2"):
        source = save_family(family)
        plan = made(source, request_of("vllm", between(source, "vllm", 0.5)))
        for matrix in open_checkpoint(source).matrices:
            if matrix.name in plan.choices:
                units.setdefault(f"{family} {vllm.PROFILE.unit_of(matrix)}", set()).add(plan.choices[matrix.name])
    assert all(len(choices) == 1 for choices in units.values())
    assert {"qkv_proj", "gate_up_proj", "fused_qkv_a_proj"} <= {unit.rpartition(".")[2] for unit in units}
    assert len(set().union(*units.values())) > 1


def test_a_pin_reaches_all_that_is_merged(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("qwen2_moe"))
    for settings in ({}, {"budget": Budget(bits=5)}):
        scope = Scope.of(checkpoint, request_of("vllm", 10**9, "layers.1.self_attn.k_proj=8", **settings))
        pinned = {name.split(".", 3)[3] for name, choice in scope.fixed.items() if choice.bits == 8}
        assert pinned == {f"self_attn.{one}_proj.weight" for one in "qkv"}
        assert all("layers.1." in name for name, choice in scope.fixed.items() if choice.bits == 8)


def test_of_what_is_merged_a_pin_goes_before_a_width(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("qwen2_moe"))
    scope = Scope.of(checkpoint, request_of("vllm", 10**9, "layers.1.self_attn.k_proj=4g32s", attention_bits=8))
    of_layer = {name.split(".", 3)[3]: str(choice) for name, choice in scope.fixed.items() if "layers.1.self" in name}
    assert of_layer == {f"self_attn.{one}_proj.weight": "4g32s" for one in "qkv"} | {
        "self_attn.o_proj.weight": of_layer["self_attn.o_proj.weight"]
    }
    assert of_layer["self_attn.o_proj.weight"].startswith("8")


def test_pins_that_contradict_each_other_are_refused_before_anything_is_measured(
    save_family: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_family("qwen2_moe")
    monkeypatch.setattr("alphaq.planning.evidence.run_passes", lambda *_: pytest.fail("measured"))
    for layers in ("", "layers.1.self_attn."):
        pins = (f"{layers}q_proj=4", f"{layers}k_proj=8")
        with pytest.raises(BudgetError, match=r"vllm runs .*[kq]_proj.* and .*[kq]_proj.* as one, .*--pin") as raised:
            made(source, request_of("vllm", 10**9, *pins))
        remedy = str(raised.value).partition("--pin '")[2].partition("'")[0]
        fixed = Scope.of(open_checkpoint(source), request_of("vllm", 10**9, *pins, remedy)).fixed
        assert all(("layers.1." in name) or not layers for name in fixed)


def test_what_an_engine_cannot_have_quantized_is_kept_or_refused(save_family: Callable[..., Path]) -> None:
    latent, dense = save_family("deepseek_v3"), save_family("qwen3_moe")
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    assert Scope.of(open_checkpoint(latent), request_of("mlx")).fixed[name] == Choice(16)
    for pin in ("*.kv_b_proj=4", "attention=4"):
        with pytest.raises(BudgetError, match=r"mlx cannot store .*kv_b_proj.* as 4g32: .* a second time") as raised:
            Scope.of(open_checkpoint(latent), request_of("mlx", 10**9, pin))
        remedy = str(raised.value).partition("--pin '")[2].partition("'")[0]
        fixed = Scope.of(open_checkpoint(latent), request_of("mlx", 10**9, pin, remedy)).fixed
        assert {str(choice) for one, choice in fixed.items() if "kv_b_proj" in one} == {"16"}
    scope = Scope.of(open_checkpoint(dense), request_of("gptqmodel"))
    roles = open_checkpoint(dense).roles
    assert {roles[name] for name in scope.fixed} == {Role.DENSE_MLP} and set(scope.fixed.values()) == {Choice(16)}
    with pytest.raises(BudgetError, match=r"vllm keeps the head in 16 bits; --head-bits does nothing"):
        request_of("vllm", head_bits=4)
    with pytest.raises(BudgetError, match=r"--pin 'embedding' names no matrix"):
        made(dense, request_of("gptqmodel", 10**9, "embedding=4"))


def test_a_width_for_a_role_leaves_what_must_be_kept(save_family: Callable[..., Path]) -> None:
    for settings in ({}, {"budget": Budget(bits=4)}):
        checkpoint = open_checkpoint(save_family("deepseek_v3"))
        fixed = Scope.of(checkpoint, request_of("mlx", attention_bits=8, **settings)).fixed
        attention = {matrix.name: fixed[matrix.name].bits for matrix in checkpoint.with_role(Role.ATTENTION)}
        assert {bits for name, bits in attention.items() if "kv_b_proj" in name} == {16}
        assert {bits for name, bits in attention.items() if "kv_b_proj" not in name} == {8}


def test_an_embedding_whose_numbers_are_the_head_is_kept(tmp_path: Path) -> None:
    dense_model("seed_oss", tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path / "tied")
    dense_model("seed_oss", tie_word_embeddings=False).bfloat16().save_pretrained(tmp_path / "apart")
    tied, apart = (Scope.of(open_checkpoint(tmp_path / one), request_of("mlx")) for one in ("tied", "apart"))
    assert tied.fixed == {"model.embed_tokens.weight": Choice(16)}
    with pytest.raises(BudgetError, match=r"mlx cannot store model.embed_tokens.weight as 4g32: it is the head too"):
        Scope.of(open_checkpoint(tmp_path / "tied"), request_of("mlx", embedding_bits=4))
    assert not apart.fixed and {Role.EMBEDDING, Role.HEAD} <= {matrix.role for matrix in apart.joined}


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_transformers_computes_with_what_vllm_is_given(
    save_family: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """It takes one choice of experts for all of them, which a pin gives."""
    source, pin = save_family(family), "expert=4"
    plan = made(source, request_of("vllm", between(source, "vllm", 0.5, pin), pin))
    checkpoint = open_checkpoint(source)
    assert of_role(checkpoint, plan, Role.ATTENTION) == {"4g32s", "8g32s"}
    out = quantize(source, plan, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    expected = standing_for(read_back(out, checkpoint), source, tmp_path / "restored", torch.bfloat16)
    assert torch.equal(logits_of(loaded, TOKENS), logits_of(expected, TOKENS))


def mlx_logits_of(out: Path) -> torch.Tensor:
    pytest.importorskip("mlx_lm")
    return mlx.logits(out, TOKENS)


@pytest.mark.parametrize(("family", "tied"), [("qwen2_moe", False), ("qwen3_moe", True)])
def test_mlx_lm_computes_with_embedding_and_head_in_the_budget(tmp_path: Path, family: str, tied: bool) -> None:
    source = tmp_path / "source"
    random_model(family, tie_word_embeddings=tied).bfloat16().save_pretrained(source)
    plan = made(source, request_of("mlx", between(source, "mlx", 0.5)))
    checkpoint = open_checkpoint(source)
    vocabulary = [role for role in (Role.EMBEDDING, Role.HEAD) if checkpoint.with_role(role)]
    assert len(vocabulary) == 2 - tied and all(of_role(checkpoint, plan, role) for role in vocabulary)
    out = quantize(source, plan, tmp_path / "out")
    expected = standing_for(read_back(out, checkpoint), source, tmp_path / "restored", torch.float32)
    assert torch.allclose(mlx_logits_of(out), logits_of(expected, TOKENS), atol=1e-5, rtol=1e-5)


def test_a_head_that_was_a_copy_of_the_embedding_is_told_to_be_its_own(tmp_path: Path) -> None:
    """Each has its choice then, and mlx-lm would drop the head's codes but not its scales."""
    source = tmp_path / "source"
    random_model("qwen3_moe", tie_word_embeddings=True).bfloat16().save_pretrained(source)
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    pins = ("embedding=4", "head=8")
    out = quantize(source, made(source, request_of("mlx", 10**9, *pins)), tmp_path / "out")
    assert config_of(source)["tie_word_embeddings"] and config_of(out)["tie_word_embeddings"] is False
    apart = Path(shutil.copytree(source, tmp_path / "apart"))
    (apart / "config.json").write_text(json.dumps(config_of(source) | {"tie_word_embeddings": False}))
    expected = standing_for(read_back(out, open_checkpoint(source)), apart, tmp_path / "restored", torch.float32)
    assert torch.allclose(mlx_logits_of(out), logits_of(expected, TOKENS), atol=1e-5, rtol=1e-5)


def test_gptqmodel_is_told_of_a_quantized_head(save_family: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(save_family("qwen2_moe"))
    units = {matrix.name: Choice(4, 32) for matrix in checkpoint.matrices if matrix.role in INSIDE | {Role.EXPERT}}
    kept = gptqmodel.quantization_config(checkpoint, units)
    assert not kept["lm_head"] and "-:^lm_head$" in kept["dynamic"]
    other = gptqmodel.quantization_config(checkpoint, units | {"lm_head.weight": Choice(8, 32)})
    assert other["lm_head"] and other["dynamic"]["+:^lm_head$"] == {"bits": 8, "group_size": 32}
    alike = gptqmodel.quantization_config(checkpoint, units | {"lm_head.weight": Choice(4, 32)})
    assert alike["lm_head"] and not any("lm_head" in pattern for pattern in alike["dynamic"])


def test_hand_made_plans_are_held_to_the_same(save_family: Callable[..., Path], tmp_path: Path) -> None:
    for engine, family, name in (
        ("mlx", "deepseek_v3", "model.layers.0.self_attn.kv_b_proj.weight"),
        ("gptqmodel", "qwen3_moe", "model.layers.0.mlp.up_proj.weight"),
    ):
        checkpoint = open_checkpoint(save_family(family))
        choices = {matrix.name: "4g32" for matrix in checkpoint.planned} | {name: "4g32"}
        glob = re.escape(name.replace(".0.", ".*."))
        with pytest.raises(PlanError, match=rf"cannot have {name} quantized: .*--pin '{glob}=16'"):
            profile(engine).writer.layout(
                checkpoint, {name: Plan(engine=engine, choices=choices).choice(name) for name in choices}
            )
