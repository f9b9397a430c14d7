"""The signal against a direct measurement: round a matrix, run the family's own class, see how far the stream moves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaq.calibration import traffic
from alphaq.calibration.passage import Passage
from alphaq.calibration.stream import HollowModel, model_class
from alphaq.calibration.traffic import PROBE, ExpertUse, busiest, gather, of_all_experts
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.errors import CheckpointError
from alphaq.formats.blocks import dequantize
from alphaq.nouns.matrix import MatrixRef
from alphaq.quantizers.base import rounder_of
from alphaq.simd.sums import squared_distance, squared_norm
from calibration.test_every_family import NOT_RUN
from families import EXPERTS, FAMILIES, HEADS, random_family, save_layout

IDS = torch.arange(3, 99).view(3, 32)
OFTEN = {"gemma2", "gemma4_text", "granitemoe", "nemotron_h", "qwen2_moe"}
MIXING = {"inkling_text", "inkling2_text", "inkling_mm_model", "inkling2"}
"""Families that mix neighbouring tokens behind the experts, so that a token's own experts are not all that moves it."""
DENSE = {"gemma3_text": {}, "olmo2": {}, "olmo3": {}, "exaone4": {}, "granite": {}, "cohere": {}, "minicpm3": HEADS}
"""Types that tests/families.py leaves out, which send their MLP's output to the stream in ways of their own."""


def uneven(family: str) -> Any:
    """A family's random model whose gains and scales differ, so that none goes unnoticed."""
    model = random_family(family, **DENSE.get(family, {}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_((1 if "norm" in name and "bias" not in name else 0) + 0.5 * torch.rand(parameter.shape))
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # DeepSeek-V4's table of which tokens go where, which names no expert twice
                count = torch.arange(buffer.shape[1])
                buffer.copy_((torch.arange(len(buffer))[:, None] + count) % EXPERTS)
    return model


def streams(folder: Path, source: Checkpoint) -> dict[int, torch.Tensor]:
    """What each decoder layer of the loaded class puts out, float64 [tokens, anything]."""
    hollow = HollowModel(source)
    cls = model_class(hollow.model.config)
    model = cls.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            stream = output[0] if isinstance(output, tuple) else output
            found[layer] = stream.double().reshape(IDS.numel(), -1)

        return hook

    for layer in hollow.experts:
        model.get_submodule(hollow.layers[layer]).register_forward_hook(keep(layer))
    base = next(name for name, module in hollow.model.named_modules() if module is hollow.base)
    with torch.no_grad():
        model.get_submodule(base)(input_ids=IDS, use_cache=False)
    return found


def rounded_copy(source: Checkpoint, matrix: MatrixRef, out: Path) -> float:
    """The checkpoint in float32 with one matrix rounded to the probe; its relative squared error."""
    out.mkdir()
    (out / "config.json").write_bytes((source.folder / "config.json").read_bytes())
    stored = load_file(source.folder / "model.safetensors")
    tensors = {name: source.tensor(name).float() for name in stored}
    weight = source.read(matrix)
    rounded = dequantize(rounder_of("debiased")(weight, PROBE, matrix.name))
    place = tensors[matrix.tensor] if matrix.index is None else tensors[matrix.tensor][matrix.index]
    place = (place.T if matrix.transposed else place)[matrix.row_start :: matrix.row_step][: matrix.shape[0]]
    place.copy_(rounded)
    reshaped = {name: one.reshape(stored[name].shape).contiguous() for name, one in tensors.items()}
    save_file(reshaped, out / "model.safetensors", {"format": "pt"})
    return squared_distance(weight, rounded) / squared_norm(weight)


def compare_signal(family: str, folder: Path) -> dict[str, tuple[float, float]]:
    """Signal, and what a run of the class gives, of one matrix of each projection in the first and last MoE layer."""
    save_layout(uneven(family), folder / "source", published=True)
    source = open_checkpoint(folder / "source")
    seen = gather(source, IDS, with_signal=True)
    plain = streams(folder / "source", source)
    pairs = {}
    by_place: dict[tuple[int, str], list[MatrixRef]] = {}
    for matrix in source.planned:
        assert matrix.layer is not None and matrix.projection is not None
        by_place.setdefault((matrix.layer, matrix.projection), []).append(matrix)
    for (layer, projection), matrices in by_place.items():
        if layer not in (min(plain), max(plain)):
            continue
        matrix = max(matrices, key=lambda one: seen.matrices[one.name].hessian_trace)
        error = rounded_copy(source, matrix, out := folder / f"{layer}-{projection}")
        moved = (streams(out, source)[layer] - plain[layer]).square().sum(-1)
        direct = float((moved / plain[layer].square().sum(-1)).mean()) / error
        pairs[matrix.name] = (seen.matrices[matrix.name].signal, direct)
    return pairs


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(one, marks=() if one in OFTEN else pytest.mark.slow)
        for one in [*FAMILIES, *DENSE]
        if one not in NOT_RUN
    ],
)
def test_signal_is_how_far_rounding_a_matrix_moves_the_stream(family: str, tmp_path: Path) -> None:
    pairs = compare_signal(family, tmp_path)
    assert pairs
    for name, (signal, direct) in pairs.items():
        assert direct > 0, name
        assert signal == pytest.approx(direct, rel=0.2 if family in MIXING else 0.05), name


def test_experts_that_are_left_out_have_the_signal_of_their_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(save_layout(uneven("qwen2_moe"), tmp_path, published=True))
    whole = gather(source, IDS, with_signal=True)
    monkeypatch.setattr(traffic, "SIGNAL_EXPERTS", 2)
    some = gather(source, IDS, with_signal=True)
    assert some.experts == whole.experts
    for layer in {matrix.layer for matrix in source.planned}:
        own = {one.expert: one.name for one in source.planned if (one.layer, one.projection) == (layer, "down")}
        uses = [whole.experts[layer, number] for number in range(EXPERTS)]
        signals = [some.matrices[own[number]].signal for number in range(EXPERTS)]
        seen = busiest(uses, 2)
        rate = sum(signals[one] for one in seen) / sum(uses[one].mean_square_weight for one in seen)
        for number in range(EXPERTS):
            if number in seen:
                assert some.matrices[own[number]] == whole.matrices[own[number]]
            else:
                assert signals[number] == pytest.approx(rate * uses[number].mean_square_weight)


def test_experts_without_tokens_or_that_cannot_be_rounded_tell_nothing_of_others() -> None:
    uses = [ExpertUse(0.1, 0.5, weight, 10) for weight in (0.4, 0.1, 0.2, 0.0)]
    assert of_all_experts([8.0, None, None, None], uses) == pytest.approx([8.0, 2.0, 4.0, 0.0])
    found = of_all_experts([math.nan, None, 1.0, None], uses)
    assert math.isnan(found[0]) and found[1:] == pytest.approx([0.5, 1.0, 0.0])
    assert math.isnan(of_all_experts([math.nan, None], uses[:2])[1])


def test_way_that_only_multiplies_is_known_from_one_run_and_any_other_is_not() -> None:
    torch.manual_seed(0)
    output, residual = torch.randn(50, 16), 30 * torch.randn(50, 16)
    scales = torch.rand(50, 1)
    scaled = Passage(lambda one: residual + scales * one, output, residual + scales * output, "layers.0")
    gains, change = scaled.gains(), torch.randn(50, 16)
    assert gains is not None
    assert torch.allclose(gains * change.double().square().sum(-1), scaled.moved(change), rtol=1e-3)
    gain = 1 + torch.rand(16)

    def normed(one: torch.Tensor) -> torch.Tensor:
        return residual + gain * one / one.square().mean(-1, keepdim=True).sqrt()

    norm = Passage(normed, output, normed(output), "layers.0")
    assert norm.gains() is None
    assert float(norm.moved(0.5 * output).max()) < 1e-10  # a norm takes the length away
    wider = Passage(lambda one: one @ torch.ones(16, 4), output, output @ torch.ones(16, 4), "layers.0")
    assert wider.gains() is None


def test_layer_that_does_not_repeat_itself_is_refused_by_name() -> None:
    output = torch.ones(4, 8)
    with pytest.raises(CheckpointError, match=r"layers\.3 of odd .* run again"):
        Passage(lambda one: one + torch.rand(4, 8), output, output, "layers.3 of odd")
