"""How far a model with some of its matrices rounded is from the model itself, of several roundings in one pass.

Each rounding has a group of windows of its own, beside one that sees the model as it is. All groups go through the
model together, layer by layer from disk (see stream.py). What counts is the mean KL of the words' chances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alphaq.calibration.head import Head
from alphaq.calibration.inputs import linears, stored_matrices
from alphaq.calibration.stream import HollowModel, LayerTraffic, run_experts, stream_forward
from alphaq.checkpoint.reader import Checkpoint
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import MatrixRef

HEAD_TOKENS = 128
Restore = Callable[[MatrixRef], Tensor]


def divergences(
    checkpoint: Checkpoint,
    ids: Tensor,
    choices: Sequence[Mapping[str, Choice]],
    rounding: Callable[[MatrixRef, Choice], Tensor],
    context: int = 1,
) -> list[float]:
    """Mean KL in nats per token of the model with its matrices at each set of choices, to the model itself.

    ids: int64 [windows, length], whose first `context` tokens are given. rounding: what stands in for a matrix at a
    choice, float32 [rows, columns]. Memory: as `stream_forward` for all groups' tokens, and one matrix restored.
    """
    hollow = HollowModel(checkpoint)
    groups: list[Restore] = [lambda matrix: checkpoint.read(matrix).float()]
    for one in choices:

        def restore(matrix: MatrixRef, own: Mapping[str, Choice] = one) -> Tensor:
            choice = own.get(matrix.name)
            return checkpoint.read(matrix).float() if choice is None else rounding(matrix, choice)

        groups.append(restore)
    module = hollow.base.get_input_embeddings()
    name = next(name for name, one in hollow.model.named_modules() if one is module)
    touched = {name for one in choices for name in one}
    for place, matrices in [*linears(hollow).items(), (name, stored_matrices(hollow, name))]:
        if any(matrix.name in touched for matrix in matrices):
            _split(hollow, place, matrices, groups)
    states = stream_forward(
        checkpoint, ids.repeat(len(groups), 1), lambda traffic: None, hollow, partial(_experts, groups=groups)
    )
    apart = states[:, context - 1 : -1].chunk(len(groups))
    head = Head(hollow)
    own = stored_matrices(hollow, head.filled)
    if not any(matrix.name in touched for matrix in own):
        return distances(hollow, apart)
    with head:
        weights = [nn.Parameter(torch.cat([restore(one) for one in own]), False) for restore in groups]

        def log_chances(group: int, some: Tensor) -> Tensor:
            head.module.weight = weights[group]
            return head(some).log_softmax(-1)

        return _distances(apart, log_chances)


def _split(hollow: HollowModel, name: str, matrices: Sequence[MatrixRef], groups: Sequence[Restore]) -> None:
    """Have a module compute each group's windows with that group's weight, unless it is stored in another order."""
    module: Any = hollow.model.get_submodule(name)
    forward = module.forward

    def run(values: Tensor, *args: Any, **kwargs: Any) -> Any:
        own = module.weight
        plain = torch.cat([groups[0](matrix) for matrix in matrices])
        if len(values) % len(groups) or not torch.equal(plain, own):
            return forward(values, *args, **kwargs)
        outputs = []
        for part, restore in zip(values.chunk(len(groups)), groups, strict=True):
            module.weight = nn.Parameter(torch.cat([restore(matrix) for matrix in matrices]), False)
            outputs.append(forward(part, *args, **kwargs))
        module.weight = own
        return torch.cat(outputs)

    module.forward = run


def _experts(hollow: HollowModel, traffic: LayerTraffic, groups: Sequence[Restore]) -> Tensor:
    """The experts' outputs, each group's tokens with that group's matrices, float32 [tokens, hidden]."""
    parts = zip(*(one.chunk(len(groups)) for one in (traffic.inputs, traffic.experts, traffic.weights)), strict=True)
    return torch.cat(
        [
            run_experts(hollow, replace(traffic, inputs=inputs, experts=experts, weights=weights), restore)
            for (inputs, experts, weights), restore in zip(parts, groups, strict=True)
        ]
    )


def distances(hollow: HollowModel, states: Sequence[Tensor]) -> list[float]:
    """Mean KL of each further group's final hidden states [windows, positions, hidden] to the first's."""
    with Head(hollow, by_rows=True) as head:
        return _distances(states, lambda group, some: head(some).log_softmax(-1))


def _distances(states: Sequence[Tensor], log_chances: Callable[[int, Tensor], Tensor]) -> list[float]:
    """The same by a group's number and some of its states, from which come log chances [windows, positions, words]."""
    sums = [0.0] * (len(states) - 1)
    step = max(1, HEAD_TOKENS // len(states[0]))
    for parts in zip(*(one.split(step, dim=1) for one in states), strict=True):
        log_p = log_chances(0, parts[0])
        for number, some in enumerate(parts[1:]):
            log_q = log_chances(number + 1, some)
            sums[number] += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
    positions = states[0].shape[0] * states[0].shape[1]
    return [total / positions for total in sums]
