"""What a layer loses without some of its experts, in nats: measured, not assumed.

Tokens of a dropped expert go to the next best. To first order that changes the log chance of a drawn token by

    δₜ = gₜᵀ·(y'ₜ − yₜ),   yₜ = Σ w·f(xₜ) over a token's experts,

with g the gradient at the output of the layer's experts and y' what they give with the new routing. The KL divergence
per token is ½·E[δ²]: the Fisher information of the layer's output, on the same tokens as that of the weights
(fisher.py). All f(x) that a token may be sent to enter δ by the numbers gₜᵀ·f(xₜ) alone, so that any set of experts can
be judged from one pass.

Experts stand in for each other: of two that are alike one may go, not both. So they are taken out one after the other,
always the one without which the layer loses least, and each is judged with all before it gone.

What few tokens tell is not relied upon. What counts is a bound: the sum, two standard errors of it, and what three
tokens would lose that an expert might have had and was not seen with (of an event never seen in n trials the rate is
below 3/n with 95 %).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alphaq.calibration.backward import stream_scores
from alphaq.calibration.products import Room
from alphaq.calibration.rerouting import Router
from alphaq.calibration.stream import HollowModel, LayerTraffic, traffic_of
from alphaq.checkpoint.families.routing import expert_groups, fewest_experts
from alphaq.checkpoint.pruned import require_prunable
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import PlanError, StatsError

DROPS_VERSION = 2  # raise it whenever the same windows would give other numbers
STANDARD_ERRORS = 2.0
UNSEEN_TOKENS = 3.0
MOST_SHARE = 0.5
"""Of a layer's experts that may be dropped. With more gone, what is lost is no longer small, and seldom foretold."""
MOST_ROWS = 1 << 16  # that a router is asked for at once


@dataclass(frozen=True)
class LayerDrops:
    """Experts of one layer in the order in which it loses least by dropping them.

    order: their numbers. losses: nats per token without the first, the first two, …; bounds: what they are below with
    95 %. tokens: that each of `order` had in the pass.
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]
    bounds: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Drops:
    """Of every layer with routed experts. groups: of experts that a router chooses among; a layer's order takes as many
    of each."""

    layers: Mapping[int, LayerDrops] = field(default_factory=dict)
    groups: int = 1

    @property
    def most(self) -> int:
        """How many experts every layer could lose."""
        return min((len(one.order) for one in self.layers.values()), default=0)

    def evenly(self, count: int) -> dict[int, int]:
        """So many in every layer."""
        return dict.fromkeys(self.layers, count)

    def first(self, counts: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
        """The first so many experts of each layer's order, of layers that lose any."""
        return {layer: self.layers[layer].order[:count] for layer, count in counts.items() if count}

    def loss(self, counts: Mapping[int, int]) -> float:
        """Nats per token that dropping so many in each layer costs."""
        return sum(self.layers[layer].losses[count - 1] for layer, count in counts.items() if count)

    def bounds(self, counts: Mapping[int, int]) -> dict[int, float]:
        """Nats per token, with 95 %, that dropping so many costs at most, by layer."""
        return {layer: self.layers[layer].bounds[count - 1] for layer, count in counts.items() if count}

    def bound(self, counts: Mapping[int, int]) -> float:
        """The same in all."""
        return sum(self.bounds(counts).values())

    def to_json(self) -> str:
        """One line."""
        rows = {layer: [one.order, one.losses, one.bounds, one.tokens] for layer, one in self.layers.items()}
        return json.dumps({"version": DROPS_VERSION, "groups": self.groups, "layers": list(rows.items())})

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "drops") -> Drops:
        """The inverse of `to_json`. Raises StatsError naming `where` if the text is anything else."""
        try:
            data = json.loads(text)
            if data["version"] != DROPS_VERSION:
                raise ValueError(f"version {data['version']} is not {DROPS_VERSION}")
            layers = {}
            for layer, (order, losses, bounds, tokens) in data["layers"]:
                numbers = tuple(map(int, order)), tuple(map(float, losses)), tuple(map(float, bounds))
                layers[int(layer)] = LayerDrops(*numbers, tuple(map(int, tokens)))
            return cls(layers, int(data["groups"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StatsError(f"{where} holds no losses of experts ({error!r}). Delete it and plan again.") from error


def require_rankable(checkpoint: Checkpoint) -> None:
    """Raise PlanError for a model whose experts cannot be taken out, or their losses not be foretold."""
    require_prunable(checkpoint)
    if why := checkpoint.architecture.not_ranked:
        raise PlanError(
            f"What {checkpoint.name} would lose without some of its experts is not known: {why}. Plan without --drop."
        )


def gather_drops(checkpoint: Checkpoint, ids: Tensor, context: int = 1, share: float = MOST_SHARE) -> Drops:
    """Run token ids [windows, length], whose first `context` are given, through the model and back.

    share: of a layer's experts, up to which they are taken out.
    Memory: as `stream_scores`, and of a layer a number for each token and expert. Every expert runs on every token.
    Raises as `stream_scores` does, and PassError where a router cannot be asked.
    """
    found: dict[int, LayerDrops] = {}
    windows, length = ids.shape
    predicted = windows * (length - context + 1)
    groups = expert_groups(checkpoint.architecture, checkpoint.config)

    fewest = fewest_experts(checkpoint.architecture, checkpoint.config)

    def keep(layer: int, routed: _Routed) -> None:
        found[layer] = _eliminated(
            routed, predicted, groups, max(fewest, math.ceil(routed.values.shape[1] * (1 - share)))
        )

    def watch(hollow: HollowModel) -> None:
        for layer in hollow.experts:
            _watch(hollow, layer, keep)

    stream_scores(checkpoint, ids, lambda seen: None, context, watch=watch, swaps=False)
    return Drops(dict(sorted(found.items())), groups)


@dataclass(frozen=True, eq=False)
class _Routed:
    """A layer's tokens. values: gᵀ·f(x), float32 [tokens, experts]. experts, weights: [tokens, top_k], as they are.
    ask: the same of some tokens with experts banned."""

    values: Tensor
    experts: Tensor
    weights: Tensor
    ask: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def put_out(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """gᵀ·y of some tokens [n] that go to these experts [n, top_k], float32 [n]."""
        known = experts < self.values.shape[1]  # what is beyond has no weights
        values = self.values[tokens].gather(1, experts.clamp(max=self.values.shape[1] - 1))
        return (values * weights * known).sum(1)


def _watch(hollow: HollowModel, layer: int, found: Callable[[int, _Routed], None]) -> None:
    """Have a layer tell of its experts when its gradient comes by."""
    router, module = Router(hollow, layer), hollow.model.get_submodule(hollow.experts[layer])
    forward: Any = module.forward

    def run(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = forward(states, *args, **kwargs)
        if output.requires_grad:
            output.register_hook(partial(tell, traffic_of(hollow, layer, (states, *args), kwargs)))
        return output

    @torch.no_grad()
    def tell(traffic: LayerTraffic, gradient: Tensor) -> None:
        values = _values(hollow, traffic, gradient.float().flatten(0, -2))
        found(layer, _Routed(values, traffic.experts, traffic.weights.detach(), router.ask))
        router.forget()

    module.forward = run


def _values(hollow: HollowModel, traffic: LayerTraffic, gradient: Tensor) -> Tensor:
    """gᵀ·f(x) of every token and expert, float32 [tokens, experts]."""
    room, form, inputs = Room(hollow.checkpoint), traffic.form, traffic.inputs.detach()
    experts = hollow.matrices[traffic.layer]
    values = torch.empty(len(inputs), len(experts))
    for number, matrices in experts.items():
        hidden = form.hidden([inputs @ room.read(matrices[part]).T for part in form.first], number)
        values[:, number] = (form.output(hidden @ room.read(matrices["down"]).T, number) * gradient).sum(1)
    return values


def _eliminated(routed: _Routed, predicted: int, groups: int, fewest: int) -> LayerDrops:
    """A layer's experts one after the other, as long as so many stay, and more than a token goes to."""
    count, least = routed.values.shape[1], max(fewest, routed.experts.shape[1] + 1)
    state = _State(routed, predicted)
    order: list[int] = []
    losses: list[float] = []
    bounds: list[float] = []
    while count - len(order) - groups >= least or (len(order) % groups and order):
        held = [sum(expert * groups // count == group for expert in order) for group in range(groups)]
        open_to = [one for one in range(count) if one not in order and held[one * groups // count] == min(held)]
        expert = state.drop(open_to)
        order.append(expert)
        losses.append(state.loss())
        bounds.append(state.bound())
    seen = torch.bincount(routed.experts.clamp(max=count).flatten(), minlength=count + 1)
    return LayerDrops(tuple(order), tuple(losses), tuple(bounds), tuple(int(seen[expert]) for expert in order))


@dataclass(frozen=True, eq=False)
class _Moved:
    """Tokens [n] whose output changes without an expert. went: bool [n], whether they went to it. change: δ [n].
    experts, weights: where they go now [n, top_k]."""

    tokens: Tensor
    went: Tensor
    change: Tensor
    experts: Tensor
    weights: Tensor


def _batches(experts: Sequence[int], tokens: int) -> list[Sequence[int]]:
    """Experts that are judged at once, so that no more than `MOST_ROWS` are routed."""
    size = max(1, MOST_ROWS // tokens)
    return [experts[first : first + size] for first in range(0, len(experts), size)]


class _State:
    """A layer on its way: where its tokens go now, and how much that changes."""

    def __init__(self, routed: _Routed, predicted: int) -> None:
        self.routed, self.predicted = routed, predicted
        tokens, count = routed.values.shape
        self.experts, self.weights = routed.experts.clone(), routed.weights.clone()
        self.before = routed.put_out(torch.arange(tokens), self.experts, self.weights)
        self.change = torch.zeros(tokens, dtype=torch.float64)
        self.banned = torch.zeros(count, dtype=torch.bool)
        self.typical = 0.0
        self.everywhere = self._is_everywhere()

    def _is_everywhere(self) -> bool:
        """Whether a banned expert changes what tokens get that did not go to it, as where weights are the chances among
        all experts."""
        used = torch.bincount(self.experts.flatten(), minlength=len(self.banned))[: len(self.banned)]
        most = int(used.argmax())
        others = torch.where((self.experts != most).all(1))[0]
        if not len(others):
            return True
        banned = self.banned.expand(len(others), -1).clone()
        banned[:, most] = True
        experts, weights = self.routed.ask(others, banned)
        same = experts.sort(1).values.equal(self.experts[others].sort(1).values)
        return not (same and torch.allclose(weights.sum(1), self.weights[others].sum(1).to(weights.dtype), rtol=1e-4))

    def drop(self, open_to: Sequence[int]) -> int:
        """Take out the expert of these whose loss has the least bound; its number."""
        squares, fourths = self.change.square(), self.change.square().square()
        found: dict[int, tuple[float, _Moved]] = {}
        unlike, lost = 0, 0.0
        for some in _batches(open_to, len(self.experts) if self.everywhere else 1):
            moved = self._without(some)
            for expert, one in moved.items():
                after = one.change.square()
                own = float(squares.sum() + (after - squares[one.tokens]).sum())
                fourth = float(fourths.sum() + (after.square() - fourths[one.tokens]).sum())
                unlike, lost = unlike + int(one.went.sum()), lost + float(after[one.went].sum())
                found[expert] = own + STANDARD_ERRORS * math.sqrt(max(fourth, 0.0)), one
        if not self.banned.any():  # what a token loses whose expert is gone, on average
            self.typical = lost / max(unlike, 1)
        best = min(open_to, key=lambda one: (found[one][0], one))
        chosen = found[best][1]
        self.change[chosen.tokens] = chosen.change
        self.experts[chosen.tokens], self.weights[chosen.tokens] = chosen.experts, chosen.weights
        self.banned[best] = True
        return best

    def _without(self, some: Sequence[int]) -> dict[int, _Moved]:
        """What becomes of tokens without each of some experts: of those that go to it, or of all."""
        uses = [(self.experts == expert).any(1) for expert in some]
        tokens = [torch.arange(len(self.experts)) if self.everywhere else torch.where(use)[0] for use in uses]
        counts = [len(one) for one in tokens]
        banned = self.banned.expand(sum(counts), -1).clone()
        banned[torch.arange(len(banned)), torch.repeat_interleave(torch.tensor(some), torch.tensor(counts))] = True
        every = torch.cat(tokens)
        new = self.routed.ask(every, banned) if len(every) else (self.experts[every], self.weights[every])
        change = (self.routed.put_out(every, *new) - self.before[every]).double()
        experts, weights = new[0], new[1].to(self.weights.dtype)
        parts = zip(some, tokens, uses, change.split(counts), experts.split(counts), weights.split(counts), strict=True)
        return {one: _Moved(at, use[at], delta, *routing) for one, at, use, delta, *routing in parts}

    def loss(self) -> float:
        """Nats per token."""
        return float(f"{0.5 * float(self.change.square().sum()) / self.predicted:.6g}")

    def bound(self) -> float:
        """What it is below."""
        squares = self.change.square()
        unseen = UNSEEN_TOKENS * self.typical * int(self.banned.sum())
        whole = float(squares.sum()) + STANDARD_ERRORS * math.sqrt(float(squares.square().sum())) + unseen
        return float(f"{0.5 * whole / self.predicted:.6g}")
