"""Families that GPTQModel is written for: it computes what their files stand for, and their names are its modules'."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gptqmodel_apart
import pytest
import torch
from changed import EXACT, InEngine, model_of
from exported import cycled_plan, quantize

from alphaq.checkpoint.families.architecture import architectures
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.assumptions.tables import engine_table
from alphaq.engines.gptqmodel import ENGINE, PROFILE, keeps
from alphaq.errors import ArchitectureError, PlanError
from alphaq.evaluation.engine_run import run_in_engine
from alphaq.nouns.matrix import Role
from families import ONE_LAYOUT, SMALL, UNLOADABLE, random_family, save_layout
from runnable import byte_level, save_tokenizer

TABLE = engine_table("gptqmodel")
IN_GPTQMODEL = InEngine("gptqmodel", gptqmodel_apart.logits)
MIXED = ("2g32", "3g32", "4g32", "8g32", "16")
WHOLE = SMALL | {key: 64 for key, size in SMALL.items() if size == 48}  # rows and columns in whole words
OTHERWISE = {"llama4": ("llama4", "llama4_text"), "qwen3_5_moe": ("qwen3_5_moe", "qwen3_5_moe_text")}
OTHERWISE["qwen4_exp"] = ("qwen4_exp", "qwen4_exp_text")
"""Families of models that are published alone and inside another one."""
RUN = [kind for family in TABLE.families for kind in OTHERWISE.get(family, (family,))]
OFTEN = {"deepseek_v4", "deepseek_ocr2", "phimoe", "qwen3_5_moe"}
"""Names of all kinds, and models inside others."""
needs_gptqmodel = pytest.mark.skipif(find_spec("gptqmodel") is None, reason="GPTQModel is not installed")


def saved(folder: Path, model_type: str, published: bool = True, **changed: Any) -> Path:
    """A family's checkpoint in bf16, with a tokenizer, which GPTQModel asks for."""
    save_layout(model_of(model_type, WHOLE, **changed), folder, published)
    save_tokenizer(folder, byte_level())
    return folder


@pytest.mark.slow
@needs_gptqmodel
@pytest.mark.parametrize("model_type", [*RUN, *TABLE.dense])
def test_gptqmodel_computes_with_a_mixed_plan_what_its_files_stand_for(tmp_path: Path, model_type: str) -> None:
    assert IN_GPTQMODEL.difference(saved(tmp_path / "source", model_type), tmp_path, MIXED) < EXACT


@pytest.mark.slow
@needs_gptqmodel
@pytest.mark.parametrize("model_type", [one for one in RUN if one not in ONE_LAYOUT | UNLOADABLE])
def test_names_of_transformers_own_modules_are_written_as_well(tmp_path: Path, model_type: str) -> None:
    assert IN_GPTQMODEL.difference(saved(tmp_path / "source", model_type, published=False), tmp_path, MIXED) < EXACT


@pytest.mark.slow
@needs_gptqmodel
def test_verify_runs_it_beside_classes_that_it_exchanges(tmp_path: Path) -> None:
    """Mixtral's, of which the model with the restored weights is built afterwards."""
    source = open_checkpoint(saved(tmp_path / "source", "mixtral"))
    out = quantize(tmp_path / "source", cycled_plan(source, "gptqmodel", MIXED, None), tmp_path / "out")
    assert run_in_engine(out, source).difference < 1e-4


@pytest.mark.slow
@needs_gptqmodel
def test_values_beyond_float16_are_computed_with(tmp_path: Path) -> None:
    """An embedding of bfloat16, which a norm divides."""
    model = model_of("mixtral", WHOLE)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e6)
    save_tokenizer(save_layout(model, tmp_path / "source", published=True), byte_level())
    assert IN_GPTQMODEL.difference(tmp_path / "source", tmp_path, MIXED) < EXACT


@pytest.mark.slow
@needs_gptqmodel
@pytest.mark.parametrize("model_type", RUN)
def test_every_setting_of_the_class_is_followed_or_refused(tmp_path: Path, model_type: str) -> None:
    assert not IN_GPTQMODEL.wrong(tmp_path, model_type, saved)


@pytest.mark.parametrize(
    "model_type", [pytest.param(one, marks=() if one in OFTEN else pytest.mark.slow) for one in RUN]
)
def test_what_is_written_fills_the_class_with_its_experts_apart(tmp_path: Path, model_type: str) -> None:
    """Without GPTQModel, which leaves what it finds no place for, and says nothing."""
    model = model_of(model_type, WHOLE)
    parameters = {name.removesuffix(".weight") for name in model.state_dict()}
    stacks = {name for name in parameters if re.search(r"\.experts\.\w+_proj$", name)}
    checkpoint = open_checkpoint(save_layout(model, tmp_path / "source", published=True))
    written = ENGINE.layout(checkpoint, cycled_plan(checkpoint, "gptqmodel", MIXED, None).every_choice())
    modules = {
        re.sub(r"\.(q?weight|qzeros|scales|g_idx)$", "", part) for one in written.entries for part, _ in one.parts
    }
    experts = {module for module in modules if re.search(r"\.experts\.\d+\.(gate|up|down)_proj$", module)}
    assert len(experts) == len(checkpoint.with_role(Role.EXPERT))
    assert {module.split(".experts.")[0] for module in experts} == {name.split(".experts.")[0] for name in stacks}
    tied = {"lm_head"} if model.config.get_text_config().tie_word_embeddings else set()
    assert modules - experts == parameters - stacks - (tied - modules)


def test_every_family_of_the_table_is_run() -> None:
    known = {kind: one.name for kind, one in architectures().items()}
    assert {known[kind] for kind in RUN} == TABLE.families.keys()
    assert len(TABLE.families) >= 25
    assert not TABLE.families.keys() & TABLE.refused.keys()


@pytest.mark.parametrize("family", ["gemma4_text", "lfm2_moe"])
def test_what_gptqmodel_does_not_run_is_refused_with_the_reason(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(save_layout(random_family(family), tmp_path / "source", published=True))
    with pytest.raises(PlanError, match=f"but {re.escape(TABLE.refused[checkpoint.architecture.name])}"):
        ENGINE.layout(checkpoint, {})


def test_what_its_table_has_no_place_for_keeps_16_bits(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_layout(random_family("cohere2_moe", WHOLE), tmp_path / "source", published=True))
    kept = {one.role for one in checkpoint.matrices if keeps(checkpoint, one)}
    assert kept == {Role.SHARED_EXPERT, Role.ROUTER, Role.EMBEDDING}
    shared = checkpoint.with_role(Role.SHARED_EXPERT)[0]
    with pytest.raises(PlanError, match="no place for quantized weights there"):
        ENGINE.layout(checkpoint, {shared.name: PROFILE.with_bits(4)})


def test_a_wrapper_that_gptqmodel_does_not_know_is_refused(tmp_path: Path) -> None:
    source = save_layout(random_family("qwen3_vl_moe", WHOLE), tmp_path / "source", published=True)
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace('"model_type": "qwen3_vl_moe",', '"model_type": "some_vl",'))
    checkpoint = open_checkpoint(source)
    assert checkpoint.architecture.name == "qwen3_vl_moe"
    with pytest.raises(ArchitectureError, match="'some_vl' holds a 'qwen3_vl_moe' language model"):
        ENGINE.layout(checkpoint, {})
