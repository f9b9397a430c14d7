"""Plans without some experts: engines run what is written by them as transformers runs the same pruned weights."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from alphaq import pipeline
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.errors import PlanError, VerificationError
from alphaq.evaluation.engine_run import restored_logits
from alphaq.measuring.resources import Resources
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Dropping, Plan
from alphaq.nouns.serving import Kept, Memory, Serving
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning.placing import placed_plan
from alphaq.work.workers import Workers
from alphaq.writing.planned import as_planned
from runnable import save_runnable

LIBRARIES = {"llama.cpp": "xllamacpp", "mlx": "mlx_lm", "native": "torch"}
IDS = list(range(3, 27))


def plan_without(source: Checkpoint, engine: str, choice: str) -> Plan:
    """One expert fewer in each layer, another in each; all others at one choice."""
    layers = source.architecture.moe_layers(source.config)
    dropped = Dropping(experts={layer: (layer % 4,) for layer in layers})
    left = as_planned(source, Plan(choices={"x": "16"}, dropped=dropped))
    return Plan(engine=engine, choices={one.name: choice for one in left.with_role(Role.EXPERT)}, dropped=dropped)


def every_expert(source: Checkpoint, choice: str) -> dict[str, str]:
    return dict.fromkeys((one.name for one in source.with_role(Role.EXPERT)), choice)


@pytest.mark.parametrize(
    ("engine", "family", "choice"),
    [
        ("llama.cpp", "qwen2_moe", "Q8_0"),
        pytest.param("llama.cpp", "qwen2_moe", "16", marks=pytest.mark.slow),
        pytest.param("llama.cpp", "qwen3_moe", "16", marks=pytest.mark.slow),
        pytest.param("llama.cpp", "olmoe", "16", marks=pytest.mark.slow),
        pytest.param("llama.cpp", "mixtral", "16", marks=pytest.mark.slow),
        ("llama.cpp", "deepseek_v3", "16"),
        ("mlx", "qwen2_moe", "8g32"),
        pytest.param("mlx", "qwen3_moe", "16", marks=pytest.mark.slow),
        pytest.param("mlx", "mixtral", "16", marks=pytest.mark.slow),
        pytest.param("mlx", "deepseek_v3", "16", marks=pytest.mark.slow),
        pytest.param("native", "deepseek_v3", "4g32", marks=pytest.mark.slow),
    ],
)
def test_engine_runs_what_is_left(engine: str, family: str, choice: str, tmp_path: Path) -> None:
    if find_spec(LIBRARIES[engine]) is None:
        pytest.skip(f"{engine} is not installed")
    source = open_checkpoint(save_runnable(tmp_path / "model", family))
    plan = plan_without(source, engine, choice)
    with Workers(1, source) as workers:  # which share the whole model
        pipeline.quantize(source, plan, tmp_path / "out", resources=Resources(workers))
        assert pipeline.verify(tmp_path / "out", source, Resources(workers)).against_source
    ran = pipeline.verify_run(tmp_path / "out", source)
    assert ran.difference < 0.03, ran  # standard deviations of a token's logits
    left = as_planned(source, plan)
    moved = restored_logits(source, IDS) - restored_logits(left, IDS)
    assert float(moved.std()) > 0.1 * float(restored_logits(source, IDS).std())
    with pytest.raises((PlanError, VerificationError)):
        other = plan.model_copy(update={"dropped": Dropping(experts=dict.fromkeys(left.dropped, (3,)))})
        pipeline.quantize(source, other.model_copy(update={"source": left.identity}), tmp_path / "other")


@pytest.mark.parametrize(("engine", "choice"), [("vllm", "4g32s"), ("gptqmodel", "2g32")])
def test_files_of_engines_that_are_not_run_here_hold_what_is_left(engine: str, choice: str, tmp_path: Path) -> None:
    source = open_checkpoint(save_runnable(tmp_path / "model", "qwen2_moe"))
    pipeline.quantize(source, plan_without(source, engine, choice), tmp_path / "out")
    assert pipeline.verify(tmp_path / "out", source).against_source
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert source.architecture.experts_per_layer(config) == 3


def test_a_card_gets_of_what_is_left(tmp_path: Path) -> None:
    source = open_checkpoint(save_runnable(tmp_path / "model", "qwen2_moe"))
    made = plan_without(source, "llama.cpp", "Q8_0")
    serving = Serving(memory_bytes=2**30, vram_bytes=2**30)
    memory = Memory(serving=serving, kept=Kept(cache_bytes=0, buffer_bytes=0, engine_bytes=0))
    config = PlanConfig(budget=Budget(bits=8), engine="llama.cpp")
    placement, whole = (
        placed_plan(source, config, memory, lambda config, one=one: one).memory.placement
        for one in (made, made.model_copy(update={"choices": every_expert(source, "Q8_0"), "dropped": None}))
    )
    assert placement.host_layers == 0
    gone = sum(matrix.parameters for matrix in source.with_role(Role.EXPERT)) // 4
    assert whole.card_bytes - placement.card_bytes >= gone * 34 // 32  # and rows of routers


def test_workers_that_share_the_whole_model_see_what_is_left(tmp_path: Path) -> None:
    source = open_checkpoint(save_runnable(tmp_path / "model", "qwen2_moe"))
    left = as_planned(source, plan_without(source, "native", "2g32"))
    matrices = left.planned[:6]
    with Workers(1, source) as workers:
        pool = Resources(workers).pool(left)
        assert Resources(workers).pool(source) is workers
        for matrix, read in zip(matrices, pool.map(Checkpoint.read, matrices), strict=True):
            assert torch.equal(read, left.read(matrix))
