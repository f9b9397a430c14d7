"""What tokens that change their expert add to the KL divergence: the part that no gradient knows.

At a router some tokens lie so near the border between two experts that the least error takes them across, and what they
get then is another expert's output, however small the error was. How many cross grows with the error itself, not with
its square, so to the quadratic estimate Q comes a part that grows with its root and rules where Q is small:

    KL = Q + Σ κₗ·√Qₗ over the routers l, Qₗ the nats of all matrices before one.

κ is measured: some windows of a pass go through the model twice more beside it, with noise in every layer's input, once
as it comes, once with the noise's effect on the choice of experts taken back. The one's KL over the other's is what
swaps add.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alphaq.calibration.stream import HollowModel, Keywords, LayerTraffic
from alphaq.nouns.matrix import Role

NOISE = 0.04
"""Of a layer's input, relative to a token's: so little that a few tokens in a hundred are swapped."""
SHARE = 4  # of the windows, one in so many is enough


class SwapMeter:
    """Finds κ by windows that go along with a pass: after all of its windows, of the first `count` two more each.

    windows, count: of the pass, and of these. Attach it before the layers' own hooks.
    """

    def __init__(self, hollow: HollowModel, windows: int, count: int, seed: int = 0) -> None:
        self.windows, self.count, self.layers = windows, count, len(hollow.layers)
        self._swapped: dict[int, float] = {}
        self._sums = torch.zeros(2, dtype=torch.float64)
        self._positions = 0
        for number, name in enumerate(hollow.layers):
            self._add_noise(hollow.model.get_submodule(name), seed + number)

    @classmethod
    def of(cls, hollow: HollowModel, ids: Tensor) -> SwapMeter | None:
        """One for a pass with token ids [windows, length]; None for a dense model, which swaps nothing."""
        windows, length = ids.shape
        count = max(1, windows // SHARE)
        count += windows + 2 * count == length  # so that no tensor by positions is taken for one by windows
        return cls(hollow, windows, min(count, windows)) if hollow.planned_role is Role.EXPERT else None

    @property
    def total(self) -> int:
        """Windows that go through the model."""
        return self.windows + 2 * self.count

    def beside(self, ids: Tensor) -> Tensor:
        """Token ids [windows, length] of the pass, and those that go along."""
        return torch.cat([ids, ids[: self.count], ids[: self.count]])

    def _parts(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of values with all windows in their first dimension: the windows that the others are compared with, those
        with noise alone, and those with their experts taken back."""
        unit = len(values) // self.total
        own, free, held = self.count * unit, self.windows * unit, (self.windows + self.count) * unit
        return values[:own], values[free:held], values[held:]

    def _add_noise(self, layer: Any, seed: int) -> None:
        """To what a layer takes in of the windows that go along, to both groups the same."""

        def hook(module: Any, args: tuple[Any, ...], kwargs: Keywords) -> tuple[tuple[Any, ...], Keywords]:
            states = args[0] if args else kwargs["hidden_states"]
            with torch.no_grad():
                plain, *others = self._parts(states)
                random = torch.randn(plain.shape, generator=torch.Generator().manual_seed(seed))
                noise = NOISE * plain.square().mean(-1, keepdim=True).sqrt() * random
                noised = [one + noise for one in others]
            both = torch.cat([states[: -sum(map(len, noised))], *noised])
            return ((both, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": both})

        layer.register_forward_pre_hook(hook, with_kwargs=True)

    def routed(self, traffic: LayerTraffic) -> LayerTraffic:
        """The traffic with the experts of the last group as they are without noise."""
        experts, weights = map(self._parts, (traffic.experts, traffic.weights))
        sets = [one.sort(-1).values for one in experts]
        moved, other = ((one != sets[0]).any(-1) for one in sets[1:])
        self._swapped[traffic.layer] = float(moved.float().mean())
        held = [torch.where(other[:, None], own, noised) for own, _, noised in (experts, weights)]
        chosen, factors = (
            torch.cat([one[: -len(last)], last])
            for one, last in zip((traffic.experts, traffic.weights), held, strict=True)
        )
        return replace(traffic, experts=chosen, weights=factors)

    def compare(self, plain: Tensor, others: Tensor) -> None:
        """Take in logits at some positions: of the windows compared with, [count, positions, words], and of both groups
        that go along."""
        log_p = plain.log_softmax(-1)
        self._positions += log_p[..., 0].numel()
        for number, logits in enumerate(others.chunk(2)):
            log_q = logits.log_softmax(-1)
            self._sums[number] += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64)

    def costs(self) -> dict[int, float]:
        """κ of each layer with routed experts, in √nats per token; none where nothing was swapped."""
        free, held = (self._sums / max(1, self._positions)).tolist()
        total = sum(self._swapped.values())
        if not (total > 0 and held > 0 and math.isfinite(free)):
            return {}
        cost = max(0.0, free - held) / math.sqrt(held)
        # Each layer's noise is taken to have the same part of the KL, so that so much of it comes before a router.
        before = {layer: math.sqrt((layer + 1) / self.layers) for layer in self._swapped}
        return {layer: float(f"{cost * share / total / before[layer]:.4g}") for layer, share in self._swapped.items()}
