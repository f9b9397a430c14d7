import math
from pathlib import Path

import pytest
import torch

from alphaq.errors import AlphaQError
from alphaq.evaluation.fidelity import WindowScore, evaluate_texts, read_texts, score_windows, summarize_windows
from alphaq.nouns.scoring import Scoring
from alphaq.runtime.loading import load_model
from conftest import DATA


@pytest.fixture(scope="module")
def loaded() -> tuple[object, object]:
    return load_model(DATA / "tiny", "float32", "cpu")


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    from alphaq.calibration.text import Text

    marked, plain = tmp_path / "a.txt", tmp_path / "b.txt"
    marked.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    plain.write_bytes(b"one\ntwo")
    assert read_texts([marked, plain]) == {"a": "one\ntwo", "b": "one\ntwo"}
    assert str(Text(marked)) == str(Text(plain))


def test_a_token_without_a_row_of_the_embedding_is_told(loaded: tuple) -> None:
    model, tokenizer = loaded

    def longer(text: str, **options: object) -> dict[str, torch.Tensor]:
        found = tokenizer(text, **options)
        if "return_tensors" not in options:
            return found
        return {"input_ids": torch.cat([found["input_ids"], torch.tensor([[len(tokenizer)]])], 1)}

    with pytest.raises(AlphaQError, match=r"Text 'x' has a token with the id 4096, .* 4096 rows.*resize_token_embed"):
        next(evaluate_texts(model, longer, {"x": "def main"}, Scoring()))


def test_perplexity_equals_the_model_s_own_loss(loaded: tuple) -> None:
    model, tokenizer = loaded
    text = (DATA / "texts" / "tech.txt").read_text()
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :300]
    with torch.inference_mode():
        own = float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]))
    ((name, found),) = evaluate_texts(model, tokenizer, {"tech": text}, Scoring(window=300, max_tokens=300))
    assert name == "tech"
    assert found.tokens == 299
    assert math.log(found.perplexity) == pytest.approx(own, abs=1e-4)


def test_a_model_agrees_with_itself(loaded: tuple) -> None:
    model, tokenizer = loaded
    ((_, found),) = evaluate_texts(model, tokenizer, {"x": "def main():\n    return 1\n"}, Scoring(), model)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top1 == 1
    assert found.ear == pytest.approx(1, abs=1e-5)


class Fixed(torch.nn.Module):
    """Always the same next-token distribution."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).log()
        self.device = torch.device("cpu")

    def forward(self, ids: torch.Tensor) -> object:
        class Output:
            logits = self.logits.expand(1, ids.shape[1], -1)

        return Output()


def test_distances_of_known_distributions() -> None:
    p, q = [0.5, 0.3, 0.2], [0.25, 0.25, 0.5]
    [score] = score_windows(Fixed(q), Fixed(p), torch.tensor([[0, 1, 2, 0, 1]]))
    assert score.tokens == 4
    assert score.kl / 4 == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-6)
    assert score.ear / 4 == pytest.approx(0.25 + 0.25 + 0.2, abs=1e-6)
    assert score.top1 == 0
    assert score.negative_log_likelihood == pytest.approx(-math.log(0.25 * 0.5 * 0.25 * 0.25), abs=1e-5)


def test_interval_covers_the_true_value_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(300):
        losses = 2 + torch.randn(40, generator=generator, dtype=torch.float64)
        scores = [WindowScore(100, float(100 * loss)) for loss in losses]
        low, high = summarize_windows(scores, False).perplexity_interval
        covered += low <= math.exp(2) <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_text_of_one_token_is_refused(loaded: tuple) -> None:
    with pytest.raises(AlphaQError, match="'empty' has fewer than two tokens"):
        list(evaluate_texts(*loaded, {"empty": ""}, Scoring()))


def test_unreadable_texts_are_named(tmp_path: Path) -> None:
    with pytest.raises(AlphaQError, match=r"absent\.txt"):
        read_texts([tmp_path / "absent.txt"])
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(AlphaQError, match="UTF-8"):
        read_texts([tmp_path / "b.txt"])


def test_texts_with_one_stem_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    paths = [tmp_path / "a.txt", tmp_path / "d" / "a.txt"]
    for path in paths:
        path.write_text(str(path))
    assert len(read_texts(paths)) == 2


def test_student_quantile_matches_scipy() -> None:
    from scipy.stats import t

    from alphaq.evaluation.fidelity import student_quantile

    for degrees in (4, 10, 30, 1000):
        assert student_quantile(degrees) == pytest.approx(t.ppf(0.975, degrees), rel=0.01)
