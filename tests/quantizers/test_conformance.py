"""What every quantizer promises. A new one gets the whole suite by its line in `QUANTIZERS`.

One that fills a storage of its own needs a case. Where that cannot keep a promise, the case says how much is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_affine import restored as restored_16

from alphaq.errors import QuantizationError
from alphaq.formats.blocks import decode, dequantize, encode
from alphaq.formats.ggml import GGML_BLOCKS
from alphaq.formats.ggml_library import restore_rows
from alphaq.formats.native import CHOICE_BITS, GROUP_SIZES
from alphaq.formats.table import format_of, parse_choice, storage_bytes
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.base import QUANTIZERS
from alphaq.quantizers.debiased import BIAS_WEIGHT
from alphaq.quantizers.hqq import lp_objective
from alphaq.quantizers.nested import quantize_nested
from alphaq.quantizers.rtn import round_to_nearest
from alphaq.quantizers.trellis import quantize_trellis

EVERY = {name: one.function for name, one in QUANTIZERS.items()}
EVERY |= {"nested": quantize_nested, "trellis": quantize_trellis}
NATIVE = tuple(Choice(bits, GROUP_SIZES[bits % 3], symmetric) for bits in CHOICE_BITS for symmetric in (False, True))
NESTED = tuple(parse_choice(f"{bits}g{GROUP_SIZES[bits % 3]}-nest") for bits in CHOICE_BITS[1:])
TRELLIS = tuple(map(parse_choice, ("t1", "t2.25", "t3.5", "t4")))
SYMMETRIC = tuple(Choice(bits, group, symmetric=True) for bits, group in ((4, 32), (4, 128), (8, 64)))
AFFINE = tuple(Choice(bits, group) for bits, group in ((2, 32), (3, 64), (4, 128), (5, 64), (6, 32), (8, 128)))
GGML = tuple(map(parse_choice, ("Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL")))


def squared(weight: torch.Tensor, restored: torch.Tensor, choice: Choice) -> float:
    """Σ(w − ŵ)², what most quantizers minimize."""
    return float((weight.double() - restored.double()).square().sum())


def weighed(weight: torch.Tensor, restored: torch.Tensor, choice: Choice) -> float:
    """Σ(w − ŵ)², but of one bit, where min–max has the least already, what `debiased` minimizes: bias counts more."""
    error = squared(weight, restored, choice)
    for group, values in zip(*(part.double().split(choice.group_size, 1) for part in (weight, restored)), strict=True):
        target = group if choice.symmetric else group - group.mean(1, keepdim=True)
        along = ((values - group) * target).sum(1) / target.norm(dim=1)
        error += float((BIAS_WEIGHT - 1) * along.square().sum()) if choice.bits == 1 else 0
    return error


def powers(weight: torch.Tensor, restored: torch.Tensor, choice: Choice) -> float:
    """Σ|w − ŵ|^p, what HQQ minimizes, at times at the expense of squares."""
    return lp_objective(weight, restored)


def restored_blocks(matrix: QuantizedMatrix) -> torch.Tensor:
    """Values of ggml's blocks."""
    return torch.from_numpy(restore_rows(matrix.codes.numpy(), str(matrix.choice), matrix.shape[1]))


@dataclass(frozen=True)
class Case:
    """What a quantizer stores, and how far it keeps the promises."""

    choices: tuple[Choice, ...]
    restore: Callable[[QuantizedMatrix], torch.Tensor] = dequantize
    loss: Callable[[torch.Tensor, torch.Tensor, Choice], float] = squared
    """Which error is no larger than that of plain min–max."""
    factor: float = 1.0
    """Times the error of min–max with this storage's bits and groups that is allowed."""
    drift: float = 0.0
    """Largest Σ(ŵ′ − ŵ)²/Σŵ² of a second quantization."""
    constants: float = 2**-10
    """Relative error of a group of one value; float16 rounds half as much."""
    rowwise: bool = False
    """Whether a group sees the others of its row."""
    whole: int = 1
    """Rows are multiples of so many weights."""
    package: str = ""
    """Python package without which there is nothing to test."""

    @property
    def native(self) -> bool:
        """Whether `packing` stores what this quantizer returns."""
        return self.restore is dequantize


CASES = {name: Case(NATIVE) for name, one in QUANTIZERS.items() if one.plain or one.looks_at_inputs} | {
    "debiased": Case(NATIVE, loss=weighed),
    "gptq": Case(NATIVE, loss=weighed),  # as it rounds without inputs
    "hqq": Case(NATIVE, loss=powers),
    # No level is zero, which cubes of Gaussians mostly are; and the step serves all narrower widths.
    "nested": Case(NESTED, factor=3.5),
    # Another path may be nearer to a path's own values at another scale; rows begin in state 0, so that their first
    # weights may miss; groups are whole rows.
    "trellis": Case(TRELLIS, drift=0.1, constants=1.5, rowwise=True),
    # ŵ and scales have 8 significant bits: at 8 bits the outer codes are a quarter of a step off.
    "symmetric16": Case(SYMMETRIC, restored_16, factor=1.05, drift=3e-4, constants=2**-8, whole=16),
    # Also 8 bits; and a second quantization begins with a step search, whose grids have a level at 0.
    "affine": Case(AFFINE, restored_16, factor=1.15, drift=0.05, constants=2**-7, whole=16),
    # Most have scales of 4 to 6 bits, and search for another error than this one, from the largest weight on.
    "ggml": Case(
        GGML, restored_blocks, factor=1.3, drift=0.05, constants=0.1, rowwise=True, whole=256, package="xllamacpp"
    ),
}
PAIRS = [pytest.param(name, choice, id=f"{name}-{choice}") for name, case in CASES.items() for choice in case.choices]
NAMES = list(CASES)
every_pair = pytest.mark.parametrize(("name", "choice"), PAIRS)


@pytest.fixture(autouse=True)
def _package(request: pytest.FixtureRequest) -> Iterator[None]:
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name and CASES[name].package:
        pytest.importorskip(CASES[name].package)
    yield


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Cubes of Gaussians about 0.2: few weights far away, and not as many above as below."""
    return (gaussian(rows, columns, seed) + 0.2) ** 3


def weights(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    """Several sorts of groups."""
    values = heavy_tailed(rows, columns, seed) if kind == "heavy" else gaussian(rows, columns, seed)
    return {
        "sparse": values * (gaussian(rows, columns, seed + 1) > 0.8),
        "positive": values.abs() + 1,
        "flat": 1 + 1e-4 * values,
        "grid": values.mul(3).round(),
        "half": values.half().float(),
    }.get(kind, values)


KINDS = ("gaussian", "heavy", "sparse", "positive", "flat", "grid", "half")


def at_choice(name: str, choice: Choice, weight: torch.Tensor) -> tuple[QuantizedMatrix, torch.Tensor]:
    """A matrix quantized, and its values."""
    found = EVERY[name](weight, choice)
    return found, CASES[name].restore(found)


def min_max_values(choice: Choice, weight: torch.Tensor) -> torch.Tensor:
    """Plain min–max with as many bits and as large groups, in float16 scales; of ggml's blocks what is in all types.

    Of streams, whose groups are rows, in no more bytes and usual groups.
    """
    if format_of(choice).foreign or format_of(choice).streams:
        choice = Choice(choice.bits, 32 if format_of(choice).foreign else 128, symmetric=True)
    return dequantize(round_to_nearest(weight, replace(choice, name="")))


def test_every_quantizer_has_a_case() -> None:
    assert set(CASES) == set(EVERY)


@every_pair
@pytest.mark.parametrize("kind", ["gaussian", "heavy"])
def test_error_is_no_larger_than_that_of_min_max(name: str, choice: Choice, kind: str) -> None:
    case, weight = CASES[name], weights(kind, 24, 512, 1)
    plain = min_max_values(choice, weight)
    allowed = case.factor * (1 + 1e-6) * case.loss(weight, plain, choice)
    assert case.loss(weight, at_choice(name, choice, weight)[1], choice) <= allowed


@every_pair
@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    unit=st.sampled_from((1e-3, 1.0, 100.0)),
    seed=st.integers(0, 2**16),
)
def test_quantizing_again_changes_nothing(
    name: str, choice: Choice, kind: str, rows: int, columns: int, unit: float, seed: int
) -> None:
    case = CASES[name]
    assume(choice.bits > 1 or kind != "flat")  # float32 rounds the two levels, mean ± s, where s is that much smaller
    weight = unit * weights(kind, rows, -(-columns // case.whole) * case.whole, seed)
    _, once = at_choice(name, choice, weight)
    _, twice = at_choice(name, choice, once)
    if case.drift:
        assert squared(once, twice, choice) <= case.drift * float(once.double().square().sum())
    else:
        assert torch.equal(once, twice)


@every_pair
@settings(deadline=None, max_examples=12, derandomize=True)
@given(kind=st.sampled_from(KINDS), rows=st.integers(1, 40), columns=st.integers(1, 300), seed=st.integers(0, 2**16))
def test_error_and_bytes_are_those_of_what_is_stored(
    name: str, choice: Choice, kind: str, rows: int, columns: int, seed: int
) -> None:
    case = CASES[name]
    weight = weights(kind, rows, -(-columns // case.whole) * case.whole, seed)
    found, restored = at_choice(name, choice, weight)
    assert found.squared_error == pytest.approx(squared(weight, restored, choice), rel=1e-4, abs=1e-9)
    if not case.native:  # engines' files hold the parts as they are
        blocks = weight.shape[1] // choice.group_size
        width = blocks * GGML_BLOCKS[choice.name][2] if format_of(choice).foreign else choice.row_bytes(weight.shape[1])
        assert found.codes.shape == (rows, width)
        return
    block = encode(found)
    assert block.numel() == storage_bytes(choice, (rows, weight.shape[1]))
    again = decode(block)
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(again.scales, found.scales)
    assert (again.offsets is None) == (found.offsets is None)
    assert again.offsets is None or torch.equal(again.offsets, found.offsets)
    assert torch.equal(dequantize(again), restored)


@every_pair
def test_groups_of_zeros_and_of_one_value(name: str, choice: Choice) -> None:
    case, shape = CASES[name], (3, 2 * 256)
    zeros = torch.zeros(shape)
    assert torch.equal(at_choice(name, choice, zeros)[1], zeros)
    for value in (0.3, -0.3):
        constant = torch.full(shape, value)
        assert torch.allclose(at_choice(name, choice, constant)[1], constant, rtol=case.constants)


@every_pair
@pytest.mark.parametrize("outlier", [3e4, -3e4])
def test_a_huge_outlier_matters_in_its_group_alone(name: str, choice: Choice, outlier: float) -> None:
    weight = gaussian(4, 1024)
    spoiled = weight.clone()
    spoiled[2, 700] = outlier
    before, after = (at_choice(name, choice, values)[1] for values in (weight, spoiled))
    assert torch.isfinite(after).all()
    begin = 700 // choice.group_size * choice.group_size
    group = slice(None) if CASES[name].rowwise else slice(begin, begin + choice.group_size)
    after[2, group] = before[2, group]
    assert torch.equal(before, after)


@every_pair
def test_ragged_last_group_is_a_group_by_itself(name: str, choice: Choice) -> None:
    whole = CASES[name].whole
    if format_of(choice).streams:
        pytest.skip("states go on from group to group")
    if whole > choice.group_size or format_of(choice).foreign:
        with pytest.raises(QuantizationError, match="whole"):
            EVERY[name](gaussian(3, choice.group_size + 16), choice)
        return
    rest = choice.group_size // 2 // whole * whole - (whole == 1)
    weight = gaussian(3, choice.group_size + rest)
    together = at_choice(name, choice, weight)[1]
    parts = weight.split(choice.group_size, dim=1)
    assert torch.equal(together, torch.cat([at_choice(name, choice, part.contiguous())[1] for part in parts], dim=1))


@every_pair
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused_by_name(name: str, choice: Choice, bad: float) -> None:
    weight = gaussian(4, 256)
    weight[3, 255] = bad
    with pytest.raises(QuantizationError, match=r"layers\.9\.w"):
        EVERY[name](weight, choice, "layers.9.w")


@pytest.mark.parametrize("name", NAMES)
def test_result_is_the_same_every_time_and_for_every_number_of_threads(name: str) -> None:
    weight, choice = gaussian(300, 1024), CASES[name].choices[0]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            found.append(EVERY[name](weight, choice))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.codes, found[0].codes)
        assert other.squared_error == found[0].squared_error
        if other.scales is not None:
            assert torch.equal(other.scales, found[0].scales)
