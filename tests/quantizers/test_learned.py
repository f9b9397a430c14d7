from collections.abc import Iterable

import pytest
import torch

from alphaq.errors import QuantizationError
from alphaq.formats.blocks import decode, dequantize, encode, restored_error
from alphaq.formats.packing import pack, unpack
from alphaq.formats.table import parse_choice, storage_bytes
from alphaq.nouns.choice import Choice
from alphaq.nouns.quantized import QuantizedMatrix
from alphaq.quantizers import learned
from alphaq.quantizers.debiased import quantize_debiased
from alphaq.quantizers.learned import quantize_learned
from alphaq.quantizers.learning import annealing
from alphaq.quantizers.learning.annealing import LearnedSettings

QUICK = LearnedSettings(steps=20, rounds=1, sweeps=3)
CHOICES = [Choice(1, 32), Choice(1, 32, True), Choice(2, 64), Choice(3, 32, True)]
ROWS, COLUMNS = 32, 128

every_choice = pytest.mark.parametrize("choice", CHOICES, ids=str)


def gaussian(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int = COLUMNS, inputs: int | None = None) -> torch.Tensor:
    """E[x·xᵀ] of inputs whose variances fall as 1/k along random directions."""
    directions, _ = torch.linalg.qr(gaussian(columns, columns, 1).double())
    spread = torch.arange(1, columns + 1).double().rsqrt()
    drawn = gaussian(inputs or 4 * columns, columns, 2).double() * spread @ directions.T
    return (drawn.T @ drawn / len(drawn)).float()


def row_errors(weight: torch.Tensor, matrix: QuantizedMatrix, hessian: torch.Tensor) -> torch.Tensor:
    """(w − ŵ)·H·(w − ŵ)ᵀ of what is stored, float64 [rows]."""
    miss = (weight.float() - dequantize(matrix)).double()
    full = torch.diag(hessian) if hessian.ndim == 1 else hessian
    return ((miss @ full.double()) * miss).sum(1)


def plain_gptq(weight: torch.Tensor, choice: Choice, hessian: torch.Tensor) -> QuantizedMatrix:
    """GPTQ (arXiv 2210.17323) on the default's grids in float64: no order, no blocks; asymmetric, two bits or more."""
    found = quantize_debiased(weight, choice)
    scale, zero = (part.double().repeat_interleave(choice.group_size, 1) for part in (found.scales, found.offsets))
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    for column in range(weight.shape[1]):
        code = (left[:, column] / scale[:, column] + zero[:, column]).round().clamp(0, 2**choice.bits - 1)
        miss = left[:, column] - scale[:, column] * (code - zero[:, column])
        left -= miss[:, None] / factor[column, column] * factor[column]
        codes[:, column] = code
    packed = torch.from_numpy(pack(codes.numpy(), choice.bits))
    return QuantizedMatrix(choice, found.shape, packed, found.scales, found.offsets)


def same(first: QuantizedMatrix, second: QuantizedMatrix) -> bool:
    return torch.equal(encode(first), encode(second)) and first.squared_error == second.squared_error


@every_choice
@pytest.mark.parametrize("moments", ["identity", "diagonal", "correlated"])
def test_no_row_is_worse_than_the_start(choice: Choice, moments: str) -> None:
    weight = gaussian()
    hessian = {
        "identity": None,
        "diagonal": gaussian(1, COLUMNS).square().reshape(-1),
        "correlated": correlated(),
    }[moments]
    judge = torch.ones(COLUMNS) if hessian is None else hessian
    found = quantize_learned(weight, choice, "x", hessian, settings=QUICK)
    errors, before = row_errors(weight, found, judge), row_errors(weight, quantize_debiased(weight, choice), judge)
    assert (errors <= before * (1 + 1e-6)).all()
    if moments != "identity":
        assert errors.sum() < before.sum() * 0.9


@every_choice
def test_what_is_stored_is_what_was_judged(choice: Choice) -> None:
    weight = gaussian().bfloat16()
    found = quantize_learned(weight, choice, "x", correlated(), settings=QUICK)
    assert found.squared_error == pytest.approx(restored_error(found, weight), rel=1e-5)
    assert found.scales.dtype == torch.float16
    assert (found.scales >= 0).all()
    assert torch.equal(dequantize(decode(encode(found))), dequantize(found))
    codes = unpack(found.codes.numpy(), choice.bits, COLUMNS)
    assert torch.equal(torch.from_numpy(pack(codes, choice.bits)), found.codes)


def test_correlated_inputs_take_more_than_half_off_the_error_of_rounding() -> None:
    weight, choice, hessian = gaussian(), Choice(2, 64), correlated()
    found = quantize_learned(weight, choice, "x", hessian)
    plain = row_errors(weight, quantize_debiased(weight, choice), hessian).sum()
    assert row_errors(weight, found, hessian).sum() < plain * 0.45


@pytest.mark.parametrize(("bits", "share"), [(2, 0.8), (3, 0.85)])
def test_learning_improves_on_gptq(bits: int, share: float) -> None:
    weight, choice, hessian = gaussian(), Choice(bits, 64), correlated()
    start = plain_gptq(weight, choice, hessian)
    found = quantize_learned(weight, choice, "x", hessian, start, settings=LearnedSettings(steps=60, rounds=2))
    before, after = row_errors(weight, start, hessian), row_errors(weight, found, hessian)
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < before.sum() * share


def test_learning_improves_on_its_polish_alone() -> None:
    weight, choice, hessian = gaussian(), Choice(2, 64), correlated()
    polished, found = (
        row_errors(weight, quantize_learned(weight, choice, "x", hessian, settings=settings), hessian).sum()
        for settings in (LearnedSettings(rounds=0), LearnedSettings(steps=60, rounds=1))
    )
    assert found < polished * 0.95


def test_polish_leaves_no_code_that_could_be_better() -> None:
    weight, choice, hessian = gaussian(8), Choice(2, 64), correlated()
    found = quantize_learned(weight, choice, "x", hessian, settings=LearnedSettings(rounds=0, sweeps=50))
    codes = torch.from_numpy(unpack(found.codes.numpy(), 2, COLUMNS)).int()
    step = found.scales.double().repeat_interleave(64, 1)
    pull = (dequantize(found) - weight).double() @ hessian.double()
    for by in (-1, 1):
        inside = (codes + by >= 0) & (codes + by <= 3)
        change = 2 * by * step * pull + (by * step).square() * hessian.diagonal().double()
        assert not ((change < -1e-6) & inside).any()


def test_search_weighs_columns_by_their_importance() -> None:
    weight, choice = gaussian(), Choice(3, 64)
    importance = gaussian(1, COLUMNS, 5).mul(2).exp().reshape(-1)
    found = quantize_learned(weight, choice, "x", importance)
    errors, before = (row_errors(weight, m, importance).sum() for m in (found, quantize_debiased(weight, choice)))
    assert errors < before * 0.8


def test_a_diagonal_matrix_gives_no_more_than_its_diagonal_could() -> None:
    weight, choice = gaussian(), Choice(3, 64)
    importance = gaussian(1, COLUMNS, 5).square().reshape(-1) + 0.1
    searched = quantize_learned(weight, choice, "x", importance)
    found = quantize_learned(weight, choice, "x", torch.diag(importance), searched, settings=QUICK)
    errors, before = (row_errors(weight, m, importance) for m in (found, searched))
    assert (errors <= before * (1 + 1e-6)).all()


@pytest.mark.parametrize("choice", [Choice(2, 64), Choice(1, 64)], ids=str)
def test_bytes_depend_on_the_name_but_not_on_threads_or_the_scale_of_the_moments(
    choice: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(learned.WEIGHTS_AT_ONCE, "cpu", 8 * COLUMNS)  # several parts
    weight, hessian = gaussian(), correlated()
    first = quantize_learned(weight, choice, "x", hessian, settings=QUICK)
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        again = quantize_learned(weight, choice, "x", hessian * 2.0**-40, settings=QUICK)
        assert torch.get_num_threads() == count
        assert same(first, again)
    torch.set_num_threads(threads)
    assert not same(first, quantize_learned(weight, choice, "y", hessian, settings=QUICK))


@pytest.mark.parametrize("moments", [None, "diagonal", "dense"])
@every_choice
def test_edge_groups_stay_exact_and_finite(choice: Choice, moments: str | None) -> None:
    hessian = {None: None, "diagonal": torch.ones(70), "dense": correlated(70)}[moments]
    zero = torch.zeros(3, 70)
    assert torch.equal(dequantize(quantize_learned(zero, choice, "x", hessian, settings=QUICK)), zero)
    tiny = gaussian(3, 70) * 1e-9
    assert torch.isfinite(dequantize(quantize_learned(tiny, choice, "x", hessian, settings=QUICK))).all()
    outlier = gaussian(3, 70)
    outlier[1, 7] = 6e4
    assert torch.isfinite(dequantize(quantize_learned(outlier, choice, "x", hessian, settings=QUICK))).all()
    if not choice.symmetric:
        constant = torch.full((3, 70), -0.75)
        assert torch.equal(dequantize(quantize_learned(constant, choice, "x", hessian, settings=QUICK)), constant)


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (5, 7), (2, 130)], ids=str)
@pytest.mark.parametrize("choice", [Choice(1, 32), Choice(2, 128), Choice(3, 32, True)], ids=str)
def test_small_and_ragged_shapes(choice: Choice, shape: tuple[int, int]) -> None:
    weight, hessian = gaussian(*shape), correlated(shape[1])
    found = quantize_learned(weight, choice, "x", hessian, settings=QUICK)
    assert found.scales.shape == (shape[0], choice.groups(shape[1]))
    assert len(encode(found)) == storage_bytes(choice, shape)
    errors, before = (row_errors(weight, m, hessian) for m in (found, quantize_debiased(weight, choice)))
    assert (errors <= before * (1 + 1e-6)).all()


@pytest.mark.parametrize("inputs", [1, 16])
def test_moments_of_few_inputs_and_of_dead_columns(inputs: int) -> None:
    weight, choice, hessian = gaussian(), Choice(2, 64), correlated(COLUMNS, inputs)
    hessian[:5], hessian[:, :5] = 0, 0
    found = quantize_learned(weight, choice, "x", hessian, settings=QUICK)
    errors, before = (row_errors(weight, m, hessian).sum() for m in (found, quantize_debiased(weight, choice)))
    assert errors < before * 0.5


def test_moments_of_zero_leave_the_start() -> None:
    weight, choice = gaussian(), Choice(2, 64)
    found = quantize_learned(weight, choice, "x", torch.zeros(COLUMNS, COLUMNS), settings=QUICK)
    assert torch.equal(encode(found), encode(quantize_debiased(weight, choice)))


def test_own_output_is_kept() -> None:
    choice, hessian = Choice(3, 64), correlated()
    once = quantize_learned(gaussian(), choice, "x", hessian, settings=QUICK)
    again = quantize_learned(dequantize(once), choice, "x", hessian, once, settings=QUICK)
    assert torch.equal(encode(again), encode(once))
    assert again.squared_error == 0


def test_free_offsets_of_other_engines_are_learned() -> None:
    """MLX's form: ŵ = s·q + β with bfloat16 numbers."""
    weight, choice, hessian = gaussian(), Choice(2, 64), correlated()
    plain = quantize_debiased(weight, choice)
    offsets = (-plain.scales.float() * plain.offsets).bfloat16()
    start = QuantizedMatrix(choice, plain.shape, plain.codes, plain.scales.bfloat16(), offsets)

    def errors(matrix: QuantizedMatrix) -> torch.Tensor:
        codes = torch.from_numpy(unpack(matrix.codes.numpy(), 2, COLUMNS)).float()
        scale, offset = (part.float().repeat_interleave(64, 1) for part in (matrix.scales, matrix.offsets))
        miss = (codes * scale + offset - weight).double()
        return ((miss @ hessian.double()) * miss).sum(1)

    found = quantize_learned(weight, choice, "x", hessian, start, settings=QUICK)
    assert (found.scales.dtype, found.offsets.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (errors(found) <= errors(start) * (1 + 1e-6)).all()
    assert errors(found).sum() < errors(start).sum() * 0.6


def test_rounds_end_when_they_gain_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    def counted(*arguments: object) -> object:
        rounds.append(1)
        return annealed(*arguments)

    annealed = annealing.annealed
    monkeypatch.setattr(annealing, "annealed", counted)
    for tolerance, expected in ((1.0, 1), (-1.0, 3)):
        rounds.clear()
        settings = LearnedSettings(steps=5, rounds=3, tolerance=tolerance)
        quantize_learned(gaussian(), Choice(2, 64), "x", correlated(), settings=settings)
        assert len(rounds) == expected


def test_progress_sees_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(learned.WEIGHTS_AT_ONCE, "cpu", 8 * COLUMNS)
    seen = []

    def shown(items: Iterable[object], total: int, label: str) -> Iterable[object]:
        for item in items:
            seen.append((total, label))
            yield item

    quantize_learned(gaussian(), Choice(2, 64), "layers.1", correlated(), settings=QUICK, progress=shown)
    assert seen == [(4, "layers.1")] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_weights_that_cannot_be_stored_are_refused_by_name(bad: float) -> None:
    weight = gaussian()
    weight[1, 2] = bad
    with pytest.raises(QuantizationError, match=r"layers\.9 holds NaN, infinite or too large weights"):
        quantize_learned(weight, Choice(2, 64), "layers.9", correlated())


@pytest.mark.parametrize(
    "hessian",
    [torch.ones(3), torch.ones(COLUMNS, 3), torch.full((COLUMNS,), float("nan")), correlated() / 0],
    ids=["short", "narrow", "nan", "infinite"],
)
def test_moments_that_are_none_are_refused_by_name(hessian: torch.Tensor) -> None:
    with pytest.raises(QuantizationError, match=r"layers\.9: second moments of shape .* are not finite numbers"):
        quantize_learned(gaussian(), Choice(2, 64), "layers.9", hessian)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(16), r"x: 16 has no one grid of codes to learn"),
        (parse_choice("2g64-slim"), r"x: 2g64-slim has no one grid"),
        (parse_choice("Q4_K"), r"x: Q4_K is rounded by llama\.cpp"),
    ],
    ids=str,
)
def test_choices_without_a_grid_are_refused(choice: Choice, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize_learned(gaussian(), choice, "x")


def test_a_start_of_another_form_is_refused() -> None:
    start = quantize_debiased(gaussian(), Choice(3, 64))
    with pytest.raises(QuantizationError, match=r"x: learning cannot begin from 3g64"):
        quantize_learned(gaussian(), Choice(2, 64), "x", start=start)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_nearly_the_same() -> None:
    weight, choice, hessian = gaussian(), Choice(2, 64), correlated()
    there, here = (quantize_learned(weight, choice, "x", hessian, device=device) for device in ("cuda", "cpu"))
    errors, expected = (row_errors(weight, m, hessian).sum() for m in (there, here))
    assert errors == pytest.approx(expected, rel=0.05)
