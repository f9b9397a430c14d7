from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import alphaq  # noqa: F401 - registers the plug-in
from alphaq import pipeline
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.config import Budget, PlanConfig
from alphaq.engines.output import Output
from alphaq.planning import resolve
from conftest import FAMILIES, read_back


def dequantized_folder(source: Checkpoint, quantized: Path, out: Path) -> Path:
    """An ordinary float32 checkpoint that holds the dequantized matrices: what loading must equal."""
    import shutil

    from safetensors.torch import save_file

    out.mkdir()
    shutil.copy(source.folder / "config.json", out)
    tensors = read_back(quantized, source)
    save_file({n: t.float().contiguous() for n, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def check_logits(source: Path, tmp_path: Path, group_size: int, choices: str = "1,2,3,4") -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(source)
    request = resolve(PlanConfig(budget=Budget(bits=2.5), group_size=group_size, choices=choices, method="alphaq"))
    plan = pipeline.make_plan(checkpoint, request, pipeline.measure_for_plan(checkpoint, request))
    pipeline.quantize(checkpoint, plan, tmp_path / "out")
    plain = dequantized_folder(checkpoint, tmp_path / "out", tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.randint(0, loaded.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, wanted, before = (model(ids).logits for model in (loaded, expected, original))
    assert float((logits - wanted).abs().max()) < 1e-3
    assert float((logits - before).abs().max()) > 1e-3  # quantization did change something


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_dequantized_matrices(
    save_family: Callable[..., Path], tmp_path: Path, family: str, fused: bool
) -> None:
    check_logits(save_family(family, fused), tmp_path, group_size=32, choices="1,2,3,4,16")


def test_bundled_model_loads_with_the_dequantized_logits(tiny: Path, tmp_path: Path) -> None:
    check_logits(tiny, tmp_path, group_size=128)


@pytest.mark.slow
def test_larger_trained_model_loads_with_the_dequantized_logits(shared: Path, tmp_path: Path) -> None:
    check_logits(shared / "models" / "moe22m", tmp_path, group_size=64)


def test_default_dtype_is_the_checkpoint_s_and_saving_gives_a_plain_model(tiny_quantized: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_quantized)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
    assert len(open_checkpoint(tmp_path / "plain").matrices) == len(open_checkpoint_of(tiny_quantized))


def open_checkpoint_of(folder: Path) -> list[str]:
    """Names of a native checkpoint's matrices."""
    return [name for name, one in Output(folder).stored.items() if one.dtype == "U8" or len(one.shape) == 2]


def test_newer_format_is_refused(tiny_quantized: Path, tmp_path: Path) -> None:
    import json
    import shutil

    from transformers import AutoModelForCausalLM

    from alphaq.errors import CheckpointError

    folder = Path(shutil.copytree(tiny_quantized, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="native format 2"):
        AutoModelForCausalLM.from_pretrained(folder)
