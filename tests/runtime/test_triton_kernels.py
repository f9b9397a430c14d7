"""The GPU kernels: on a GPU if there is one, else under Triton's interpreter."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import alphaq  # noqa: F401 - registers the plug-in
from alphaq import pipeline
from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import DeviceError
from alphaq.formats.blocks import decode, dequantize, encode
from alphaq.formats.native import CHOICE_BITS, GROUP_SIZES
from alphaq.formats.table import format_of, parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan
from alphaq.quantizers.base import rounder_of
from alphaq.runtime import multiply
from alphaq.runtime.packed import PackedWeights
from alphaq.runtime.skipping import skip_experts
from families import random_family, save_layout

triton = pytest.importorskip("triton")

MODULE = "alphaq.runtime.triton_kernels"
TRELLIS_MODULE = "alphaq.runtime.triton_trellis"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    """The module as imported here: Triton decides when it decorates a function whether to interpret it."""
    if DEVICE == "cuda":
        yield importlib.import_module(MODULE)
        return
    from triton.language import standard
    from triton.runtime.interpreter import InterpreterBuilder

    def create_dot(self: Any, left: Any, right: Any, *others: Any) -> Any:
        """The interpreter has bfloat16 as integers, and would multiply those."""
        if left.dtype == triton.language.bfloat16:
            left, right = (self.cast_impl(side, triton.language.float32) for side in (left, right))
        return multiply(self, left, right, *others)

    multiply = InterpreterBuilder.create_dot
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in (MODULE, TRELLIS_MODULE):
            patch.delitem(sys.modules, name, raising=False)
        for name in ("sum", "cdiv"):  # compiled ones, if something imported triton before
            patch.setattr(triton.language, name, triton.jit(getattr(standard, name).fn))
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield importlib.import_module(MODULE)
        del sys.modules[MODULE], sys.modules["alphaq.runtime"].triton_kernels
        del sys.modules[TRELLIS_MODULE], sys.modules["alphaq.runtime"].triton_trellis


def packed(choices: Sequence[Sequence[Choice | torch.dtype]], shape: tuple[int, int]) -> PackedWeights:
    """Random matrices, [projections][experts]; a dtype instead of a choice keeps 16 bits."""
    names = [[f"{projection}.{expert}" for expert in range(len(row))] for projection, row in enumerate(choices)]
    weights = PackedWeights(names, shape)
    weights.fill([[_stored(torch.randn(shape) * 0.1 + 0.02, choice).to(DEVICE) for choice in row] for row in choices])
    return weights


def _stored(weight: Tensor, choice: Choice | torch.dtype) -> Tensor:
    return encode(rounder_of("debiased")(weight, choice)) if isinstance(choice, Choice) else weight.to(choice)


def expected(weights: PackedWeights, inputs: Tensor, experts: Tensor, tokens: Tensor) -> Tensor:
    """The same in float64, from weights that were restored first."""
    tensors = {name: _restored(tensor.cpu()) for name, tensor in weights.tensors().items()}
    nothing = torch.zeros(weights.shape, dtype=torch.float64)
    out = [
        torch.cat(
            [tensors.get(f"{projection}.{expert}", nothing) @ inputs[token].double() for projection in range(count)]
        )
        for count in [len(weights.names)]
        for expert, token in zip(experts.tolist(), tokens.tolist(), strict=True)
    ]
    return torch.stack(out)


def _restored(block: Tensor) -> Tensor:
    return block.double() if block.ndim == 2 else dequantize(decode(block), torch.float32).double()


def check(kernels: ModuleType, weights: PackedWeights, experts: Sequence[int], dtype: torch.dtype) -> None:
    """Compare for these experts' pairs, whose tokens are mixed."""
    tokens = torch.arange(len(experts)).flip(0) % max(1, len(experts) - 1)
    inputs = (torch.randn(len(experts), weights.shape[1]) + 0.3).to(dtype)
    chosen = torch.tensor(experts)
    moved = (part.to(DEVICE) for part in (inputs, weights.table, chosen, tokens))
    given, table, on_device, token = moved
    found = kernels.packed_linear(given, table, weights.shape[0], on_device, token).cpu()
    reference = expected(weights, inputs, chosen, tokens)
    assert found.dtype == dtype
    assert found.shape == reference.shape
    scale = reference.norm(dim=1, keepdim=True).clamp_min(1e-30) / found.shape[1] ** 0.5
    assert ((found.double() - reference).abs() / scale).max() < TOLERANCE[dtype] * 10
    assert (found.double() - reference).norm() < TOLERANCE[dtype] * reference.norm()


def every_width(group: int, symmetric: bool) -> list[Choice | torch.dtype]:
    """All that one launch may meet."""
    return [*(Choice(bits, group, symmetric) for bits in CHOICE_BITS), torch.bfloat16, torch.float16]


@pytest.mark.parametrize("columns, group, symmetric", [(128, 32, False), (100, 64, False), (72, 128, True)])
def test_decode_multiplies_with_every_width_in_one_launch(
    kernels: ModuleType, columns: int, group: int, symmetric: bool
) -> None:
    torch.manual_seed(columns)
    check(
        kernels,
        packed([every_width(group, symmetric)], (21 if columns == 100 else 13, columns)),
        range(10),
        torch.float32,
    )


@pytest.mark.parametrize("columns, group, symmetric", [(128, 32, True), (100, 64, False), (136, 128, False)])
def test_prefill_multiplies_with_every_width_in_one_launch(
    kernels: ModuleType, columns: int, group: int, symmetric: bool
) -> None:
    torch.manual_seed(columns)
    experts = torch.arange(10).repeat_interleave(3)[torch.randperm(30)].tolist()
    check(kernels, packed([every_width(group, symmetric)], (21, columns)), experts, torch.float32)


@pytest.mark.parametrize("repeats", [1, 3], ids=["decode", "prefill"])
@pytest.mark.parametrize("columns, group", [(72, 32), (136, 128)])
def test_nested_codes_are_multiplied_among_others(kernels: ModuleType, columns: int, group: int, repeats: int) -> None:
    torch.manual_seed(columns)
    nested = [parse_choice(f"{bits}g{group}-nest") for bits in CHOICE_BITS[1:]]
    others = [Choice(3, group), Choice(4, group, True), torch.bfloat16]
    experts = [expert for expert in range(10) for _ in range(repeats)]
    check(kernels, packed([[*nested, *others]], (13, columns)), experts, torch.float32)


@pytest.mark.parametrize("repeats", [1, 3], ids=["decode", "prefill"])
@pytest.mark.parametrize("columns, step", [(33, 5), (136, 4), pytest.param(200, 1, marks=pytest.mark.slow)])
def test_trellis_codes_are_multiplied_among_others(kernels: ModuleType, columns: int, step: int, repeats: int) -> None:
    torch.manual_seed(columns)
    trellis = format_of(parse_choice("t2")).choices()[::step]  # of every fraction
    choices = [*trellis, Choice(4, 64, True), torch.bfloat16]
    experts = [expert for expert in range(len(choices)) for _ in range(repeats)]
    check(kernels, packed([choices], (9, columns)), experts, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("repeats", [1, 5], ids=["decode", "prefill"])
def test_inputs_of_16_bits_give_results_of_their_type(kernels: ModuleType, dtype: torch.dtype, repeats: int) -> None:
    torch.manual_seed(0)
    trellis = parse_choice("t2.5")
    weights = packed(
        [[Choice(2, 32), Choice(3, 128), trellis], [Choice(4, 64, True), torch.bfloat16, trellis]], (9, 40)
    )
    check(kernels, weights, [1, 0, 2] * repeats, dtype)


@pytest.mark.parametrize("pairs", [4, 12], ids=["decode", "prefill"])
def test_experts_that_the_table_lacks_give_zeros(kernels: ModuleType, pairs: int) -> None:
    weights = packed([[Choice(2, 32), Choice(1, 32)], [Choice(5, 32), Choice(8, 32)]], (5, 64))
    check(kernels, weights, ([2, 0, -1, 1] * pairs)[:pairs], torch.float32)


@pytest.mark.parametrize("pairs, dtype", [(19, torch.float32), (40, torch.bfloat16), (70, torch.bfloat16)], ids=str)
def test_many_pairs_of_one_expert_span_tiles(kernels: ModuleType, pairs: int, dtype: torch.dtype) -> None:
    check(kernels, packed([[Choice(3, 32), Choice(6, 32)]], (5, 40)), [1] * pairs + [0] * 2, dtype)


def test_a_block_at_an_odd_word_is_read_right(kernels: ModuleType) -> None:
    """Wide loads need addresses that are multiples of 8."""
    weights = packed([[Choice(2, 64), Choice(8, 64)]], (6, 64))
    moved = []
    for block in weights.tensors().values():
        room = torch.zeros(block.numel() + 12, dtype=torch.uint8, device=DEVICE)
        start = 4 + (-room.data_ptr() % 8)
        moved.append(room[start : start + block.numel()].copy_(block))
    weights.fill([moved])
    assert all(block.data_ptr() % 8 == 4 for block in moved)
    check(kernels, weights, [0, 1], torch.float32)


@pytest.mark.parametrize("repeats", [1, 5], ids=["decode", "prefill"])
def test_the_smallest_matrices_are_multiplied(kernels: ModuleType, repeats: int) -> None:
    choices = [Choice(3, 32), Choice(1, 64), parse_choice("t1.25")]
    check(kernels, packed([choices], (1, 1)), [0, 1, 2] * repeats, torch.float32)


def test_no_pairs_give_no_rows(kernels: ModuleType) -> None:
    weights = packed([[Choice(2, 32)]], (5, 64))
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    found = kernels.packed_linear(torch.ones(1, 64, device=DEVICE), weights.table, 5, nothing, nothing)
    assert found.shape == (0, 5)


def test_rows_longer_than_a_tile_of_columns_are_summed_whole(kernels: ModuleType) -> None:
    """More blocks of 32 columns, and more groups, than a program takes at once."""
    choices = [Choice(3, 32), Choice(1, 32), Choice(8, 128), torch.float16, parse_choice("t2"), parse_choice("t2.75")]
    check(kernels, packed([choices], (3, 1320)), range(6), torch.float32)


def test_tiles_give_every_pair_one_place(kernels: ModuleType) -> None:
    experts = torch.randint(-1, 6, (50,), generator=torch.Generator().manual_seed(0))
    order, tile_expert, start, end = kernels._tiles(experts, 5, 4)
    placed = []
    for expert, first, last in zip(tile_expert.tolist(), start.tolist(), end.tolist(), strict=True):
        if expert < 5:
            mine = order[first : min(first + 4, last)]
            assert len(mine) > 0
            assert (experts[mine] == expert).all()
            placed += mine.tolist()
    assert sorted(placed) == torch.nonzero((experts >= 0) & (experts < 5)).flatten().tolist()


def test_without_triton_the_import_says_what_to_install() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, MODULE, raising=False)
        patch.setitem(sys.modules, "triton", None)
        with pytest.raises(DeviceError, match="pip install triton"):
            importlib.import_module(MODULE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [40, 64, 72, 136, 544])
@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("repeats", [1, 3], ids=["decode", "prefill"])
def test_every_width_group_and_ragged_length(
    kernels: ModuleType, dtype: torch.dtype, columns: int, group: int, symmetric: bool, repeats: int
) -> None:
    torch.manual_seed(columns + group)
    experts = torch.arange(10).repeat_interleave(repeats)[torch.randperm(10 * repeats)].tolist()
    check(kernels, packed([every_width(group, symmetric)], (33, columns)), experts, dtype)


def test_experts_that_a_model_leaves_out_give_what_the_cpu_gives(
    kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(save_layout(random_family("mixtral"), tmp_path / "source", True))
    wanted = {one.name: "4g32" for one in source.matrices if one.role == source.planned_role}
    pipeline.quantize(source, Plan(engine="native", choices=wanted), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        whole = model(ids).logits
        skip_experts(model, 0.9)
        expected = model(ids).logits
        monkeypatch.setattr(multiply, "cpu_linear", kernels.packed_linear)
        found = model.to(DEVICE)(ids.to(DEVICE)).logits.cpu()
    assert float((found - expected).abs().max()) < 1e-4 < float((expected - whole).abs().max())
