"""`alphaq verify --run`: an engine that computes otherwise is found, though every weight is as planned."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.engines.output import Output
from alphaq.engines.profiles import ENGINES
from alphaq.errors import PlanError, VerificationError
from alphaq.evaluation.engine_run import restored_logits, run_in_engine
from alphaq.evaluation.restored import restored_alone, restored_from
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan
from conftest import FAMILIES, Ran

CHOICE = {"native": "4g64", "mlx": "4g64", "vllm": "4g64s", "llama.cpp": "Q4_K", "gptqmodel": "4g64"}
OFTEN = ("mixtral", "deepseek_v3")
NEEDED = {"native": "transformers", "mlx": "mlx_lm", "vllm": "compressed_tensors", "llama.cpp": "xllamacpp"}


def quantize(source: Path, engine: str, out: Path, choice: str = "") -> Path:
    checkpoint = open_checkpoint(source)
    roles = (Role.EXPERT, Role.SHARED_EXPERT, Role.ATTENTION)
    choices = {one.name: choice or CHOICE[engine] for role in roles for one in checkpoint.with_role(role)}
    pipeline.quantize(checkpoint, Plan(engine=engine, choices=choices), out, pipeline.WriteOptions(check=False))
    return out


@pytest.fixture(scope="module")
def outputs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundled model for an engine, made once."""
    made: dict[str, Path] = {}

    def make(engine: str) -> Path:
        pytest.importorskip(NEEDED.get(engine, "transformers"))
        if engine not in made:
            made[engine] = quantize(tiny, engine, tmp_path_factory.mktemp(engine) / "out")
        return made[engine]

    return make


@pytest.mark.parametrize("with_source", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["source", "alone"])
@pytest.mark.parametrize("engine", NEEDED)
def test_engine_computes_with_the_restored_weights(
    outputs: Callable[[str], Path], tiny: Path, engine: str, with_source: bool
) -> None:
    ran = run_in_engine(outputs(engine), open_checkpoint(tiny) if with_source else None)
    assert ran.tokens == 48
    assert ran.difference < ran.tolerance / 4
    assert ran.correlation > 0.999


@pytest.mark.parametrize("engine", CHOICE)
def test_restored_weights_are_those_that_verify_reads(outputs: Callable[[str], Path], tiny: Path, engine: str) -> None:
    """With the source and without it; also for an engine that is not installed."""
    from conftest import read_back

    source = open_checkpoint(tiny)
    output = Output(outputs(engine))
    expected = read_back(output.folder, source)
    for restored in (restored_from(output, source), restored_alone(output)):
        for matrix in source.matrices[::17]:
            found = restored.read(next(one for one in restored.matrices if one.name == matrix.name)).float()
            assert torch.equal(found, expected[matrix.name].float()), matrix.name


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=() if one in OFTEN else pytest.mark.slow) for one in FAMILIES]
)
def test_logits_layer_by_layer_are_those_of_the_whole_model(save_family: Callable[..., Path], family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder, ids = save_family(family), list(range(3, 40))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(torch.tensor([ids])).logits[0]
    assert torch.allclose(restored_logits(open_checkpoint(folder), ids), expected, atol=1e-4)


def test_rows_that_llama_cpp_reorders_are_put_back(save_family: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from runnable import save_runnable

    source = save_runnable(tmp_path / "source", "mixtral")
    out = quantize(source, "llama.cpp", tmp_path / "out", "Q8_0")
    checkpoint = open_checkpoint(source)
    restored = restored_from(Output(out), checkpoint)
    query = next(one for one in checkpoint.matrices if one.name.endswith("0.self_attn.q_proj.weight"))
    original = checkpoint.read(query).float()
    assert (restored.read(query).float() - original).abs().max() < 0.01 * original.abs().max()
    assert run_in_engine(out, checkpoint).correlation > 0.99


def test_a_setting_that_the_engine_overlooks_is_found(
    outputs: Callable[[str], Path], tiny: Path, tmp_path: Path
) -> None:
    """As if it had not been refused: the weights are right, and the answers are not."""
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 4.0}
    (source / "config.json").write_text(json.dumps(config))
    out = outputs("llama.cpp")
    from alphaq.evaluation import engine_run

    expected = restored_logits(open_checkpoint(source), list(range(5, 53)))
    found = ENGINES["llama.cpp"].writer.run.logits(out, list(range(5, 53)))  # type: ignore[union-attr]
    assert engine_run._compared("llama.cpp", found, expected, 0.15).difference > 0.15


def test_command_line_runs_it_and_fails_where_they_disagree(
    outputs: Callable[[str], Path], tiny: Path, alphaq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = outputs("native")
    plain = alphaq("verify", out)
    assert plain.code == 0
    assert "Not checked: the original values (add --reference MODEL), nor what the engine computes" in plain.out
    ran = alphaq("verify", out, "--reference", tiny, "--run", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["run"]["engine"] == "our runtime in transformers"
    assert ran.json["run"]["difference"] < 1e-4

    def wrong(checkpoint: Any, ids: list[int]) -> torch.Tensor:
        return torch.randn(len(ids), 4096)

    monkeypatch.setattr("alphaq.evaluation.engine_run.restored_logits", wrong)
    ran = alphaq("verify", out, "--reference", tiny, "--run")
    assert ran.code == 2
    assert "computes otherwise than the restored weights" in ran.err


@pytest.mark.parametrize(
    ("engine", "module", "packages"),
    [("mlx", "mlx_lm.utils", "'alphaq[mlx]' mlx-lm"), ("gptqmodel", "gptqmodel", "gptqmodel")],
)
def test_engine_that_is_not_installed_is_named_with_its_packages(
    outputs: Callable[[str], Path], tiny: Path, alphaq: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch,
    engine: str, module: str, packages: str,
) -> None:  # fmt: skip
    out = outputs(engine)
    monkeypatch.setitem(sys.modules, module, None)
    ran = alphaq("verify", out, "--reference", tiny, "--run")
    assert ran.code == 2
    assert f"is not installed, so nothing can be run in it. Install it: pip install {packages}." in ran.err


@pytest.mark.usefixtures("knows_tiny")
def test_quantize_says_how_to_run_it(tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    ran = alphaq("quantize", tiny, "--bits", 3, "--method", "alphaq", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert f"alphaq verify {tmp_path / 'out'} --reference {tiny} --run" in ran.out.replace("\n", " ")


def test_mixed_experts_are_no_case_for_transformers(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    checkpoint = open_checkpoint(tiny)
    choices = {one.name: "4g64s" if one.layer else "8g64s" for one in checkpoint.with_role(Role.EXPERT)}
    pipeline.quantize(
        checkpoint, Plan(engine="vllm", choices=choices), tmp_path / "out", pipeline.WriteOptions(check=False)
    )
    with pytest.raises(PlanError, match="several choices of experts, which vLLM loads and transformers does not"):
        run_in_engine(tmp_path / "out", checkpoint)


def test_damage_is_told_before_anything_is_run(outputs: Callable[[str], Path], tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(outputs("native"), tmp_path / "damaged"))
    path = next(damaged.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError, match="checksum"):
        pipeline.verify(damaged)


def test_rows_of_a_quantized_embedding_are_restored_too(tiny: Path, tmp_path: Path, alphaq: Callable[..., Ran]) -> None:
    out = tmp_path / "out"
    plan = ("--method", "distortion", "--noise", "analytic", "--bits", "4", "--embedding-bits", "2")
    assert alphaq("quantize", tiny, *plan, "-o", out).code == 0
    checkpoint = restored_from(Output(out), open_checkpoint(tiny))
    (embedding,) = checkpoint.with_role(Role.EMBEDDING)
    whole = checkpoint.read(embedding)
    assert not torch.equal(whole.float(), open_checkpoint(tiny).read(embedding).float())
    for part in (slice(0, 1), slice(7, 40)):
        assert torch.equal(checkpoint.read_rows(embedding, part), whole[part])
    ran = alphaq("verify", out, "--reference", tiny, "--run")
    assert ran.code == 0, ran.err
