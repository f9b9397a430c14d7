"""Models with trellis codes in the runtime: loaded, run, saved, loaded again and made ordinary."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

import alphaq  # noqa: F401 - registers the plug-in
from alphaq import pipeline
from alphaq.calibration.stream import model_class
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import CheckpointError
from alphaq.formats.blocks import encode
from alphaq.formats.table import parse_choice
from alphaq.formats.trellis import FORMAT, WHOLE_ROW
from alphaq.nouns.matrix import Role
from alphaq.nouns.plan import Plan
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.runtime import packed as module
from alphaq.runtime.block_kernels import RESTORED, TRELLIS
from alphaq.runtime.modules import PackedEmbedding
from alphaq.runtime.multiply import multiply
from alphaq.runtime.packed import BITS, FLAGS, PackedWeights
from families import FAMILIES, plain_copy, random_family, save_layout

SPECIAL = ["dbrx", "gemma2", "gpt_oss", "jamba", "llama4", "mixtral", "qwen2_moe"]
CHOICES = ("t1.5", "t2", "3g32", "t3.25", "t4", "16")


def trellis_model(source: Path, out: Path) -> Path:
    """A native checkpoint whose experts have several rates and other choices in turn, and its vocabulary 4 bits."""
    checkpoint = open_checkpoint(source)
    vocabulary = {Role.EMBEDDING: "t4", Role.HEAD: "t4"}
    planned = [one.name for one in checkpoint.matrices if one.role == checkpoint.planned_role]
    wanted = dict(zip(planned, cycle(CHOICES), strict=False))
    wanted |= {one.name: vocabulary[one.role] for one in checkpoint.matrices if one.role in vocabulary}
    pipeline.quantize(checkpoint, Plan(engine="native", choices=wanted), out)
    return out


def load(folder: Path) -> Any:
    """With the class for all modalities, where there is one."""
    from transformers import AutoConfig

    return model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 19)[None]
    torch.manual_seed(0)
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def weights_of(model: Any) -> list[PackedWeights]:
    return [one for one in model.modules() if isinstance(one, PackedWeights)]


def random_matrix(text: str, shape: tuple[int, int]) -> QuantizedMatrix:
    """Random bits, which are streams like any others."""
    choice, generator = parse_choice(text), torch.Generator().manual_seed(1)
    rows, columns = shape
    codes = torch.randint(0, 256, (rows, FORMAT.row_bytes(choice, columns)), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, choice.groups(columns), generator=generator).half()
    return QuantizedMatrix(choice, shape, codes, scales, None)


@pytest.mark.parametrize(
    "family", [one if one in SPECIAL else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES]
)
def test_logits_are_those_of_the_dequantized_model_also_saved_again(tmp_path: Path, family: str) -> None:
    source = save_layout(random_family(family), tmp_path / "source", True)
    folder = trellis_model(source, tmp_path / "out")
    model = load(folder)
    assert any((weights.table[..., FLAGS] == TRELLIS).any() for weights in weights_of(model))
    assert any(isinstance(one, PackedEmbedding) for one in model.modules())
    wanted = logits(load(plain_copy(open_checkpoint(source), folder, tmp_path / "plain")))
    assert float((logits(model) - wanted).abs().max()) < 1e-4
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    assert float((logits(model.dequantize()) - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("choices", [("16", "t2", "t2"), ("t2", "16", "t2")], ids=["gate", "up"])
def test_what_is_kept_beside_packed_matrices_is_saved_by_itself(tmp_path: Path, choices: tuple[str, ...]) -> None:
    """Of this family transformers makes one tensor of both, and has but one of them."""
    source = save_layout(random_family("inkling_mm_model"), tmp_path / "source", True)
    checkpoint = open_checkpoint(source)
    planned = [one.name for one in checkpoint.matrices if one.role == checkpoint.planned_role]
    shared = [one.name for one in checkpoint.matrices if one.role is Role.SHARED_EXPERT]
    wanted = dict.fromkeys(planned, "3g32") | dict(zip(shared, cycle(choices), strict=False))
    pipeline.quantize(checkpoint, Plan(engine="native", choices=wanted), tmp_path / "out")
    model = load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_a_table_says_the_rate_and_prints_the_mean() -> None:
    weights = PackedWeights([["a", "b"]], (4, 64))
    weights.fill([[encode(random_matrix("t2.25", (4, 64))), encode(random_matrix("t3.25", (4, 64)))]])
    assert weights.table[0, :, BITS].tolist() == [9, 13] and "2.75 bits" in weights.extra_repr()


def test_rows_with_more_than_one_scale_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another scale begins, no step of the kernels does."""
    matrix = random_matrix("t1", (2, WHOLE_ROW + 70))
    weights = PackedWeights([["wide"]], matrix.shape)
    weights.fill([[encode(matrix)]])
    assert weights.table[0, 0, FLAGS] == RESTORED
    inputs = torch.randn(1, matrix.shape[1], generator=torch.Generator().manual_seed(2))
    found = multiply(inputs, weights, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    wanted = inputs.double() @ weights.dequantized(0, 0, torch.float64).T
    assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-5
    monkeypatch.setattr(module, "RESTORING_DEVICES", ())
    with pytest.raises(CheckpointError, match="wide is stored as t1, for which there is no kernel"):
        weights.fill([[encode(matrix)]])
