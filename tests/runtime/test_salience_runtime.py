"""Mixes of widths in models that run: beside ordinary experts, in the bytes of the file, refused where they must be."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import CheckpointError
from alphaq.formats.blocks import encode, native_format
from alphaq.formats.salient import most_of
from alphaq.formats.table import parse_choice, storage_bytes
from alphaq.nouns.plan import Plan
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.quantizers.salience import mixing
from alphaq.runtime import multiply as module
from alphaq.runtime import packed as packed_module
from alphaq.runtime.multiply import multiply
from alphaq.runtime.packed import PackedWeights
from conftest import Ran
from families import plain_copy

TEXTS = ["2g128-slim", "3g32s-slim", "2g64", "1g128-pb4", "1g32s-pb8", "4g32s", "7g64-slim", "16"]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def stored(weight: torch.Tensor, text: str) -> torch.Tensor:
    """A matrix as it is in a checkpoint."""
    return weight.bfloat16() if text == "16" else encode(mixing(quantize_debiased)(weight, parse_choice(text)))


def packed(shape: tuple[int, int], texts: Sequence[Sequence[str]]) -> PackedWeights:
    """Random matrices, [projections][experts], whose columns differ in size."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.linspace(-1, 1, shape[1]).exp()
    names = [[f"{projection}.{expert}" for expert in range(len(row))] for projection, row in enumerate(texts)]
    weights = PackedWeights(names, shape)
    weights.fill([[stored(torch.randn(shape, generator=generator) * sizes, text) for text in row] for row in texts])
    return weights


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(64, 256), (7, 40), (130, 300)], ids=str)
def test_products_are_those_of_the_dequantized_matrices(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weights = packed(shape, [TEXTS, TEXTS[::-1]])
    generator = torch.Generator().manual_seed(1)
    for count in (1, 9):
        inputs = torch.randn(count, shape[1], generator=generator).to(dtype)
        experts = torch.cat([torch.arange(len(TEXTS)), torch.full((37,), 3), torch.full((40,), 2), torch.tensor([99])])
        tokens = torch.randint(0, count, (len(experts),), generator=generator)
        found = multiply(inputs, weights, experts, tokens)
        assert found.dtype == dtype
        assert not found[-1].any()
        for expert in range(len(TEXTS)):
            mine = experts == expert
            for projection in range(2):
                matrix = weights.dequantized(projection, expert, torch.float64)
                wanted = inputs[tokens[mine]].double() @ matrix.T
                part = found[mine, projection * shape[0] : (projection + 1) * shape[0]].double()
                assert float((part - wanted).norm() / wanted.norm()) < TOLERANCE[dtype]


def test_several_parts_of_a_matrix_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = packed((300, 200), [["3g32-slim", "1g64-pb4"]])
    inputs, experts = torch.randn(4, 200, generator=torch.Generator().manual_seed(2)), torch.arange(4) % 2
    whole = multiply(inputs, weights, experts, torch.arange(4))
    monkeypatch.setattr(module, "RESTORED_BYTES", 60_000)  # of 800 bytes a row
    parts = multiply(inputs, weights, experts, torch.arange(4))
    assert torch.allclose(parts, whole, rtol=1e-5, atol=1e-5)


def test_blocks_stay_as_they_are_and_say_their_choice() -> None:
    weights = packed((64, 256), [TEXTS])
    assert [str(weights.choice(0, expert)) for expert in range(len(TEXTS))] == TEXTS
    assert weights.nbytes == sum(storage_bytes(parse_choice(text), (64, 256)) for text in TEXTS)
    multiply(torch.randn(40, 256), weights, torch.arange(40) % len(TEXTS), torch.arange(40))
    assert weights.nbytes == sum(storage_bytes(parse_choice(text), (64, 256)) for text in TEXTS)


@pytest.mark.parametrize("text", ["2g128-slim", "1g128-pb4"])
def test_other_devices_refuse_by_name_and_say_what_helps(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "RESTORING_DEVICES", ("elsewhere",))
    with pytest.raises(CheckpointError, match=rf"0\.1 is stored as {text}.* cpu.* other --choices"):
        packed((64, 256), [["2g128", text]])
    packed((64, 256), [["2g128", "16"]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpus_refuse_by_name() -> None:
    weights = packed((64, 256), [["2g128", "2g128-slim"]])
    with pytest.raises(CheckpointError, match=r"0\.1 is stored as 2g128-slim.* cuda.* other --choices"):
        weights.to("cuda")


@pytest.mark.parametrize(("text", "value"), [("2g64-slim", 7), ("1g64-pb4", 64)])
def test_damaged_mixes_are_refused_by_name_when_loaded(text: str, value: int) -> None:
    choice, shape = parse_choice(text), (64, 256)
    block = stored(torch.randn(shape), text)
    begin = 16 + sum(native_format(choice).parts(choice, shape)[:3])
    begin += 2 * 64 * 4 if most_of(choice) else 0  # widths, or positions behind their scales
    block[begin] = value
    with pytest.raises(CheckpointError, match=r"layer\.weight has"):
        PackedWeights([["layer.weight"]], shape).fill([[block]])


@pytest.fixture(scope="module")
def uneven(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with what mixes are for: columns of different sizes, and heavy tails."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("uneven") / "m"))
    tensors, generator = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    for name, tensor in tensors.items():
        if "experts" not in name:
            continue
        if "gate_proj" in name:
            tensor[:, :128] *= 4
        elif "up_proj" in name:
            drawn = torch.from_numpy(generator.standard_t(2.5, tuple(tensor.shape)))
            tensors[name] = (drawn * tensor.float().std() / drawn.std()).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(folder: Path) -> torch.Tensor:
    """Of more and of fewer tokens than are multiplied with restored matrices."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (4, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return torch.cat([model(ids).logits.flatten(0, 1), model(ids[:1, :3]).logits[0]])


def test_a_budget_chooses_mixes_and_the_model_runs(alphaq: Callable[..., Ran], uneven: Path, tmp_path: Path) -> None:
    plan_file, out = tmp_path / "plan.json", tmp_path / "out"
    choices = "1,1g128-pb2,1g128-pb4,1g128-pb8,2,2g128-slim,3"
    made = alphaq("plan", uneven, "--bpw", 2.0, "--choices", choices, "--method", "distortion", "-o", plan_file)
    assert made.code == 0, made.err
    plan = Plan.read(plan_file)
    found = {
        part: {plan.choices[name] for name in plan.assignment if f"{part}_proj" in name}
        for part in ("gate", "up", "down")
    }
    assert "2g128-slim" in found["gate"]
    assert found["up"] & {"1g128-pb2", "1g128-pb4", "1g128-pb8"}
    assert found["down"] <= {"1g128", "2g128", "3g128"}
    assert plan.bits_per_weight <= 2.0
    explained = alphaq("explain", plan_file, "layers.0.*gate_proj", "--json")
    assert explained.code == 0 and "2g128-slim" in explained.out
    ran = alphaq("quantize", uneven, "--plan", plan_file, "-o", out)
    assert ran.code == 0, ran.err
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) == plan.size_bytes
    verified = alphaq("verify", out, "--reference", uneven, "--json")
    assert verified.code == 0 and verified.json["ok"], verified.err
    wanted = logits(plain_copy(open_checkpoint(uneven), out, tmp_path / "plain"))
    assert float((logits(out) - wanted).abs().max()) < 1e-4
    assert alphaq("generate", out, "def main", "--max-new-tokens", 4).code == 0
