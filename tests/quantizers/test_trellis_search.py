"""Finding trellis codes: the best there are, the same everywhere, and as good as promised."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from alphaq.checkpoint.reader import open_checkpoint
from alphaq.errors import QuantizationError
from alphaq.formats.blocks import decode, dequantize, encode
from alphaq.formats.table import parse_choice, storage_bytes
from alphaq.formats.trellis import FORMAT
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers.base import QUANTIZERS, rounder_of
from alphaq.quantizers.rounded import STREAM_SHARE, SourceMatrix
from alphaq.quantizers.trellis import encoder_levels, quantize_trellis
from alphaq.quantizers.trellis_kernels import cheapest, run_column, trace, write
from conftest import random_model

RATES = [str(choice) for choice in FORMAT.choices()]


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def relative_error(weight: torch.Tensor, matrix: QuantizedMatrix) -> float:
    return float((weight - dequantize(matrix)).square().sum() / weight.square().sum())


@pytest.mark.parametrize(
    ("text", "most_bits", "most", "least_squares"),
    [
        ("t1", 1.06, 0.335, 0.29),
        ("t2", 2.06, 0.080, 0.077),
        ("t3", 3.06, 0.0206, 0.0205),
        ("t4", 4.06, 0.0059, 0.0059),
    ],
)
def test_gaussian_weights_keep_what_was_promised(
    text: str, most_bits: float, most: float, least_squares: float
) -> None:
    """By the default, and by `mse`."""
    weight, choice = gaussian(64, 512), parse_choice(text)
    assert 8 * storage_bytes(choice, (64, 512)) / weight.numel() < most_bits
    for quantizer, limit in (("debiased", most), ("mse", least_squares)):
        assert relative_error(weight, rounder_of(quantizer)(weight, choice, "w")) < limit


def test_a_quarter_of_a_bit_more_leaves_less() -> None:
    weight = gaussian(16, 512)
    errors = [relative_error(weight, quantize_trellis(weight, parse_choice(text))) for text in RATES]
    assert all(more < 0.85 * less for less, more in itertools.pairwise(errors))


@pytest.mark.parametrize(("text", "columns"), [("t1", 14), ("t1.25", 11), ("t2.5", 5), ("t3.75", 4), ("t4", 3)])
def test_no_other_stream_costs_less(text: str, columns: int) -> None:
    """Of all streams of a short row, by trying them."""
    choice, drawn, levels = parse_choice(text), np.random.default_rng(0), encoder_levels()
    quarters = FORMAT.quarters(choice)
    roots, targets = drawn.uniform(0.5, 2, columns), drawn.normal(size=columns)
    outcomes, costs = np.empty(columns * 128, np.uint8), np.empty(2048, np.float32)
    stream, path = np.zeros(4, np.uint8), np.empty(columns, np.int32)
    last = cheapest(roots.astype(np.float32), targets.astype(np.float32), 0, 0, quarters, levels, outcomes, costs)
    trace(last, 0, quarters, 1024, outcomes, path)
    write(path, 0, quarters, stream)
    streams = np.arange(2 ** (columns * quarters // 4), dtype="<u4").view(np.uint8).reshape(-1, 4)
    shape = (len(streams), columns)
    every = QuantizedMatrix(choice, shape, torch.from_numpy(streams), torch.ones(shape[0], 1).half(), None)
    costs_of_all = np.square(targets - roots * dequantize(every).numpy()).sum(1)
    assert np.array_equal(streams[costs_of_all.argmin()], stream)
    assert np.allclose(np.square(targets - roots * levels[path]).sum(), costs_of_all.min())


@pytest.mark.parametrize("text", RATES)
def test_costs_of_bytes_find_nearly_as_good_a_path(text: str) -> None:
    """Where columns count alike, those of float32 are used if that is said of every column."""
    choice, drawn = parse_choice(text), torch.distributions.StudentT(4.0)
    torch.manual_seed(0)
    for weight in (gaussian(64, 512), drawn.sample((64, 512))):
        short, whole = (quantize_trellis(weight, choice, importance=one) for one in (None, np.ones(512, np.float32)))
        assert short.squared_error < 1.004 * whole.squared_error
        assert not torch.equal(short.codes, whole.codes)


@pytest.mark.parametrize("new_bits", [1, 2, 3, 4])
def test_a_column_of_bytes_takes_the_least_from_all_and_ends_at_255(new_bits: int) -> None:
    drawn, groups = np.random.default_rng(new_bits), 1024 >> new_bits
    for most in (40, 255):
        costs, misses = (drawn.integers(3, most, 1024, np.uint8, endpoint=True) for _ in range(2))
        after, outcomes = np.zeros(1024, np.uint8), np.zeros(128, np.uint8)
        least = run_column(new_bits, *(one.ctypes.data for one in (costs, after, misses, outcomes)))
        cheapest_way = costs.reshape(-1, groups).min(0)
        assert least == cheapest_way.min()
        wanted = np.repeat(cheapest_way.astype(int) - least, 1 << new_bits) + misses
        assert np.array_equal(after, np.minimum(wanted, 255))


@pytest.mark.parametrize("text", RATES)
def test_outliers_side_by_side_are_not_missed_by_more(text: str) -> None:
    """Where a path has to choose between two of them, the true squares count."""
    for size, count in ((100.0, 12), (20.0, 17)):
        weight = gaussian(8, 1024)
        weight[:, 300 : 300 + count] = size * weight[:, 300 : 300 + count].sign()
        importance = np.ones(1024, np.float32)
        short, whole = (quantize_trellis(weight, parse_choice(text), importance=one) for one in (None, importance))
        assert short.squared_error < 1.02 * whole.squared_error


@pytest.mark.parametrize("text", RATES)
def test_a_path_begins_at_the_first_state_however_dear_it_is(text: str) -> None:
    """Weights that are all as far from the levels as marks reach, in a row too short for every state to be reached."""
    for columns in (1, 2, 3, 5, 9, 11, 40):
        weight = torch.full((4, columns), 1e3)
        weight[1] *= -1
        weight[2, ::2] *= -1
        weight[3, :-1] = 0
        found = quantize_trellis(weight, parse_choice(text))
        restored = dequantize(decode(encode(found)))
        assert found.squared_error == pytest.approx(float((weight.double() - restored).square().sum()), rel=1e-5)


def test_important_columns_are_missed_less() -> None:
    weight, choice = gaussian(32, 256), parse_choice("t2")
    importance = np.where(np.arange(256) % 4 == 0, 8.0, 0.5).astype(np.float32)
    plain, weighed = quantize_trellis(weight, choice), quantize_trellis(weight, choice, importance=importance)
    misses = [(weight - dequantize(one)).square().mean(0)[::4].sum() for one in (plain, weighed)]
    assert misses[1] < 0.6 * misses[0]


def test_columns_that_count_for_nothing_are_not_made_noise() -> None:
    weight, choice = gaussian(8, 256), parse_choice("t2")
    importance = np.zeros(256, np.float32)
    importance[::2] = 1.0
    found = dequantize(quantize_trellis(weight, choice, importance=importance))
    assert (weight - found)[:, 1::2].square().mean() < 0.8


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_importance_that_says_nothing_is_refused_by_name(bad: float) -> None:
    importance = np.ones(64, np.float32)
    importance[7] = bad
    with pytest.raises(QuantizationError, match=r"layers\.9\.w: .*damaged"):
        quantize_trellis(gaussian(2, 64), parse_choice("t2"), "layers.9.w", importance)


def test_heavy_tails_get_a_wider_scale() -> None:
    weight = gaussian(16, 1024)
    weight[:, ::50] *= 5
    assert relative_error(weight, quantize_trellis(weight, parse_choice("t4"))) < 0.03


def test_rows_do_not_see_one_another_and_threads_change_nothing() -> None:
    weight, choice = gaussian(600, 512), parse_choice("t2.25")
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(quantize_trellis(weight, choice))
    finally:
        torch.set_num_threads(before)
    alone = quantize_trellis(weight[100:117], choice)
    assert torch.equal(found[0].codes, found[1].codes) and found[0].squared_error == found[1].squared_error
    assert torch.equal(found[0].codes[100:117], alone.codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 129)])
def test_error_is_that_of_what_is_stored(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, choice = gaussian(*shape).to(dtype), parse_choice("t2.75")
    found = quantize_trellis(weight, choice)
    restored = dequantize(decode(encode(found)))
    assert found.squared_error == pytest.approx(float((weight.double() - restored).square().sum()), rel=1e-5)


def test_zeros_stay_zeros_and_tiny_and_large_weights_keep_their_precision() -> None:
    choice = parse_choice("t3")
    assert not dequantize(quantize_trellis(torch.zeros(3, 64), choice)).any()
    mixed = torch.cat([torch.zeros(1, 256), gaussian(1, 256) * 1e-6, gaussian(1, 256) * 1e4])
    found = dequantize(quantize_trellis(mixed, choice))
    assert not found[0].any()
    for row in (1, 2):
        assert (mixed[row] - found[row]).square().sum() < 0.04 * mixed[row].square().sum()


@pytest.mark.parametrize("text", ["t1", "t2", "t4"])
@pytest.mark.parametrize("size", [20_000.0, 30_000.0, 65_504.0])
def test_scales_of_large_weights_end_where_float16_does(text: str, size: float) -> None:
    constant, signs = torch.full((2, 256), size), size * gaussian(2, 256).sign()
    weight = torch.cat([constant, signs, (size * gaussian(2, 256)).clamp(-65504, 65504)])
    found = quantize_trellis(weight, parse_choice(text))
    assert found.scales.isfinite().all()
    assert found.squared_error == pytest.approx(float((weight.double() - dequantize(found)).square().sum()), rel=1e-5)
    assert relative_error(weight, found) < 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_what_cannot_be_stored_is_refused_by_name(bad: float) -> None:
    weight = gaussian(4, 256)
    weight[3, 255] = bad
    with pytest.raises(QuantizationError, match=r"layers\.9\.w"):
        quantize_trellis(weight, parse_choice("t2"), "layers.9.w")


def test_every_quantizer_of_plain_groups_fills_trellis_codes() -> None:
    weight = gaussian(4, 128)
    for name in (name for name, one in QUANTIZERS.items() if one.plain):
        assert rounder_of(name)(weight, parse_choice("t2"), "w").choice == parse_choice("t2")


def test_errors_of_streams_are_measured_on_a_quarter_of_the_weights(tmp_path: Path) -> None:
    random_model("mixtral", hidden_size=128, intermediate_size=512).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    source = SourceMatrix(checkpoint, checkpoint.planned[0], "debiased")
    weights = source.matrix.parameters
    both = tuple(parse_choice(name) for name in ("2g128", "t2"))
    whole, part = source.errors(both, STREAM_SHARE * weights), source.errors(both, weights)
    assert whole.deviation == {} and part.deviation.keys() == {both[1]}
    assert part.expected[both[0]] == whole.expected[both[0]] and part.energy == whole.energy
    assert part.expected[both[1]] == pytest.approx(whole.expected[both[1]], rel=0.05)
