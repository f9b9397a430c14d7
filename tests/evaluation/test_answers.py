"""Likelihoods of answers from a model on disk: those of the model in memory, whatever goes through together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alphaq.evaluation import answers as module
from alphaq.evaluation.answers import Question, answers
from alphaq.evaluation.loading import pair_of, streamed_pair
from alphaq.nouns.scoring import Scoring

QUESTIONS: list[Question] = [
    ([5, 6, 7, 8, 9, 10, 11, 12], [20]),
    ([5, 6], [21, 22, 23]),
    ([40], [41, 42]),
    ([5, 6, 7], [21]),
]


@torch.no_grad()
def in_memory(model: torch.nn.Module, given: list[int], answer: list[int]) -> tuple[float, bool]:
    chances = model(torch.tensor([[*given, *answer]])).logits[0, len(given) - 1 : -1].log_softmax(-1)
    own = sum(float(chances[place, token]) for place, token in enumerate(answer))
    return own, chances.argmax(-1).tolist() == answer


def test_answers_are_as_likely_as_in_memory_whatever_goes_together(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, _ = pair_of(tiny, None, Scoring(stream=False))
    streamed, _, _ = streamed_pair(tiny, None)
    likeliest = int(whole(torch.tensor([[40, 41]])).logits[0, -1].argmax())
    questions = [*QUESTIONS, ([40, 41], [likeliest])]
    expected = [in_memory(whole, list(given), list(answer)) for given, answer in questions]
    for at_once, by_a_reading in ((100, 3), (2, 256)):
        monkeypatch.setattr(streamed, "windows_at_once", lambda length, at_once=at_once: at_once)
        monkeypatch.setattr(module, "POSITIONS_BY_A_READING", by_a_reading)
        found = answers(streamed, questions, 512)
        assert [chance for chance, _ in found] == pytest.approx([chance for chance, _ in expected], rel=1e-4)
        assert [first for _, first in found] == [first for _, first in expected]
    assert found[-1][1] and not all(first for _, first in found)


def test_of_a_long_question_the_beginning_is_left_out(tiny: Path) -> None:
    whole, _, _ = pair_of(tiny, None, Scoring(stream=False))
    streamed, _, _ = streamed_pair(tiny, None)
    [(chance, _)] = answers(streamed, [([5, 6, 7, 8, 9], [20, 21])], 4)
    assert chance == pytest.approx(in_memory(whole, [7, 8, 9], [20, 21])[0], rel=1e-4)
