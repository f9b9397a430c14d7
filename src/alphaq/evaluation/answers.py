"""How likely a model that is run layer by layer finds answers: what lm-eval asks of most tasks.

Each pass reads the whole model, so as many questions go through at once as there is room for. As in lm-eval itself,
shorter ones are filled up at their end, which a model that only looks back does not see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from alphaq.errors import AlphaQError
from alphaq.evaluation.fidelity import POSITIONS_BY_A_READING
from alphaq.evaluation.streamed import StreamedModel

REPLACED = ("_loglikelihood_tokens", "generate_until")
"""What of lm-eval's class for models is replaced; the first is not public, so that another version may lack it."""
Question = tuple[Sequence[int], Sequence[int]]
"""Token ids of what is given, and of the answer; neither is empty."""


@torch.no_grad()
def answers(model: StreamedModel, questions: Sequence[Question], longest: int) -> list[tuple[float, bool]]:
    """Of each answer ln p after what is given, and whether it is the likeliest, token by token.

    longest: tokens that the model reads; of longer questions the beginning is left out.
    """
    inputs = [[*given, *answer][-longest - 1 : -1] for given, answer in questions]
    found: dict[int, tuple[float, bool]] = {}
    for group in _groups(model, inputs):
        ids = torch.zeros(len(group), len(inputs[group[0]]), dtype=torch.int64)
        for place, number in enumerate(group):
            ids[place, : len(inputs[number])] = torch.tensor(inputs[number])
        came = [list(questions[number][1])[-len(inputs[number]) :] for number in group]
        ends = [len(inputs[number]) for number in group]
        chances, likeliest = _at_ends(model(ids).logits, ends, came)
        sizes = list(map(len, came))
        for number, own, first in zip(group, chances.split(sizes), likeliest.split(sizes), strict=True):
            found[number] = float(own.sum(dtype=torch.float64)), bool(first.all())
    return [found[number] for number in range(len(questions))]


def _groups(model: StreamedModel, inputs: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Numbers of inputs that go through the model together, the longest first."""
    left = sorted(range(len(inputs)), key=lambda number: -len(inputs[number]))
    while left:
        most = model.windows_at_once(len(inputs[left[0]]))
        yield left[:most]
        left = left[most:]


def _at_ends(logits: Any, ends: Sequence[int], came: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """ln p of every token that came at the end of its window, float32 [tokens], and whether it is the likeliest.

    logits: as `StreamedLogits`. ends: of each window, how many tokens it has. The head is read once for many tokens.
    """
    windows = torch.tensor([place for place, tokens in enumerate(came) for _ in tokens])
    positions = torch.tensor([end - len(one) + k for end, one in zip(ends, came, strict=True) for k in range(len(one))])
    tokens = torch.tensor([token for one in came for token in one])
    chances, likeliest = torch.zeros(len(tokens)), torch.zeros(len(tokens), dtype=torch.bool)
    for start in range(0, len(tokens), POSITIONS_BY_A_READING):
        part = slice(start, start + POSITIONS_BY_A_READING)
        values = logits.at(windows[part], positions[part]).log_softmax(-1)
        chances[part] = values.gather(1, tokens[part, None])[:, 0]
        likeliest[part] = values.argmax(-1) == tokens[part]
    return chances, likeliest


def lm_eval_model(model: StreamedModel, tokenizer: Any) -> Any:
    """The model as lm-eval wants it, with lm-eval's own way to make tokens; tasks that generate text are refused.

    Raises AlphaQError for a version of lm-eval that asks models in another way.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if missing := [name for name in REPLACED if not hasattr(HFLM, name)]:
        raise AlphaQError(
            f"lm-eval {lm_eval.__version__} has no HFLM.{missing[0]}, by which it asks a model that is run layer by "
            "layer. Install lm-eval 0.4.13, or add --no-stream where the model fits into memory."
        )

    class LayerByLayer(HFLM):  # made here, as lm-eval is an extra
        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return answers(model, [(given, answer) for _, given, answer in requests], self.max_length)

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            raise AlphaQError(
                f"Tasks that generate text need {model.name} in memory, and it is run layer by layer. Choose tasks "
                "with answers to choose from, or add --no-stream where it fits."
            )

    return LayerByLayer(pretrained=model, tokenizer=tokenizer, batch_size=1 << 20)  # all that are asked at once
