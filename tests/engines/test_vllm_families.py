"""Files for vLLM of every family that they are written for: transformers loads them by compressed-tensors.

vLLM itself runs them in tests/serving/test_vllm_runs_families.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import cycled_plan

from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.assumptions.tables import engine_table
from alphaq.engines.running import run_in_transformers
from alphaq.engines.vllm import ENGINE, logits
from alphaq.errors import ArchitectureError, CheckpointError, PlanError
from alphaq.nouns.plan import Plan
from families import plain_copy, random_family, save_layout

sys.path.append(str(Path(__file__).parents[1] / "serving"))

from vllm_families import RUN, VLLM_ALONE, model_of

OFTEN = {"minimax_m2"}
"""Settings that are told, and modules by other names."""
TOKENS = range(3, 19)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(one, marks=() if one in OFTEN else pytest.mark.slow) for one in RUN if one not in VLLM_ALONE],
)
def test_transformers_computes_with_what_the_files_stand_for(tmp_path: Path, model_type: str) -> None:
    """It gives all experts the first choice, so they have one. It restores to bf16, so logits are equal."""
    source = open_checkpoint(save_layout(model_of(model_type), tmp_path / "source", published=True))
    pipeline.quantize(source, cycled_plan(source, "vllm", ("4g32s",), "8g64s"), tmp_path / "out")
    plain = plain_copy(source, tmp_path / "out", tmp_path / "plain")
    found, expected = (run_in_transformers(one, TOKENS, torch.bfloat16) for one in (tmp_path / "out", plain))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "model_type", [pytest.param(one, marks=pytest.mark.slow) for one in sorted(VLLM_ALONE & {*RUN})]
)
def test_files_that_transformers_does_not_load_whole_are_not_run_there(tmp_path: Path, model_type: str) -> None:
    source = open_checkpoint(save_layout(model_of(model_type), tmp_path / "source", published=True))
    pipeline.quantize(source, cycled_plan(source, "vllm", ("4g32s",), "8g64s"), tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"finds nothing in .*experts.*would compute with what it makes up.*vllm serve"
    ):
        logits(tmp_path / "out", list(TOKENS))


def test_modules_and_settings_are_told_by_vllm_s_names(tmp_path: Path) -> None:
    source = open_checkpoint(save_layout(model_of("minimax_m2"), tmp_path / "source", published=True))
    plan = cycled_plan(source, "vllm", ("4g32s", "8g64s", "16"), "4g64s")
    config = ENGINE.config(source, plan)
    targets = [
        target for group in config["quantization_config"]["config_groups"].values() for target in group["targets"]
    ]
    called = "model.layers.0.mlp.experts.3.w1"
    assert any(re.match(target.removeprefix("re:"), called) for target in targets)
    assert not any("block_sparse_moe" in target for target in targets)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in source.shard_of  # as the files call it
    assert (config["rotary_dim"], config["scoring_func"]) == (32, "sigmoid")


def test_modules_beside_others_are_told_by_vllm_s_names_and_transformers(tmp_path: Path) -> None:
    source = open_checkpoint(save_layout(model_of("qwen3_5_moe"), tmp_path / "source", published=True))
    config = ENGINE.config(source, cycled_plan(source, "vllm", ("4g32s", "8g64s", "16"), "4g64s"))
    groups = config["quantization_config"]["config_groups"].values()
    for before in ("language_model.model", "model.language_model"):
        for module in ("layers.0.linear_attn.in_proj_qkvz", "layers.1.self_attn.o_proj"):
            (group,) = [
                one
                for one in groups
                if any(re.match(target.removeprefix("re:"), f"{before}.{module}") for target in one["targets"])
            ]
            assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 64)


@pytest.mark.parametrize(("one", "other"), [("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")])
def test_what_vllm_merges_in_linear_attention_must_agree(tmp_path: Path, one: str, other: str) -> None:
    source = open_checkpoint(save_layout(model_of("qwen3_5_moe_text"), tmp_path / "source", published=True))
    plan = cycled_plan(source, "vllm", ("4g32s",), "4g32s")
    changed = {name: "8g32s" if f".0.linear_attn.{other}." in name else said for name, said in plan.choices.items()}
    with pytest.raises(PlanError, match=rf"vLLM runs .*({one}.*{other}|{other}.*{one}).* as one"):
        pipeline.quantize(source, Plan(engine="vllm", choices=changed), tmp_path / "never")


@pytest.mark.parametrize(
    ("model_type", "changed", "named"),
    [
        ("afmoe", dict(tie_word_embeddings=True), "tie_word_embeddings is True"),
        ("minimax_m2", dict(tie_word_embeddings=True), "tie_word_embeddings is True"),
        ("minimax_m2", dict(rope_parameters=YARN), "'yarn', but vllm runs 'minimax_m2' models with default only"),
        ("glm4_moe_lite", dict(n_group=2), "n_group is 2"),
        ("qwen3_next", dict(tie_word_embeddings=True), "tie_word_embeddings is True"),
        ("qwen3_vl_moe", {}, "norm_topk_prob is None.*Restore the original config.json"),
        ("glm4v_moe", dict(text_config=dict(head_dim=16)), "use_qk_norm is None.*Restore the original config.json"),
        ("gemma4", {}, "'gemma4' holds its language model beside others"),
        ("llama4", {}, "'llama4' holds its language model beside others"),
    ],
)
def test_what_vllm_computes_otherwise_or_was_not_tried_with_is_refused(
    tmp_path: Path, model_type: str, changed: dict[str, Any], named: str
) -> None:
    model = random_family(model_type, **changed)
    checkpoint = open_checkpoint(save_layout(model, tmp_path / "source", published=True))
    with pytest.raises(ArchitectureError, match=named):
        ENGINE.layout(checkpoint, {})


@pytest.mark.parametrize("family", engine_table("vllm").refused)
def test_what_vllm_cannot_load_is_refused_with_the_reason(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(save_layout(random_family(family), tmp_path / "source", published=True))
    with pytest.raises(PlanError, match=re.escape(engine_table("vllm").refused[family])):
        ENGINE.layout(checkpoint, {})
