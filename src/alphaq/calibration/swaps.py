"""What tokens that change their expert add to the KL divergence: the part that no gradient knows.

At a router some tokens lie so near the border between two experts that the least error takes them across, and what they
get then is another expert's output, however small the error was. How many cross grows with the error itself, not with
its square, so to the quadratic estimate Q comes a part that grows with its root and rules where Q is small:

    KL = Q + Σ κₗ·√Qₗ over the routers l, Qₗ the nats of all matrices before one.

κ is measured: every layer's input gets noise, in one group of windows as it comes, in another with the noise's effect
on the choice of experts taken back. The one group's KL over the other's is what swaps add.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alphaq.calibration.divergence import distances
from alphaq.calibration.stream import HollowModel, Keywords, LayerTraffic, run_experts, stream_forward
from alphaq.checkpoint.reader import Checkpoint
from alphaq.nouns.matrix import Role

NOISE = 0.04
"""Of a layer's input, relative to a token's: so little that a few tokens in a hundred are swapped."""
SHARE = 4  # of the windows, one in so many is enough


def swap_costs(checkpoint: Checkpoint, ids: Tensor, context: int = 1, seed: int = 0) -> dict[int, float]:
    """κ of each layer with routed experts, in √nats per token, by some of the windows [windows, length]; none
    of a dense model.

    Memory and errors as `stream_forward` of three times as many tokens.
    """
    if checkpoint.planned_role is not Role.EXPERT:
        return {}
    hollow, swapped = HollowModel(checkpoint), dict[int, float]()
    for number, name in enumerate(hollow.layers):
        _add_noise(hollow.model.get_submodule(name), seed + number)

    def experts_of(hollow: HollowModel, traffic: LayerTraffic) -> Tensor:
        other, traffic = _taken_back(traffic)
        swapped[traffic.layer] = float(other.float().mean())
        return run_experts(hollow, traffic)

    own = ids[: max(1, len(ids) // SHARE)].repeat(3, 1)
    states = stream_forward(checkpoint, own, lambda traffic: None, hollow, experts_of)
    free, held = distances(hollow, states[:, context - 1 : -1].chunk(3))
    total = sum(swapped.values())
    if not (total > 0 and held > 0 and math.isfinite(free)):
        return {}
    cost, layers = max(0.0, free - held) / math.sqrt(held), len(hollow.layers)
    # Each layer's noise is taken to have the same part of the KL, so that so much of it comes before a router.
    before = {layer: math.sqrt((layer + 1) / layers) for layer in swapped}
    return {layer: float(f"{cost * share / total / before[layer]:.4g}") for layer, share in swapped.items()}


def _add_noise(layer: Any, seed: int) -> None:
    """To what a layer takes in of the last two of three groups of windows, to both the same."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: Keywords) -> tuple[tuple[Any, ...], Keywords]:
        states = args[0] if args else kwargs["hidden_states"]
        plain, *others = states.chunk(3)
        random = torch.randn(plain.shape, generator=torch.Generator().manual_seed(seed))
        noise = NOISE * plain.square().mean(-1, keepdim=True).sqrt() * random
        noised = torch.cat([plain, *(one + noise for one in others)])
        return ((noised, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": noised})

    layer.register_forward_pre_hook(hook, with_kwargs=True)


def _taken_back(traffic: LayerTraffic) -> tuple[Tensor, LayerTraffic]:
    """Of three groups of tokens: which of the second have other experts than the first, bool [tokens], and the traffic
    with those of the third as the first has them."""
    chosen, weights = traffic.experts.chunk(3), traffic.weights.chunk(3)
    sets = [experts.sort(-1).values for experts in chosen]
    moved, other = ((one != sets[0]).any(-1) for one in sets[1:])
    held = torch.where(other[:, None], chosen[0], chosen[2]), torch.where(other[:, None], weights[0], weights[2])
    both = torch.cat([*chosen[:2], held[0]]), torch.cat([*weights[:2], held[1]])
    return moved, replace(traffic, experts=both[0], weights=both[1])
