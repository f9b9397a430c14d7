from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from alphaq.nouns.matrix import MatrixRef, Role
from alphaq.research import aimer, kurtosis, outlier, stable_rank
from alphaq.research.statistics import WeightStatistics
from alphaq.sensitivity import structure

Score = Callable[[Sequence[MatrixRef], Sequence[WeightStatistics]], np.ndarray]

GAUSSIAN = WeightStatistics(0.8, 1.0, 3.0, 4.0, 100.0)
SCORES: dict[str, Score] = {
    "kurtosis": kurtosis.score,
    "outlier": outlier.score,
    "stable rank": stable_rank.score,
    "aimer": aimer.score,
    "structure": lambda matrices, _: structure.score(matrices),
}


def matrix(
    layer: int | None = 0, expert: int | None = 0, projection: str = "up", shape: tuple[int, int] = (400, 900)
) -> MatrixRef:
    name = f"{layer}.{expert}.{projection}"
    return MatrixRef(name, shape, "BF16", layer, expert, projection, Role.EXPERT, name)


MODEL = [
    matrix(layer, expert, projection, (900, 400) if projection == "down" else (400, 900))
    for layer in range(3)
    for expert in range(4)
    for projection in ("gate", "up", "down")
]


def some_statistics(seed: int = 0) -> list[WeightStatistics]:
    draw = np.random.default_rng(seed).random((len(MODEL), 4))
    return [WeightStatistics(0.5 + 0.4 * a, 1.0, 3 + 9 * b, 4 + 20 * c, 1 + 90 * d) for a, b, c, d in draw]


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_scores_are_positive_with_median_one(score: Score) -> None:
    found = score(MODEL, some_statistics())
    assert found.dtype == np.float64
    assert found.shape == (len(MODEL),)
    assert (found > 0).all()
    assert np.median(found) == pytest.approx(1)


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_scores_follow_their_matrices(score: Score) -> None:
    statistics = some_statistics()
    order = np.random.default_rng(1).permutation(len(MODEL))
    found = score([MODEL[i] for i in order], [statistics[i] for i in order])
    assert np.allclose(found, score(MODEL, statistics)[order])


@pytest.mark.parametrize("score", [SCORES[name] for name in SCORES if name != "structure"])
def test_missing_statistics_are_noticed(score: Score) -> None:
    with pytest.raises(ValueError, match="zip"):
        score(MODEL, some_statistics()[:-1])


@pytest.mark.parametrize(
    ("score", "sensitive"),
    [
        (kurtosis.score, replace(GAUSSIAN, kurtosis=9.0)),
        (outlier.score, replace(GAUSSIAN, outlier=40.0)),
        (stable_rank.score, replace(GAUSSIAN, stable_rank=10.0)),
        (aimer.score, replace(GAUSSIAN, mean_absolute=0.6)),
    ],
    ids=["heavier tails", "larger outliers", "energy in fewer directions", "lower mean over root mean square"],
)
def test_sensitive_matrix_scores_higher(score: Score, sensitive: WeightStatistics) -> None:
    matrices = [matrix(expert=expert) for expert in range(3)]
    found = score(matrices, [GAUSSIAN, sensitive, GAUSSIAN])
    assert found[1] > 1.2
    assert found[[0, 2]] == pytest.approx(1)


def test_kurtosis_and_outlier_scores_are_proportional_to_their_statistic() -> None:
    statistics = [replace(GAUSSIAN, kurtosis=value, outlier=10 * value) for value in (3.0, 6.0, 12.0)]
    matrices = [matrix(expert=expert) for expert in range(3)]
    assert kurtosis.score(matrices, statistics) == pytest.approx([0.5, 1, 2])
    assert outlier.score(matrices, statistics) == pytest.approx([0.5, 1, 2])


def test_random_matrices_of_any_shape_score_equally_by_stable_rank() -> None:
    shapes = [(400, 900), (900, 400), (625, 625), (100, 2500)]
    statistics = [replace(GAUSSIAN, stable_rank=m * n / (m**0.5 + n**0.5) ** 2) for m, n in shapes]
    assert stable_rank.score([matrix(shape=shape) for shape in shapes], statistics) == pytest.approx(1)


def test_aimer_pools_the_matrices_of_an_expert() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_t(3 + ref.expert, ref.shape) * (1 + len(ref.projection)) for ref in MODEL[:12]]
    statistics = [
        replace(GAUSSIAN, mean_absolute=np.abs(w).mean(), root_mean_square=np.sqrt((w**2).mean())) for w in weights
    ]
    found = aimer.score(MODEL[:12], statistics)
    pooled = [np.concatenate([w.ravel() for w in weights[at : at + 3]]) for at in range(0, 12, 3)]
    inverse = np.repeat([np.sqrt((w**2).mean()) / np.abs(w).mean() for w in pooled], 3)
    assert found == pytest.approx(inverse / np.median(inverse))


def test_aimer_keeps_experts_of_different_layers_apart() -> None:
    matrices = [matrix(0, 5), matrix(1, 5), matrix(None, None, "a"), matrix(None, None, "b")]
    statistics = [replace(GAUSSIAN, mean_absolute=value) for value in (0.8, 0.4, 0.8, 0.4)]
    found = aimer.score(matrices, statistics)
    assert found[1] == pytest.approx(2 * found[0])
    assert found[3] == pytest.approx(2 * found[2])


def test_expert_of_zeros_is_the_least_important_to_aimer() -> None:
    zeros = WeightStatistics(0.0, 0.0, 3.0, 1.0, 1.0)
    found = aimer.score([matrix(expert=expert) for expert in range(3)], [GAUSSIAN, zeros, GAUSSIAN])
    assert np.isfinite(found).all()
    assert found.argmin() == 1


def test_structure_orders_by_layer_and_then_down_first() -> None:
    found = dict(zip([ref.name for ref in MODEL], structure.score(MODEL), strict=True))
    for expert in range(4):
        places = [found[f"{layer}.{expert}.{projection}"] for layer in range(3) for projection in ("down", "up")]
        assert (np.diff(places) < 0).all()
        assert found[f"0.{expert}.gate"] == found["0.0.up"]


def test_structure_puts_a_matrix_of_no_layer_last() -> None:
    found = structure.score([matrix(0), matrix(None, None), matrix(47, 3, "down")])
    assert found.argmin() == 1
