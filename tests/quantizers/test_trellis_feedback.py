"""Trellis codes that make up for errors of earlier columns: what is published, and never more bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alphaq.errors import QuantizationError
from alphaq.formats.blocks import dequantize, encode
from alphaq.formats.table import parse_choice, storage_bytes
from alphaq.formats.trellis import FORMAT
from alphaq.quantizers.base import rounded_by_inputs
from alphaq.quantizers.factoring import DAMPING
from alphaq.quantizers.gptq import quantize_gptq
from alphaq.quantizers.trellis import encoder_levels, quantize_trellis
from alphaq.quantizers.trellis_feedback import AHEAD_BITS, BLOCK, STEP
from alphaq.quantizers.trellis_kernels import cheapest, trace, write
from moments import moments, objective, seeded


def as_published(row: np.ndarray, scale: float, quarters: int, hessian: torch.Tensor) -> np.ndarray:
    """The stream of one row by BlockLDLQ, uint8 [1000]; errors added up in float64 and over all columns at once."""
    columns, levels, ahead = len(row), encoder_levels(), 4 * AHEAD_BITS // quarters
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(columns)
    lower = torch.linalg.cholesky(damped.flip(0, 1)).numpy()
    upper, conditional = (lower / lower.diagonal())[::-1, ::-1], np.square(lower.diagonal()[::-1])
    steps = [slice(begin, min(begin + STEP, columns)) for begin in range(0, columns, STEP)]
    worth = np.concatenate([np.square(upper[step, step]) @ conditional[step] for step in steps])
    misses, stream, state = np.zeros(columns), np.zeros(1000, np.uint8), 0
    for step in steps:
        block_end = (step.start // BLOCK + 1) * BLOCK  # what lies behind it counts as its last column does
        seen = np.arange(step.start, min(step.stop + ahead, columns))
        roots = np.sqrt(worth[np.minimum(seen, block_end - 1)] / worth[step.start])
        targets = roots * (row[seen] + misses @ upper[:, seen]) / scale
        outcomes, costs = np.empty(len(seen) * 128, np.uint8), np.empty(2048, np.float32)
        path, own = np.empty(len(seen), np.int32), (step.start, state, quarters, levels, outcomes, costs)
        last = cheapest(roots.astype(np.float32), targets.astype(np.float32), *own)
        trace(last, step.start, quarters, 1024, outcomes, path)
        write(path[: step.stop - step.start], step.start, quarters, stream)
        misses[step] = row[step] - scale * levels[path[: step.stop - step.start]]
        state = path[step.stop - step.start - 1]
    return stream


@pytest.mark.parametrize(("text", "columns"), [("t1", 300), ("t2.25", 128), ("t3", 261), ("t4", 5)])
def test_streams_are_those_of_the_published_algorithm(text: str, columns: int) -> None:
    """Within blocks of columns and over their ends; where float32 finds another path, it is no worse."""
    choice, weight, hessian = parse_choice(text), seeded(8, columns), moments(columns)
    start = quantize_trellis(weight, choice)
    found = quantize_gptq(weight, choice, "matrix", hessian, start).codes.numpy()
    quarters, scales = FORMAT.quarters(choice), start.scales.double().reshape(-1).tolist()
    wanted = [
        as_published(row, scale, quarters, hessian) for row, scale in zip(weight.double().numpy(), scales, strict=True)
    ]
    same = (found == np.stack(wanted)[:, : found.shape[1]]).all(1)
    assert same.sum() >= 7, same


@pytest.mark.parametrize("text", ["t1", "t2.25", "t4"])
def test_outputs_move_less_in_the_same_bytes(text: str) -> None:
    choice, weight, hessian = parse_choice(text), seeded(32, 300), moments(300)
    plain, found = quantize_trellis(weight, choice), quantize_gptq(weight, choice, "matrix", hessian)
    weighed = quantize_trellis(weight, choice, importance=hessian.diagonal().numpy())
    errors = [objective(weight, dequantize(one), hessian) for one in (found, plain, weighed)]
    assert errors[0] < 0.9 * min(errors[1:]), errors
    assert encode(found).numel() == storage_bytes(choice, (32, 300))
    assert found.squared_error == pytest.approx(float((weight - dequantize(found)).double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("hessian", [None, torch.zeros(96, 96), torch.ones(96)], ids=type)
def test_where_inputs_say_nothing_the_nearest_codes_stay(hessian: torch.Tensor | None) -> None:
    weight, choice = seeded(20, 96), parse_choice("t2")
    nearest = quantize_trellis(weight, choice)
    found = quantize_gptq(weight, choice, "matrix", hessian, nearest)
    assert torch.equal(found.codes, nearest.codes) and torch.equal(found.scales, nearest.scales)


def test_moments_that_no_damping_mends_are_refused_by_name() -> None:
    with pytest.raises(QuantizationError, match=r"layers\.9\.w: .*positive definite"):
        quantize_gptq(seeded(4, 64), parse_choice("t2"), "layers.9.w", -moments(64))


def test_rows_of_zeros_and_any_number_of_threads() -> None:
    weight, hessian, choice = seeded(700, 256), moments(256), parse_choice("t2.75")
    weight[3] = 0
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(quantize_gptq(weight, choice, "matrix", hessian))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].codes, found[1].codes) and torch.equal(found[0].scales, found[1].scales)
    assert found[0].squared_error == found[1].squared_error
    assert not dequantize(found[0])[3].any() and dequantize(found[0])[4].any()


@pytest.mark.parametrize("quantizer", ["gptq", "learned"])
def test_both_that_look_at_inputs_feed_errors_back_also_for_coded_files(quantizer: str) -> None:
    weight, hessian, choice = seeded(16, 128), moments(128), parse_choice("t2")
    fed = quantize_gptq(weight, choice, "w", hessian, quantize_trellis(weight, choice))
    for coded in (False, quantizer == "gptq"):
        given = dict(quantizer=quantizer, plain="debiased", moments=hessian, coded=coded)
        assert torch.equal(rounded_by_inputs(weight, choice, "w", **given).codes, fed.codes)
    alone = rounded_by_inputs(weight, choice, "w", quantizer=quantizer, plain="debiased", moments=hessian.diagonal())
    weighed = quantize_trellis(weight, choice, importance=hessian.diagonal().numpy())
    assert torch.equal(alone.codes, weighed.codes)
