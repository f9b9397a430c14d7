import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from alphaq import pipeline, planning
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines import native
from alphaq.engines.output import MANIFEST_NAME, PLAN_NAME
from alphaq.errors import BudgetError, CheckpointError, PlanError, VerificationError
from alphaq.formats.blocks import dequantize
from alphaq.formats.table import storage_bytes
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import resolve
from alphaq.planning.costs import file_table
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.writing import quantizing
from conftest import FAMILIES, read_back


def plan_of(folder: Path, **config: object) -> Plan:
    """A plan by a method that needs no forward pass, unless told otherwise."""
    settings = {"budget": Budget(bits=2.5), "group_size": 32, "method": "alphaq", **config}
    checkpoint, request = open_checkpoint(folder), resolve(PlanConfig.model_validate(settings))
    return pipeline.make_plan(checkpoint, request, pipeline.measure_for_plan(checkpoint, request))


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("choices", ["1,2,3,4", "2g64,3g32,16", "2,5,6,7,8"])
@pytest.mark.parametrize("fused", [False, True])
def test_files_have_exactly_the_promised_size(
    save_family: Callable[..., Path], tmp_path: Path, fused: bool, choices: str
) -> None:
    source = save_family("qwen2_moe", fused)
    plan = plan_of(source, choices=choices, budget=Budget(bits=4.0))
    pipeline.quantize(open_checkpoint(source), plan, tmp_path / "out")
    assert weight_bytes(tmp_path / "out") == plan.size_bytes


def test_every_size_budget_is_kept_and_used_up(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    config = PlanConfig(budget=Budget(bits=2.0), choices="1,2,3,4,5,6,7,8", method="alphaq")
    choices = resolve(config).choices
    found = pipeline.measure_for_plan(checkpoint, resolve(config))
    matrices = checkpoint.planned
    file_bytes = file_table(checkpoint, native.PROFILE, matrices, choices)
    widest = file_bytes.max(axis=1)

    def plan_within(budget: Budget) -> Plan:
        return pipeline.make_plan(checkpoint, resolve(config.model_copy(update={"budget": budget})), found)

    low, high = plan_within(Budget(bits=1.0)).size_bytes, plan_within(Budget(bits=8.0)).size_bytes
    assert low is not None
    assert high is not None
    labels = [str(choice) for choice in choices]
    for limit in np.linspace(low, high, 12).astype(int):
        plan = plan_within(Budget(size_bytes=int(limit)))
        assert plan.size_bytes is not None
        slack = int(limit) - plan.size_bytes
        assert slack >= 0
        assert plan.budget_slack == slack
        chosen = np.array([labels.index(plan.choices[matrix.name]) for matrix in matrices])
        upgrades = [
            file_bytes[i, chosen[i] + 1] - file_bytes[i, chosen[i]]
            for i in range(len(matrices))
            if file_bytes[i, chosen[i]] < widest[i]
        ]
        assert not upgrades or slack < min(upgrades)


def test_all_three_units_are_reported_and_agree(tiny: Path) -> None:
    plan = plan_of(tiny)
    checkpoint = open_checkpoint(tiny)
    matrices = {matrix.name: matrix for matrix in checkpoint.with_role(Role.EXPERT)}
    parameters = sum(matrix.parameters for matrix in matrices.values())
    code_bits = sum(plan.assignment[name] * matrix.parameters for name, matrix in matrices.items())
    stored = sum(storage_bytes(plan.choice(name), matrix.shape) for name, matrix in matrices.items())
    assert plan.average_bits == pytest.approx(code_bits / parameters)
    assert plan.bits_per_weight == pytest.approx(8 * stored / parameters)
    assert plan.average_bits <= 2.5 < plan.bits_per_weight
    assert sum(plan.histogram.values()) == len(matrices)
    assert plan_of(tiny, budget=Budget(bpw=plan.bits_per_weight)).bits_per_weight == plan.bits_per_weight


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_stored_values_are_the_quantizer_s(
    save_family: Callable[..., Path], tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    source = save_family(family, dtype=dtype)
    checkpoint = open_checkpoint(source)
    plan = plan_of(source)
    pipeline.quantize(checkpoint, plan, tmp_path / "out")
    originals = {matrix.name: matrix for matrix in checkpoint.matrices}
    seen = set()
    for name, values in read_back(tmp_path / "out", checkpoint).items():
        if name in plan.choices:
            weight = checkpoint.read(originals[name])
            assert torch.equal(values, dequantize(quantize_debiased(weight, plan.choice(name))))
        else:
            with safe_open(checkpoint.folder / checkpoint.shard_of[name], "pt") as file:
                assert torch.equal(values, file.get_tensor(name))
        seen.add(name)
    assert set(plan.choices) <= seen
    assert {matrix.name for matrix in checkpoint.matrices} <= seen


def test_quantizing_twice_gives_identical_bytes(tiny: Path, tiny_quantized: Path, tmp_path: Path) -> None:
    pipeline.quantize(open_checkpoint(tiny), Plan.read(tiny_quantized / PLAN_NAME), tmp_path / "out")
    files = sorted(path.name for path in tiny_quantized.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tiny_quantized / name).read_bytes(), name


def test_output_is_complete(tiny_quantized: Path) -> None:
    names = {path.name for path in tiny_quantized.iterdir()}
    assert {"config.json", "plan.json", "tokenizer.json", "model.safetensors.index.json", MANIFEST_NAME} <= names
    config = json.loads((tiny_quantized / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "alphaq"


def test_plan_for_other_weights_is_refused(tiny: Path, save_family: Callable[..., Path]) -> None:
    with pytest.raises(PlanError, match="other weight files"):
        pipeline.quantize(open_checkpoint(tiny), plan_of(save_family("qwen2_moe")), Path("never"))


def test_plan_that_forgets_an_expert_is_refused(tiny: Path) -> None:
    plan = plan_of(tiny)
    choices = dict(plan.choices)
    name = next(iter(plan.assignment))
    del choices[name]
    with pytest.raises(PlanError, match=name):
        pipeline.quantize(open_checkpoint(tiny), Plan(choices=choices), Path("never"))


def test_hand_made_plan_works(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    choices = {matrix.name: "8g32s" for matrix in checkpoint.with_role(Role.EXPERT)}
    choices[next(iter(choices))] = "16"
    pipeline.quantize(checkpoint, Plan(choices=choices), tmp_path / "out")
    assert pipeline.verify(tmp_path / "out", checkpoint).quantized == len(choices)


@pytest.fixture
def damaged(tiny_quantized: Path, tmp_path: Path) -> Path:
    """A copy of a quantized model that a test may damage."""
    return Path(shutil.copytree(tiny_quantized, tmp_path / "out"))


def test_verify_accepts_what_was_written(damaged: Path, tiny: Path) -> None:
    assert pipeline.verify(damaged).against_source is False
    assert pipeline.verify(damaged, open_checkpoint(tiny)).against_source is True


def test_verify_names_a_flipped_bit(damaged: Path) -> None:
    (shard,) = damaged.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerificationError, match=r"model\..* does not have its checksum"):
        pipeline.verify(damaged)


def test_verify_finds_a_truncated_shard(damaged: Path) -> None:
    (shard,) = damaged.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut short"):
        pipeline.verify(damaged)


def test_verify_finds_a_plan_that_is_not_the_files(damaged: Path) -> None:
    plan = json.loads((damaged / PLAN_NAME).read_text())
    name = next(iter(plan["assignment"]))
    plan["assignment"][name] = 7
    plan["choices"][name] = "7g128"
    (damaged / PLAN_NAME).write_text(json.dumps(plan))
    with pytest.raises(VerificationError, match=rf"{name} is stored as t[\d.]+, the plan says 7g128"):
        pipeline.verify(damaged)


def test_verify_finds_other_source_weights(damaged: Path, save_family: Callable[..., Path]) -> None:
    with pytest.raises(PlanError, match="other weight files"):
        pipeline.verify(damaged, open_checkpoint(save_family("qwen2_moe")))


def test_what_fails_its_check_is_not_published_and_can_be_repaired(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise VerificationError("broken")

    monkeypatch.setattr(quantizing, "verify", fail)
    with pytest.raises(VerificationError):
        pipeline.quantize(open_checkpoint(tiny), plan_of(tiny), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    pipeline.quantize(open_checkpoint(tiny), plan_of(tiny), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "content", ["", "[]", "[" * 100_000, '{"tensors": {"a": []}}', '{"tensors": {"a": {"blake2b": 1}}}']
)
def test_damaged_manifest_is_refused(damaged: Path, content: str) -> None:
    (damaged / MANIFEST_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=r"alphaq_manifest\.json is damaged"):
        pipeline.verify(damaged)


@pytest.mark.parametrize("method", [pytest.param("auto", marks=pytest.mark.slow), "alphaq"])
def test_plan_does_not_depend_on_the_number_of_threads(tiny: Path, method: str) -> None:
    before = torch.get_num_threads()
    try:
        plans = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            plans.append(plan_of(tiny, method=method))
    finally:
        torch.set_num_threads(before)
    one, other = plans
    if method == "auto":  # torch adds up the products of its pass in another order
        assert other.choices == one.choices and other.size_bytes == one.size_bytes
        assert other.objective == pytest.approx(one.objective, rel=1e-6)
    else:
        assert other.to_json() == one.to_json()


def test_an_infeasible_budget_is_told_before_measuring(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(planning.matrices, "measure", never)
    monkeypatch.setattr(planning.passes, "gather", never)
    monkeypatch.setattr(planning.passes, "routing_prior", never)
    with pytest.raises(BudgetError, match="below"):
        plan_of(tiny, budget=Budget(size_bytes=1000), method="auto")
