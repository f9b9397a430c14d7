"""Quantizing on inputs, as a user runs it: closer to the model, complete, resumable, and clear when it cannot."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alphaq import pipeline
from alphaq.calibration.text import Text
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.errors import AlphaQError, CheckpointError, OutputError, PlanError
from alphaq.formats.table import rate_of
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget, PlanConfig, Rule
from alphaq.planning import make_plan, measure_for_plan, resolve
from alphaq.quantizers.base import QUANTIZERS
from alphaq.writing import refining
from alphaq.writing.recoding import recode
from alphaq.writing.rounding import Rounding, enough_tokens
from conftest import DATA, Ran, read_back
from contents import contents
from families import random_family, save_layout

CODE = DATA / "texts" / "code.txt"
Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def model(save_family: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(save_family("qwen2_moe"))


def plan_of(checkpoint: Checkpoint, engine: str = "native", bits: float = 3.0, **settings: object) -> Plan:
    config = PlanConfig(budget=Budget(bits=bits), method="uniform", noise="analytic", engine=engine, **settings)
    request = resolve(config)
    return make_plan(checkpoint, request, measure_for_plan(checkpoint, request))


def outputs(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        pytest.param(str(CODE), "2,3", marks=pytest.mark.slow, id="file"),
        pytest.param("self", "2,3", marks=pytest.mark.slow, id="self"),
        pytest.param("self", "t2,t3", marks=pytest.mark.slow, id="trellis"),
    ],
)
def test_the_model_stays_closer_to_itself_on_that_text(
    alphaq: Run, tiny: Path, tmp_path: Path, text: str, choices: str
) -> None:
    common = ("quantize", tiny, "--bits", "2", "--method", "uniform", "--choices", choices, "--json")
    plain = alphaq(*common, "-o", tmp_path / "debiased")
    found = alphaq(
        *common, "-o", tmp_path / "gptq", "--quantizer", "gptq", "--calibration", text, "--calibration-tokens", 4096
    )
    assert plain.code == found.code == 0, found.err
    assert found.json["quantizer"] == "gptq" and plain.json["quantizer"] == "debiased"
    assert found.json["size_bytes"] == plain.json["size_bytes"]
    assert alphaq("verify", tmp_path / "gptq", "--reference", tiny).code == 0
    source = open_checkpoint(tiny)
    ids = Text(CODE if text != "self" else "self", 2048).windows(source)
    expected = outputs(tiny, ids)
    kl = {
        name: (expected.exp() * (expected - outputs(tmp_path / name, ids))).sum(-1).mean()
        for name in ("debiased", "gptq")
    }
    assert kl["gptq"] < 0.8 * kl["debiased"]


def test_every_matrix_is_calibrated_or_named(model: Checkpoint, tmp_path: Path) -> None:
    plan = plan_of(model)
    done = pipeline.quantize(
        model, plan, tmp_path / "all", pipeline.WriteOptions(rounding=Rounding.of("native", "gptq", Text("self", 4096)))
    )
    assert done.not_calibrated == {}
    few = pipeline.quantize(
        model, plan, tmp_path / "few", pipeline.WriteOptions(rounding=Rounding.of("native", "gptq", Text("self", 96)))
    )
    nearest = pipeline.quantize(
        model, plan, tmp_path / "plain", pipeline.WriteOptions(rounding=Rounding.of("native", "debiased"))
    )
    left = few.not_calibrated
    experts = {matrix.name for matrix in model.planned}
    assert left and left.keys() <= experts and left.keys() != experts
    assert all("fewer than its" in reason for reason in left.values())
    mine, plain = (read_back(tmp_path / name, model) for name in ("few", "plain"))
    same = {name for name in experts if torch.equal(mine[name], plain[name])}
    assert same == left.keys()
    assert nearest.not_calibrated == {}


def test_a_coded_plan_s_bytes_hold_with_inputs_too(model: Checkpoint, tmp_path: Path) -> None:
    request = resolve(PlanConfig(budget=Budget(bpw=2.5), method="alphaq", codec="zstd"))
    plan = make_plan(model, request, measure_for_plan(model, request))
    done = pipeline.quantize(
        model,
        plan,
        tmp_path / "gptq",
        pipeline.WriteOptions(rounding=Rounding.of("native", "gptq", Text("self", 4096))),
    )
    assert plan.size_bytes is not None
    assert 0.98 * plan.size_bytes < done.size_bytes <= plan.size_bytes
    assert done.not_calibrated == {}
    assert pipeline.verify(tmp_path / "gptq", model).against_source
    pipeline.quantize(model, plan, tmp_path / "debiased")
    for name in ("gptq", "debiased"):
        recode(tmp_path / name, tmp_path / f"{name}-decoded", "none")
    mine, plain = (read_back(tmp_path / f"{name}-decoded", model) for name in ("gptq", "debiased"))
    assert {rate_of(choice) > 0 for choice in plan.every_choice().values()} == {False, True}
    assert sum(torch.equal(mine[name], plain[name]) for name in plan.choices) < len(plan.choices) / 5


def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, rounding = plan_of(model), Rounding.of("native", "gptq", Text("self", 1024))
    pipeline.quantize(model, plan, tmp_path / "whole", pipeline.WriteOptions(rounding=rounding))
    real, stored = refining.store, []

    def stops(*arguments: object) -> object:
        if len(stored) == 20:
            raise KeyboardInterrupt
        stored.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(refining, "store", stops)
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(model, plan, tmp_path / "out", pipeline.WriteOptions(rounding=rounding))
    monkeypatch.setattr(refining, "store", real)
    rounded = []
    usual = QUANTIZERS["gptq"]
    noting = replace(usual, function=lambda *arguments: rounded.append(arguments[2]) or usual.function(*arguments))
    monkeypatch.setitem(QUANTIZERS, "gptq", noting)
    done = pipeline.quantize(model, plan, tmp_path / "out", pipeline.WriteOptions(rounding=rounding))
    assert len(rounded) + len(done.not_calibrated) + 20 >= len(plan.choices) > len(rounded)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(AlphaQError, match="quantizer changed since"):
        (tmp_path / "other").mkdir()
        monkeypatch.setattr(refining, "store", stops)
        stored.clear()
        with pytest.raises(KeyboardInterrupt):
            pipeline.quantize(model, plan, tmp_path / "other" / "out", pipeline.WriteOptions(rounding=rounding))
        pipeline.quantize(model, plan, tmp_path / "other" / "out")


@pytest.mark.parametrize(
    ("engine", "bits"), [("gptqmodel", 3.0), ("mlx", 3.0), ("vllm", 4.0)], ids=["gptqmodel", "mlx", "vllm"]
)
def test_other_engines_get_their_own_levels(
    engine: str, bits: float, save_family: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(save_family("olmoe"))
    plan = plan_of(checkpoint, engine, bits, group_size=32)
    done = pipeline.quantize(
        checkpoint,
        plan,
        tmp_path / "gptq",
        pipeline.WriteOptions(rounding=Rounding.of(engine, "gptq", Text("self", 2048))),
    )
    plain = pipeline.quantize(checkpoint, plan, tmp_path / "plain")
    assert done.verified.mean_relative_error > plain.verified.mean_relative_error  # not of weights, but of outputs
    mine, theirs = (read_back(tmp_path / name, checkpoint) for name in ("gptq", "plain"))
    assert mine.keys() == theirs.keys()
    assert sum(not torch.equal(mine[name], theirs[name]) for name in plan.choices) > len(plan.choices) // 2


def test_llama_types_cannot_be_calibrated(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    ran = alphaq("quantize", tiny, "-o", tmp_path / "out", "--bpw", 4, "--engine", "llama.cpp", "--quantizer", "gptq")
    assert ran.code == 2 and "--imatrix" in ran.err and "gptq" in ran.err
    with pytest.raises(PlanError, match="--imatrix"):
        Rounding.of("llama.cpp", "gptq")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantizer", "hqqq"), "hqqq"),
        (("--quantizer", "clipped"), "is called mse now"),
        (("--quantizer", "minmax"), "is called rtn now"),
        (("--quantizer", "debiased", "--calibration", "self"), "--calibration does nothing"),
        (("--calibration", "self"), "--calibration does nothing"),
        (("--quantizer", "gptq", "--calibration", "nowhere.txt"), "No text file nowhere.txt"),
        (("--quantizer", "debiased", "--calibration-tokens", "512"), "--calibration-tokens"),
        (("--quantizer", "gptq", "--calibration-tokens", "0"), "--calibration-tokens"),
        (
            ("--quantizer", "gptq", "--calibration", "norm"),
            "Give a UTF-8 text with --calibration, or --calibration self",
        ),
    ],
)
def test_options_that_fit_nothing_are_refused(
    options: tuple[str, ...], message: str, alphaq: Run, tiny: Path, tmp_path: Path
) -> None:
    ran = alphaq("quantize", tiny, "-o", tmp_path / "out", "--bits", 3, "--method", "uniform", *options)
    assert ran.code == 2 and message in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("knows_tiny")
def test_a_plan_file_can_be_rounded_on_a_text(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert alphaq("plan", tiny, "--bits", 3, "--method", "uniform", "-o", plan).code == 0
    more = ("--quantizer", "gptq", "--calibration", CODE, "--calibration-tokens", "1024")
    ran = alphaq("quantize", tiny, "-o", tmp_path / "out", "--plan", plan, *more)
    assert ran.code == 0, ran.err
    assert "is rounded without its inputs" in ran.err and "more; --json names them all" in ran.err


def test_tokens_are_enough_for_the_experts(tiny: Path, save_family: Callable[..., Path]) -> None:
    for folder in (tiny, save_family("mixtral")):
        checkpoint = open_checkpoint(folder)
        experts = checkpoint.architecture.experts_per_layer(checkpoint.config)
        chosen = checkpoint.text_config["num_experts_per_tok"]
        widest = max(matrix.shape[1] for matrix in checkpoint.planned)
        assert enough_tokens(checkpoint) * chosen / experts >= widest


def test_a_text_is_known_by_what_it_holds(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for path, content in zip(paths, ("one", "one", "two"), strict=True):
        path.write_text(content)
    first, again, other = (str(Text(path)) for path in paths)
    assert first == again != other
    assert str(Text(paths[0], 512)) != first != str(Text("self"))


def test_what_is_kept_is_not_reported(model: Checkpoint, tmp_path: Path) -> None:
    plan = plan_of(model, bits=8.0, pins=(Rule(pattern="down", value="16"),))
    rounding = Rounding.of("native", "gptq", Text("self", 4096))
    assert (
        pipeline.quantize(model, plan, tmp_path / "out", pipeline.WriteOptions(rounding=rounding)).not_calibrated == {}
    )


def test_a_run_is_not_gone_on_with_under_another_config(
    save_family: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(save_family("mixtral"), tmp_path / "model"))
    checkpoint, rounding = open_checkpoint(folder), Rounding.of("native", "gptq", Text("self", 256))
    plan = plan_of(checkpoint)

    def stops(*arguments: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(refining, "store", stops)
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(checkpoint, plan, tmp_path / "out", pipeline.WriteOptions(rounding=rounding))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    with pytest.raises(OutputError, match="model settings changed since"):
        pipeline.quantize(open_checkpoint(folder), plan, tmp_path / "out", pipeline.WriteOptions(rounding=rounding))


def test_families_without_a_pass_are_told_what_to_use(tmp_path: Path) -> None:
    folder = save_layout(random_family("jetmoe"), tmp_path / "model", True)
    checkpoint = open_checkpoint(folder)
    rounding = Rounding.of("native", "gptq", Text("self"))
    with pytest.raises(CheckpointError, match="gptq needs that; --quantizer debiased does not"):
        pipeline.quantize(checkpoint, plan_of(checkpoint), tmp_path / "gptq", pipeline.WriteOptions(rounding=rounding))
    assert pipeline.quantize(checkpoint, plan_of(checkpoint), tmp_path / "debiased").tensors


def test_a_text_that_nothing_looks_at_is_refused(alphaq: Run, tiny: Path, tmp_path: Path) -> None:
    ran = alphaq("compare", tiny, "--text", CODE, "--methods", "uniform", "--calibration", CODE, "-o", tmp_path / "out")
    assert ran.code == 2 and "--calibration does nothing for these methods" in ran.err
